"""The transformer's training loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from srdd.kept_tensors import KeptTensors
from srdd.scales import num_tokens_per_scale


@dataclass
class TokenLoss:
    """
    Cross-entropy of a batch of pyramids.

    Args:
        loss (`torch.Tensor`): Mean over all tokens, the paper's Equation 7 divided by the number of tokens (scalar);
            a weighted mean if the scales have weights.
        per_scale (`torch.Tensor` of shape `(num_scales,)`): Mean over the tokens of every scale, detached.
        accuracy (`torch.Tensor` of shape `(num_scales,)`): Share of tokens that are the most probable one, detached.
    """

    loss: torch.Tensor
    per_scale: torch.Tensor
    accuracy: torch.Tensor

    def by_scale(self, scale_sizes: list[list[int]]) -> dict[str, torch.Tensor]:
        """Loss and accuracy of every scale, named as in the loss log."""
        return {
            f"{name}/{height}x{width}": value
            for name, values in (("loss", self.per_scale), ("accuracy", self.accuracy))
            for (height, width), value in zip(scale_sizes, values)
        }


def token_weights(scale_weights: tuple[float, ...], counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What each token of a pyramid counts, float32 of shape `(num_tokens,)`. That waits for the device."""
    return torch.tensor(scale_weights, dtype=torch.float32).repeat_interleave(torch.tensor(counts)).to(device)


TOKEN_WEIGHTS = KeptTensors(token_weights, maxsize=8)


def token_loss(
    logits: torch.Tensor,
    token_ids: torch.LongTensor,
    scale_sizes: list[list[int]],
    label_smoothing: float = 0.0,
    scale_weights: list[float] | None = None,
) -> TokenLoss:
    """
    Cross-entropy over all scales, in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_tokens, codebook_size)`): The transformer's output.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The packed pyramids.
        scale_sizes (`list[list[int]]`): `(height, width)` of every scale.
        label_smoothing (`float`, defaults to 0.0): In [0, 1).
        scale_weights (`list[float]`, *optional*): What a token of each scale counts; all alike by default.

    Returns:
        [`TokenLoss`]

    Raises:
        ValueError: If there is not one weight for each scale, or they are not positive in sum.
    """
    counts = num_tokens_per_scale(scale_sizes)
    if scale_weights is not None and (
        len(scale_weights) != len(counts) or min(scale_weights) < 0 or sum(scale_weights) <= 0
    ):
        raise ValueError(
            f"`scale_weights` must be {len(counts)} numbers, none negative and not all zero, got {scale_weights}."
        )
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), token_ids.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(token_ids)
    if scale_weights is None:
        loss = losses.mean()
    else:
        weights = TOKEN_WEIGHTS[tuple(scale_weights), tuple(counts), losses.device]
        loss = (losses.mean(dim=0) * weights).sum() / weights.sum()
    correct = (logits.detach().argmax(dim=-1) == token_ids).float()
    return TokenLoss(
        loss=loss,
        per_scale=torch.stack([of_scale.mean() for of_scale in losses.detach().split(counts, dim=1)]),
        accuracy=torch.stack([of_scale.mean() for of_scale in correct.split(counts, dim=1)]),
    )
