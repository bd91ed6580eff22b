"""Parts of images: resizing, pasting back what is known, crops around masks, keeping to a small image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from srdd.pipelines.known_region import extend_known


def resize(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bicubic, antialiased resize of pixels in [-1, 1], nothing where the size is right."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


def paste(pixels: torch.Tensor, mask: torch.Tensor, drawn_pixels: torch.Tensor, feather: int) -> torch.Tensor:
    """
    Lay known pixels over drawn ones.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): The images.
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`): In [0, 1]; 0 is known. Masks with values in between
            blend as they say; hard ones fade in over `feather` pixels, inside the hole, out of a continuation of the
            known pixels.
        drawn_pixels (`torch.Tensor` of the shape of `pixels`): The result of the model.
        feather (`int`): Width of the edge.

    Returns:
        `torch.Tensor` of the shape of `pixels`: Exactly `pixels` where the mask is 0.
    """
    weight = mask
    if feather > 0:
        padded = F.pad(mask, (feather,) * 4, mode="replicate")
        inside = F.avg_pool2d(padded, 2 * feather + 1, stride=1).mul(2).sub(1).clamp(min=1 / (2 * feather + 1), max=1)
        hard = ((mask == 0) | (mask == 1)).flatten(1).all(dim=1)[:, None, None, None]
        weight = torch.where(hard, inside * mask, mask)
    below = torch.where(mask < 1, pixels, extend_known(pixels, (mask < 0.5).float()))
    return torch.lerp(below, drawn_pixels, weight)


def crop_box(mask: torch.Tensor, margin: int, size: Sequence[int]) -> tuple[slice, slice]:
    """
    Rows and columns around the masked pixels of a batch, in the proportions of the model's images.

    Args:
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`): In [0, 1].
        margin (`int`): Pixels to add on all sides, where there are any.
        size (`(int, int)`): Height and width of the model's images.

    Raises:
        ValueError: If no pixel is masked.
    """
    union = mask.amax(dim=(0, 1))
    if union.max() == 0:
        raise ValueError("`mask_image` must have white pixels for `padding_mask_crop`, got none.")
    picture = VaeImageProcessor.numpy_to_pil((union > 0).float().cpu().numpy()[None, ..., None])[0]
    left, top, right, bottom = VaeImageProcessor.get_crop_region(picture, size[1], size[0], margin)
    return slice(top, bottom), slice(left, right)


def check_padding(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom padding of one number or four."""
    sides = tuple(padding) if isinstance(padding, Sequence) else (padding,) * 4
    if len(sides) != 4 or any(not isinstance(side, int) or side < 0 for side in sides) or not any(sides):
        raise ValueError(
            f"`padding` must be one or four numbers of pixels, none negative, not all 0, got {padding!r}."
        )
    return sides


def project_to_low_resolution(pixels: torch.Tensor, small: torch.Tensor, num_iterations: int = 10) -> torch.Tensor:
    """
    The images nearest to `pixels` that give `small` when they are made small again (bicubic, antialiased).

    Resizing is linear and separable, `A x = D_h x D_w^T`, and the nearest solution of `A x = y` is `x + A^+ (y - A x)`
    with the pseudo-inverses of both factors. It alternates with the bounds [-1, 1].

    Args:
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`): Images in [-1, 1].
        small (`torch.Tensor` of shape `(batch, channels, small_height, small_width)`): Small images in [-1, 1].
        num_iterations (`int`, defaults to 10): How often projection and bounds alternate.
    """
    down_vertically, down_horizontally = (
        _downsampling_matrix(side, small_side).to(pixels)
        for side, small_side in zip(pixels.shape[-2:], small.shape[-2:])
    )
    up_vertically, up_horizontally = torch.linalg.pinv(down_vertically), torch.linalg.pinv(down_horizontally)
    for _ in range(num_iterations):
        error = small - down_vertically @ pixels @ down_horizontally.T
        pixels = (pixels + up_vertically @ error @ up_horizontally.T).clamp(-1, 1)
    return pixels


def _downsampling_matrix(side: int, small_side: int) -> torch.Tensor:
    """The matrix of a bicubic, antialiased resize along one axis, `(small_side, side)`."""
    identity = torch.eye(side)[None, None]  # (1, 1, side, side): one impulse in each column
    return F.interpolate(identity, size=(small_side, side), mode="bicubic", antialias=True)[0, 0]
