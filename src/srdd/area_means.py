"""Means over areas, `down` of the method: the same numbers on every device."""

from collections.abc import Sequence

import torch

from srdd.kept_tensors import KeptTensors


def windows(size: int, new_size: int, device: torch.device) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    What means along an axis are made of: cell `i` of `n` covers `[floor(i size / n), ceil((i + 1) size / n))`.

    Args:
        size (`int`): Length of the axis.
        new_size (`int`): Its length afterwards.
        device (`torch.device`): Where the tensors lie.

    Returns:
        `tuple[torch.LongTensor, torch.Tensor]`: Places and float32 weights of shape `(new_size, num_places)`; the
        weights of a cell sum to 1.
    """
    bounds = [(cell * size // new_size, -(-(cell + 1) * size // new_size)) for cell in range(new_size)]
    steps = range(max(stop - start for start, stop in bounds))
    places = [[min(start + step, size - 1) for step in steps] for start, _ in bounds]
    weights = [[(start + step < stop) / (stop - start) for step in steps] for start, stop in bounds]
    return torch.tensor(places, device=device), torch.tensor(weights, device=device)


WINDOWS = KeptTensors(windows, maxsize=512)


def area_means(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """
    Maps of another size by means over areas, as `interpolate(..., mode="area")` has them.

    That is adaptive pooling, which Apple's GPUs refuse where sizes do not divide. These sums are neither matrix
    products nor convolutions, so that autocast and TF32 leave them alone.

    Args:
        maps (`torch.Tensor` of shape `(..., height, width)`): Floats.
        size (`(int, int)`): New height and width.

    Returns:
        `torch.Tensor` of shape `(..., *size)`: `maps` itself where it has that size.
    """
    height, width = size
    if maps.shape[-2] != height:
        places, weights = WINDOWS[maps.shape[-2], height, maps.device]
        gathered = maps.index_select(-2, places.flatten()).unflatten(-2, places.shape)  # (..., height, places, width)
        maps = (gathered * weights.to(maps.dtype).unsqueeze(-1)).sum(dim=-2)
    if maps.shape[-1] != width:
        places, weights = WINDOWS[maps.shape[-1], width, maps.device]
        gathered = maps.index_select(-1, places.flatten()).unflatten(-1, places.shape)  # (..., width, places)
        maps = (gathered * weights.to(maps.dtype)).sum(dim=-1)
    return maps
