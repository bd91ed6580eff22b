"""The transformer's training loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from srdd.scale_sizes import num_tokens_per_scale


@dataclass
class TokenLoss:
    """
    Cross-entropy of a batch of pyramids.

    Args:
        loss (`torch.Tensor`): Mean over all tokens, the paper's Equation 7 divided by the number of tokens (scalar).
        per_scale (`torch.Tensor` of shape `(num_scales,)`): Mean over the tokens of every scale, detached.
        accuracy (`torch.Tensor` of shape `(num_scales,)`): Share of tokens that are the most probable one, detached.
    """

    loss: torch.Tensor
    per_scale: torch.Tensor
    accuracy: torch.Tensor


def token_loss(
    logits: torch.Tensor,
    token_ids: torch.LongTensor,
    scale_sizes: list[list[int]],
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """
    Cross-entropy over all scales, in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_tokens, codebook_size)`): The transformer's output.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The packed pyramids.
        scale_sizes (`list[list[int]]`): `(height, width)` of every scale.
        label_smoothing (`float`, defaults to 0.0): In [0, 1).

    Returns:
        [`TokenLoss`]
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), token_ids.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(token_ids)
    counts = num_tokens_per_scale(scale_sizes)
    correct = (logits.detach().argmax(dim=-1) == token_ids).float()
    return TokenLoss(
        loss=losses.mean(),
        per_scale=torch.stack([part.mean() for part in losses.detach().split(counts, dim=1)]),
        accuracy=torch.stack([part.mean() for part in correct.split(counts, dim=1)]),
    )
