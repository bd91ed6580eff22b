"""Angles of rotary positions: where tokens lie in the picture, by row and by column.

Shape legend: N tokens of the scales at hand, D / H width of a head.
"""

from collections.abc import Sequence

import torch


def place_angles(
    scale_sizes: Sequence[Sequence[int]],
    spacings: Sequence[Sequence[float]],
    head_dim: int,
    rope_theta: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The angles of rows and of columns. Everything is computed on the device, which need not be sent anything.

    Args:
        scale_sizes (`Sequence`): `(height, width)` of the packed scales.
        spacings (`Sequence`): For each of them how far its rows and columns lie from the next ones; the first are at
            0.
        head_dim (`int`): Width of a head, a multiple of 4.
        rope_theta (`float`): Base of the frequencies.
        device (`torch.device`): Where they are needed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Float32, of shape `(num_tokens, head_dim / 4)` each.
    """
    exponents = torch.arange(head_dim // 4, device=device, dtype=torch.float32) * (-4 / head_dim)
    frequencies = torch.pow(rope_theta, exponents)  # (D/H/4,)
    grids = []
    for (height, width), spacing in zip(scale_sizes, spacings):
        rows, columns = (
            (torch.arange(side, device=device, dtype=torch.float32) * step).unsqueeze(-1) * frequencies
            for side, step in zip((height, width), spacing)
        )
        grid = rows.unsqueeze(1).expand(-1, width, -1), columns.expand(height, -1, -1)  # (h, w, D/H/4) each
        grids.append([angles.flatten(0, 1) for angles in grid])
    rows, columns = (of_scales[0] if len(of_scales) == 1 else torch.cat(of_scales) for of_scales in zip(*grids))
    return rows, columns
