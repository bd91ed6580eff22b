"""Classifier-free guidance in training: some images are told what the unconditional half is told in drawing."""

import torch


def drop_conditions(
    conditions: dict[str, torch.Tensor], unconditional: dict[str, torch.Tensor] | None, probability: float
) -> dict[str, torch.Tensor]:
    """
    Conditions of a batch, with what is unconditional in the place of a random share.

    Args:
        conditions (`dict[str, torch.Tensor]`): What each image is told, `(batch, ...)`.
        unconditional (`dict[str, torch.Tensor]`, *optional*): What stands in the place of some of it, without a batch;
            `None` where the transformer drops conditions itself, as it does with classes.
        probability (`float`): The share, in [0, 1].

    Returns:
        `dict[str, torch.Tensor]`
    """
    if unconditional is None:
        return conditions
    like = conditions[next(iter(unconditional))]
    is_dropped = torch.rand(len(like), device=like.device) < probability
    dropped = {
        name: torch.where(is_dropped.view(-1, *[1] * value.ndim), value, conditions[name])
        for name, value in unconditional.items()
    }
    return {**conditions, **dropped}
