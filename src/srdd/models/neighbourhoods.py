"""Windows of attention: tokens that see a square of their own scale instead of all of it (MVAR, arXiv 2505.12742).

Shape legend: N_k tokens in scale k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from srdd.checks import check_int, check_list, shown
from srdd.kept_tensors import KeptTensors


@dataclass(frozen=True)
class Neighbourhood:
    """
    What the tokens of a scale see of it: a square around each. At the edges it is shifted inwards, so that every token
    sees as many.

    Args:
        size (`(int, int)`): Height and width of the scale.
        window (`int`): The side of the square, odd.
    """

    size: tuple[int, int]
    window: int

    def starts(self, axis: int, device: torch.device) -> torch.LongTensor:
        """Where the squares of the places along an axis start: `clamp(i - window // 2, 0, length - window)`."""
        length = self.size[axis]
        return (torch.arange(length, device=device) - self.window // 2).clamp(0, length - self.window)


def check_windows(windows: Any, scale_sizes: Sequence[Sequence[int]], attention_pattern: str) -> list[int] | None:
    """
    The windows of a model's scales, as JSON has them.

    Args:
        windows (`Any`): What was given.
        scale_sizes (`Sequence[Sequence[int]]`): `(height, width)` of every scale.
        attention_pattern (`str`): The model's pattern.

    Raises:
        ValueError: If they are neither `None` nor for every scale 0 or an odd number up to its shorter side, or the
            pattern is not "markov".
    """
    if windows is None:
        return None
    checked = check_list("attention_windows", windows, len(scale_sizes))
    for index, (window, size) in enumerate(zip(checked, scale_sizes)):
        name = f"attention_windows[{index}]"
        checked[index] = check_int(name, window, 0, min(size))
        if window > 0 and window % 2 == 0:
            raise ValueError(f"`{name}` must be 0 or an odd integer in [1, {min(size)}], got {window}.")
    if attention_pattern != "markov":
        raise ValueError(
            f"`attention_windows` must be None with the attention pattern {attention_pattern!r}, they belong to"
            f" 'markov', got {shown(windows)}."
        )
    return checked


def neighbourhood_mask(neighbourhood: Neighbourhood, device: torch.device) -> torch.BoolTensor:
    """`(1, 1, N_k, N_k)`, true where attention is allowed. Made on the device: the host sends nothing."""
    sees = []
    for axis in (0, 1):
        starts = neighbourhood.starts(axis, device).unsqueeze(1)
        places = torch.arange(neighbourhood.size[axis], device=device)
        sees.append((starts <= places) & (places < starts + neighbourhood.window))  # (length, length)
    rows, columns = sees
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)[None, None]


NEIGHBOURHOOD_MASKS = KeptTensors(neighbourhood_mask, maxsize=512)


def scale_masks(
    neighbourhoods: Sequence[Neighbourhood | None], device: torch.device, token_indices: torch.LongTensor | None = None
) -> tuple[torch.BoolTensor | None, ...] | None:
    """
    Masks for attention that goes scale by scale.

    Args:
        neighbourhoods (`Sequence[Neighbourhood]`): Those of the scales at hand; `None` for one that is seen whole.
        device (`torch.device`): Where the masks lie.
        token_indices (`torch.LongTensor` of shape `(batch, num_indices)`, *optional*): The tokens at hand of the one
            scale, if not all.

    Returns:
        `tuple[torch.BoolTensor, ...]`, *optional*: For each scale `(1, 1, N_k, N_k)`, with `token_indices` their rows,
        `(batch, 1, num_indices, N_k)`, or `None`. `None` if all scales are seen whole.
    """
    masks = tuple(each if each is None else NEIGHBOURHOOD_MASKS[each, device] for each in neighbourhoods)
    if all(mask is None for mask in masks):
        return None
    if token_indices is not None:
        return (masks[0][0, 0, token_indices].unsqueeze(1),)
    return masks
