"""Weights that are numbers: what is not finite neither tokenises, nor trains, nor is published."""

import torch


def check_finite_weights(model: torch.nn.Module, argument: str, source: str | None = None) -> None:
    """
    Make sure that all weights of a model are finite.

    Args:
        model (`torch.nn.Module`): The model.
        argument (`str`): The argument that it came from, or what else it is, for the message.
        source (`str`, *optional*): The value of that argument.

    Raises:
        ValueError: If weights are not finite; names some of them.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = argument if " " in argument else f"`{argument}`"
        named = f" {source!r}," if source else ""
        raise ValueError(
            f"{what} must have finite weights, got{named} NaN or infinity in {len(broken)} of {len(tensors)} tensors:"
            f" {', '.join(broken[:5])}{', …' * (len(broken) > 5)}."
        )
