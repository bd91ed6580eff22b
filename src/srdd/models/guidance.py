"""Classifier-free guidance: the one formula of sampling, distillation and likelihood."""

import torch


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """
    `uncond + (1 + w) (cond - uncond)`, which is `cond + w (cond - uncond)` (paper, Section 3.3 a).

    Args:
        conditional (`torch.Tensor`): Logits, or anything that they are a linear map of.
        unconditional (`torch.Tensor`): The same of the null condition.
        weight (`float` or `torch.Tensor`): `w`, VAR's and the paper's `cfg` of a scale, diffusers' `guidance_scale -
            1`; a tensor broadcasts.

    Returns:
        `torch.Tensor` of the shape and dtype of `conditional`, computed in float32.
    """
    guided = torch.lerp(unconditional.float(), conditional.float(), 1.0 + weight)
    return guided.to(conditional.dtype)
