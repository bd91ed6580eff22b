"""Reading pictures: the one place that decides what their values mean, for pipelines, training and evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


# What a picture may be, in a call: one, a batch of them, or a list of both.
Pictures = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]

# Largest integer of the types whose range is that of their integers.
INTEGER_RANGES = {torch.uint8: 255, torch.uint16: 65535}

# How far floats may lie outside of [0, 1], as arithmetic may have moved them.
TOLERANCE = 1e-3

# ITU-R 601, as Pillow's mode "L".
LUMA = (0.299, 0.587, 0.114)


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    A picture as one sees it, with 8 bits of red, green and blue.

    An EXIF rotation is applied, transparency is laid on white, 16 bits (the modes "I;16" and "I") become 8.

    Args:
        picture (`PIL.Image.Image`): Any mode but "F".

    Raises:
        ValueError: If it is not known which values are black and white: in the mode "F", and in the mode "I" with
            values that 16 bits do not have.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("mode F has no fixed range of values")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"mode {picture.mode} must have values in [0, 65535], got [{values.min()}, {values.max()}]"
            )
        picture = Image.fromarray((values / 257).round().astype(np.uint8))
    if has_transparency(picture):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def has_transparency(picture: Image.Image) -> bool:
    """Whether some of a picture may be transparent."""
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def read_pictures(name: str, pictures: Pictures) -> torch.Tensor:
    """
    Pictures as one batch of pixels.

    Args:
        name (`str`): The argument's name in error messages.
        pictures (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these): Pictures of one size. Pillow's
            are read by [`to_rgb`]. Arrays are `(height, width)`, `(height, width, channels)` or `(batch, height,
            width, channels)`; tensors `(height, width)`, `(channels, height, width)` or `(batch, channels, height,
            width)`. They have 1, 3 or 4 channels, the fourth being opacity, and are floats in [0, 1], booleans, or
            unsigned integers of 8 or 16 bits, in [0, 255] or [0, 65535].

    Returns:
        `torch.Tensor` of shape `(batch, 3, height, width)`, float32 in [0, 1].

    Raises:
        ValueError: If something is no picture, has values of another kind or outside of their range, or sizes differ.
    """

    def read(picture: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(picture, Image.Image):
            return _pixels_of(to_rgb(picture))
        pixels = _values_of(picture)
        if pixels.shape[1] == 4:
            pixels = 1 - pixels[:, 3:] * (1 - pixels[:, :3])  # on white
        return pixels.expand(-1, 3, -1, -1)

    return _as_batch(name, pictures, read)


def read_masks(name: str, masks: Pictures) -> torch.Tensor:
    """
    Masks as one batch.

    Args:
        name (`str`): The argument's name in error messages.
        masks (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these): Masks of one size, of the kinds
            that [`read_pictures`] takes. Colours count by their brightness.

    Returns:
        `torch.Tensor` of shape `(batch, 1, height, width)`, float32 in [0, 1].

    Raises:
        ValueError: As [`read_pictures`] does, and if a mask is transparent somewhere, which may mean either.
    """

    def read(mask: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(mask, Image.Image):
            alpha = mask.convert("RGBA").getchannel("A").getextrema()[0] / 255 if has_transparency(mask) else 1.0
            values = _pixels_of(to_rgb(mask).convert("L"))
        else:
            values = _values_of(mask)
            alpha = values[:, 3:].min().item() if values.shape[1] == 4 else 1.0
            if values.shape[1] > 1:
                values = (values[:, :3] * torch.tensor(LUMA, device=values.device).view(3, 1, 1)).sum(1, keepdim=True)
        if alpha < 1:
            raise ValueError("a mask must not be transparent anywhere")
        return values

    return _as_batch(name, masks, read)


def _as_batch(name: str, pictures: Pictures, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What `read` makes of all pictures, `(batch, channels, height, width)`; its errors name the argument."""
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not listed:
        raise ValueError(f"`{name}` must hold at least one picture, got an empty list.")
    try:
        batches = [read(picture) for picture in listed]
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be read: {error}.") from None
    sizes = sorted({tuple(batch.shape[-2:]) for batch in batches})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold pictures of one size, got the heights and widths {sizes}.")
    return torch.cat(batches)


def _pixels_of(picture: Image.Image) -> torch.Tensor:
    """Pixels of a picture of 8 bits, `(1, channels, height, width)`."""
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.view(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def _values_of(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """An array or a tensor as `(batch, channels, height, width)`, float32 in [0, 1]."""
    if not isinstance(values, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"a picture must be a PIL.Image.Image, an np.ndarray or a torch.Tensor, got {type(values).__name__}"
        )
    is_array, shape = isinstance(values, np.ndarray), tuple(values.shape)
    if is_array and values.dtype.kind not in "bfu":
        raise ValueError(f"an array must hold floats in [0, 1], booleans, uint8 or uint16, got {values.dtype}")
    tensor = torch.from_numpy(np.ascontiguousarray(values)) if is_array else values.detach()
    if len(shape) == 2:
        tensor = tensor[None, None]
    elif is_array and len(shape) in (3, 4):
        tensor = tensor.movedim(-1, -3)
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3, 4) or 0 in shape:
        layout = "height, width, channels" if is_array else "channels, height, width"
        raise ValueError(f"its shape must be ({layout}) with 1, 3 or 4 channels, or a batch of such, got {shape}")
    if tensor.dtype == torch.bool:
        return tensor.float()
    if tensor.dtype in INTEGER_RANGES:
        return tensor.to(torch.int32).float() / INTEGER_RANGES[tensor.dtype]
    if not tensor.is_floating_point():
        raise ValueError(f"a tensor must hold floats in [0, 1], booleans, uint8 or uint16, got {tensor.dtype}")
    tensor = tensor.float()
    low, high = (bound.item() for bound in tensor.aminmax())
    if not (-TOLERANCE <= low and high <= 1 + TOLERANCE):  # nor NaN
        raise ValueError(f"floats must lie in [0, 1], got [{low:.4g}, {high:.4g}]")
    return tensor.clamp(0, 1)
