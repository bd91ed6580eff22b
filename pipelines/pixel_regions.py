"""Parts of images: resizing, pasting back what is known, crops around masks, keeping to a small image."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from srdd.checks import shown
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
            blend as they say; with hard ones the drawn pixels at the edge are shifted to meet the known ones, and the
            shift, a continuation of the difference on the known side, fades out over `feather` pixels inside the hole.
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
    # Of the known pixels themselves a continuation would mix what lies along the edge: a pale stripe where an object
    # ends on a light ground. Differences are small on both.
    shift = extend_known(pixels - drawn_pixels, (mask < 0.5).float())
    below = torch.where(mask < 1, pixels, (drawn_pixels + shift).clamp(-1, 1))
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


@dataclass(frozen=True)
class Hole:
    """
    The part of images that is drawn anew, and how it is filled.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): The whole images, in [-1, 1].
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`): In [0, 1], 1 where to draw.
        box (`(slice, slice)`): Rows and columns that are looked at and drawn.
        paste_known (`bool`): Whether the known pixels are laid over what was drawn.
        feather (`int`): As in [`paste`].
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    box: tuple[slice, slice]
    paste_known: bool
    feather: int

    @property
    def surroundings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and mask of what is looked at."""
        return self.pixels[(..., *self.box)], self.mask[(..., *self.box)]

    def filled(self, drawn_pixels: torch.Tensor) -> torch.Tensor:
        """The whole images with what the model has drawn of the box, at its own size, `(batch, 3, height, width)`."""
        pixels, mask = self.surroundings
        result = resize(drawn_pixels, pixels.shape[-2:])
        if self.paste_known:
            result = paste(pixels, mask, result, self.feather)
        whole = self.pixels.clone()
        whole[(..., *self.box)] = result
        return whole


def check_padding(padding: int | Sequence[int], most: int) -> tuple[int, int, int, int]:
    """
    Left, top, right and bottom padding of one number or four.

    Raises:
        ValueError: If they are no integers in [0, most], not one or four, or all 0.
    """
    sides = tuple(padding) if isinstance(padding, (list, tuple)) else (padding,) * 4
    are_sides = all(isinstance(side, Integral) and not isinstance(side, bool) and 0 <= side <= most for side in sides)
    if len(sides) != 4 or not are_sides or not any(sides):
        raise ValueError(
            f"`padding` must be one or four numbers of pixels in [0, {most}], not all 0, got {shown(padding)}."
        )
    return tuple(int(side) for side in sides)


def project_to_low_resolution(
    pixels: torch.Tensor, small: torch.Tensor, num_iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The images nearest to `pixels` that give `small` when they are made small again (bicubic, antialiased).

    Resizing is linear and separable, `A x = D_h x D_w^T`, and the nearest solution of `A x = y` is `x + A^+ (y - A x)`
    with the pseudo-inverses of both factors. It alternates with the bounds [-1, 1] until nothing moves any more. Where
    contrasts are high no image within the bounds may give `small`: then the result comes as near as it can.

    Args:
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`): Images in [-1, 1].
        small (`torch.Tensor` of shape `(batch, channels, small_height, small_width)`): Small images in [-1, 1].
        num_iterations (`int`, defaults to 200): How often projection and bounds alternate at most.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The images, and for each the largest difference that is left, `(batch,)`.
    """
    down_vertically, down_horizontally = (
        _downsampling_matrix(side, small_side).to(pixels)
        for side, small_side in zip(pixels.shape[-2:], small.shape[-2:])
    )
    up_vertically, up_horizontally = torch.linalg.pinv(down_vertically), torch.linalg.pinv(down_horizontally)
    error = small - down_vertically @ pixels @ down_horizontally.T
    for _ in range(num_iterations):
        moved = (pixels + up_vertically @ error @ up_horizontally.T).clamp(-1, 1)
        change, pixels = (moved - pixels).abs().amax(), moved
        error = small - down_vertically @ pixels @ down_horizontally.T
        if change < 1e-4 or error.abs().amax() < 1e-4:
            break
    return pixels, error.abs().amax(dim=(1, 2, 3))


def _downsampling_matrix(side: int, small_side: int) -> torch.Tensor:
    """The matrix of a bicubic, antialiased resize along one axis, `(small_side, side)`."""
    identity = torch.eye(side)[None, None]  # (1, 1, side, side): one impulse in each column
    return F.interpolate(identity, size=(small_side, side), mode="bicubic", antialias=True)[0, 0]
