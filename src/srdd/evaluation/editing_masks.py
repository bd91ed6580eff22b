"""Masks for measuring inpainting: RePaint's six kinds (Lugmayr et al. 2022, Section 5.1)."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw


MASK_KINDS = ("nn2", "ev2li", "genhalf", "ex64", "thick", "thin")

# LaMa's (Suvorov et al. 2022) at 256 pixels: how many strokes, how wide and how long at most; other sizes scale.
STROKES = {"thin": ((4, 50), 10, 40), "thick": ((1, 5), 100, 200)}
NUM_BOXES, BOX_SIDES, BOX_PROBABILITY = (1, 3), (30, 150), 0.23


def make_mask(kind: str, height: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    One mask of a kind.

    Args:
        kind (`str`): `"nn2"` keeps every second pixel of every second row, `"ev2li"` every second row, `"genhalf"` the
            left half, `"ex64"` a square in the centre with a quarter of the side. `"thin"` hides random strokes;
            `"thick"` wide ones or, in 23 % of the masks, boxes; both hide half of the image at most.
        height (`int`): Height of the image.
        width (`int`): Width of the image.
        generator (`torch.Generator`, *optional*): Draws `"thick"` and `"thin"`.

    Returns:
        `torch.Tensor` of shape `(1, height, width)`, float32: 1 where pixels are hidden and to be drawn, 0 elsewhere.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in MASK_KINDS:
        raise ValueError(f"`kind` must be one of {MASK_KINDS}, got {kind!r}.")
    if kind in STROKES:
        while True:
            mask = _strokes_or_boxes(kind, height, width, generator)
            if 0 < mask.mean() <= 0.5:
                return mask
    mask = torch.ones(1, height, width)
    if kind == "nn2":
        mask[:, ::2, ::2] = 0
    elif kind == "ev2li":
        mask[:, ::2] = 0
    elif kind == "genhalf":
        mask[:, :, : width // 2] = 0
    else:
        top, left = (height - height // 4) // 2, (width - width // 4) // 2
        mask[:, top : top + height // 4, left : left + width // 4] = 0
    return mask


def _strokes_or_boxes(kind: str, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """A draw of strokes or boxes, however much it hides."""

    def integer(low: float, high: float) -> int:
        """A whole number from `low` to `high`."""
        low, high = round(low), max(round(low), round(high))
        return int(torch.randint(low, high + 1, (), generator=generator))

    scale = min(height, width) / 256
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    if kind == "thick" and torch.rand((), generator=generator) < BOX_PROBABILITY:
        for _ in range(integer(*NUM_BOXES)):
            box_width, box_height = (integer(BOX_SIDES[0] * scale, BOX_SIDES[1] * scale) for _ in range(2))
            left, top = integer(0, width - box_width), integer(0, height - box_height)
            draw.rectangle((left, top, left + box_width - 1, top + box_height - 1), fill=255)
    else:
        counts, most_width, most_length = STROKES[kind]
        for _ in range(integer(*counts)):
            points = [(integer(0, width - 1), integer(0, height - 1))]
            stroke = max(1, integer(most_width * scale / 2, most_width * scale))
            for _ in range(integer(1, 5)):
                angle = 2 * math.pi * torch.rand((), generator=generator).item()
                length = integer(1, most_length * scale)
                x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
                points.append((min(max(x, 0), width - 1), min(max(y, 0), height - 1)))
            draw.line(points, fill=255, width=stroke, joint="curve")
            for x, y in points:  # round ends
                draw.ellipse((x - stroke / 2, y - stroke / 2, x + stroke / 2, y + stroke / 2), fill=255)
    return torch.from_numpy(np.array(picture)).gt(127).float()[None]
