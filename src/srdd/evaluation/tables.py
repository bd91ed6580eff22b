"""Markdown tables, and how numbers are written in them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """
    A Markdown table.

    Args:
        header (`Sequence`): The titles of its columns.
        rows (`Iterable[Sequence]`): Its rows, each with a cell for every column.

    Returns:
        `str`: Ends with a newline.

    Raises:
        ValueError: If a row has more or fewer cells than there are columns.
    """
    lines = [_line(header), "|---" * len(header) + "|"]
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"`rows` must have {len(header)} cells each, got {list(cells)}.")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def with_range(value: float, ends: Sequence[float] | None, digits: int) -> str:
    """
    A value and, in parentheses, both ends of its range or interval, if there is one: `"2.01 (1.98–2.03)"`,
    `"0.1 (-0.2 to 0.4)"`.
    """
    to = " to " if ends is not None and min(ends) < 0 else "–"
    shown = "" if ends is None else f" ({ends[0]:.{digits}f}{to}{ends[1]:.{digits}f})"
    return f"{value:.{digits}f}{shown}"


def speed_ratio(reference: Sequence[float], seconds: Sequence[float]) -> str:
    """How many times as fast as a reference something is, round by round: the median and the range."""
    ratios = [theirs / ours for theirs, ours in zip(reference, seconds, strict=True)]
    return with_range(statistics.median(ratios), (min(ratios), max(ratios)), 2)


def readable(value: Any) -> str:
    """A value as tables show it: numbers with four digits, scales as `8` or `8x4`, `None` as "none"."""
    if value is None:
        return "none"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value):
            return " ".join(scale_name(size) for size in value)
        return ", ".join(readable(item) for item in value)
    return str(value)


def scale_name(size: Sequence[int]) -> str:
    """A scale of `(height, width)`, one number if it is square."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"
