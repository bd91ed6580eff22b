"""Scales, and lists of them: the one idea every part of the package shares.

A scale list is written coarse to fine as `(height, width)` pairs; a bare integer stands for a square scale. Token
pyramids are packed: one `(batch, num_tokens)` tensor that holds the scales one after the other, each in row-major
order.
"""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from srdd.checks import shown


ScaleSizes = Sequence[int | Sequence[int]]

# What a list of scales may hold at most. VAR's lists have 10 scales up to a side of 32.
MAX_SCALES = 100
MAX_SIDE = 4096


@dataclass(frozen=True)
class Scale:
    """
    One scale of a schedule.

    Args:
        timestep (`int`): Its place in diffusion time: `K - 1` is the coarsest of all K scales, 0 the finest.
        size (`(int, int)`): Height and width.
        tokens (`slice`): Where its tokens lie in a pyramid over the scales of the schedule.
    """

    timestep: int
    size: tuple[int, int]
    tokens: slice

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""
        return self.size[0] * self.size[1]


def normalize_scale_sizes(scale_sizes: ScaleSizes, name: str = "scale_sizes") -> list[list[int]]:
    """
    Turn a scale list into `[[height, width], ...]`, the JSON form in which configs store it.

    Args:
        scale_sizes (`Sequence[int | Sequence[int]]`): Square side lengths or `(height, width)` pairs, coarse to fine.
        name (`str`, defaults to `"scale_sizes"`): The argument's name in error messages.

    Returns:
        `list[list[int]]`: One `[height, width]` per scale.

    Raises:
        ValueError: If the list is empty or has more than 100 scales, an entry is not one or two integers in [1, 4096],
            or a scale does not contain more tokens than the one before it in at least as many rows and columns.
    """
    is_list = isinstance(scale_sizes, Sequence) and not isinstance(scale_sizes, (str, bytes))
    is_list = is_list and 1 <= len(scale_sizes) <= MAX_SCALES
    pairs = [size if isinstance(size, Sequence) else (size, size) for size in scale_sizes] if is_list else []
    if not is_list or not all(len(pair) == 2 and all(map(_is_side, pair)) for pair in pairs):
        raise ValueError(
            f"`{name}` must list at least one scale and at most {MAX_SCALES}, each a positive integer of at most"
            f" {MAX_SIDE} or a (height, width) pair of them, got {shown(scale_sizes)}."
        )
    sizes = [[int(side) for side in pair] for pair in pairs]
    for coarse, fine in zip(sizes, sizes[1:]):
        if fine[0] < coarse[0] or fine[1] < coarse[1] or fine == coarse:
            raise ValueError(
                f"`{name}` must grow from scale to scale, got {fine} after {coarse} in {shown(scale_sizes)}."
            )
    return sizes


def _is_side(side: Any) -> bool:
    return isinstance(side, numbers.Integral) and not isinstance(side, bool) and 1 <= side <= MAX_SIDE


def default_scale_sizes(grid_size: int | Sequence[int]) -> list[list[int]]:
    """
    A scale list for a latent grid: from the grid down, each scale is 5/6 of the next finer one (3/4 on grids beyond
    16), rounded down, until 1. This gives VAR's own lists at 256px (grid 16: 1 2 3 4 5 6 8 10 13 16) and 512px (grid
    32: 1 2 3 4 6 9 13 18 24 32). On a grid that is not square the shorter side follows the longer in proportion.

    Args:
        grid_size (`int` or `(int, int)`): Side, or height and width, of the latent grid.

    Returns:
        `list[list[int]]`: One `[height, width]` per scale, coarse to fine.

    Raises:
        ValueError: If `grid_size` is not one or two integers in [1, 4096].
    """
    [grid] = normalize_scale_sizes([grid_size], "grid_size")
    longest = max(grid)
    numerator, denominator = (5, 6) if longest <= 16 else (3, 4)
    sides = [longest]
    while sides[-1] > 1:
        sides.append(sides[-1] * numerator // denominator)
    return [[max(1, round(side * full / longest)) for full in grid] for side in reversed(sides)]


def num_tokens_per_scale(scale_sizes: Sequence[Sequence[int]]) -> list[int]:
    """Number of tokens `height * width` of every scale."""
    return [height * width for height, width in scale_sizes]


def scale_slices(scale_sizes: Sequence[Sequence[int]]) -> list[slice]:
    """Where each scale lies in a packed token pyramid."""
    ends = list(accumulate(num_tokens_per_scale(scale_sizes)))
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def split_scales(token_ids: torch.Tensor, scale_sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """
    Cut a packed pyramid into token maps.

    Args:
        token_ids (`torch.Tensor` of shape `(batch, num_tokens, ...)`): Packed pyramid (ids, or features per token).
        scale_sizes (`Sequence[Sequence[int]]`): `(height, width)` of every scale.

    Returns:
        `list[torch.Tensor]`: One tensor of shape `(batch, height, width, ...)` per scale.

    Raises:
        ValueError: If `token_ids` does not hold as many tokens as the scales have.
    """
    counts = num_tokens_per_scale(scale_sizes)
    if token_ids.ndim < 2 or token_ids.shape[1] != sum(counts):
        raise ValueError(
            f"`token_ids` must have shape (batch, {sum(counts)}) for the scales {list(map(tuple, scale_sizes))}, got"
            f" {tuple(token_ids.shape)}."
        )
    return [part.unflatten(1, tuple(size)) for part, size in zip(token_ids.split(counts, dim=1), scale_sizes)]
