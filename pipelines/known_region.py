"""What an image tells about its token pyramid where only a part of it is known: inpainting, outpainting, editing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from srdd.area_means import area_means
from srdd.models import MultiScaleVQModel
from srdd.scales import Scale
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


@dataclass
class KnownRegion:
    """
    The known part of images, and the rule that makes tokens of it.

    A cell of the finest scale is known if a quarter of its pixels is, a cell of a coarser scale if the majority of it
    lies in known cells of the finest. Scattered known pixels, which say what is between them, then count for all of
    it, and a small known part does not speak for a coarse cell. Known cells take the codes nearest to what is still
    missing from the latent map, averaged over known positions: what a coarse token got wrong, finer ones then repair.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Its latent map of the images, their
            unknown part filled by [`extend_known`]. Nothing in it comes from unknown pixels.
        known_pixels (`torch.Tensor` of shape `(batch, 1, image_height, image_width)`): 1 where a pixel is known, 0
            elsewhere.
        hint_ids (`torch.LongTensor` of shape `(batch, num_hint_tokens)`, *optional*): Tokens of the coarsest scales
            that are known everywhere, packed.
    """

    vqvae: MultiScaleVQModel
    latents: torch.Tensor
    known_pixels: torch.Tensor
    hint_ids: torch.LongTensor | None = None

    @cached_property
    def known_shares(self) -> torch.Tensor:
        """How much of each cell of the latent grid is known, `(batch, 1, height, width)`."""
        return area_means(self.known_pixels, self.latents.shape[-2:])

    def known_mask(self, scale_size: Sequence[int]) -> torch.BoolTensor:
        """Which cells of a scale are known, `(batch, height, width)`: the one rule for all scales and tasks."""
        # Area means of ones may miss a bound by rounding.
        known_cells = self.known_shares > 0.25 - 1e-4
        if tuple(scale_size) == tuple(self.latents.shape[-2:]):
            return known_cells.squeeze(1)
        share = area_means(known_cells.to(self.known_pixels.dtype), scale_size).squeeze(1)
        return share > 0.5 + 1e-4

    def token_ids(self, scale: Scale, state: torch.Tensor) -> torch.LongTensor:
        """
        Known tokens of a scale.

        Args:
            scale ([`Scale`]): The scale.
            state (`torch.Tensor` of the shape of `latents`): The latent state before it.

        Returns:
            `torch.LongTensor` of shape `(batch, num_scale_tokens)`: -1 where a token is not known.
        """
        if self.hint_ids is not None and self.hint_ids.shape[1] >= scale.tokens.stop:
            return self.hint_ids[:, scale.tokens]
        rest = area_means((self.latents - state) * self.known_shares, scale.size)
        total = area_means(self.known_shares, scale.size)
        token_ids = self.vqvae.quantize_latents(rest / total.clamp(min=1e-6), [scale.size])
        return torch.where(self.known_mask(scale.size).flatten(1), token_ids, MASK_TOKEN_ID)


def coarse_tokens(
    vqvae: MultiScaleVQModel,
    pixels: torch.Tensor,
    scale_sizes: Sequence[Sequence[int]],
    latents: torch.Tensor | None = None,
) -> torch.LongTensor | None:
    """
    Tokens of images over a coarse part of the scales, as hints of colour and layout.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Images of the model's size, in [-1, 1].
        scale_sizes (`Sequence`): The scales.
        latents (`torch.Tensor`, *optional*): Their latent map, where they were encoded before.

    Returns:
        `torch.LongTensor` of shape `(batch, num_hint_tokens)`, or `None` without scales.
    """
    if not scale_sizes:
        return None
    latents = vqvae.encode(pixels.to(vqvae.dtype)).latents if latents is None else latents
    return vqvae.quantize_latents(latents, scale_sizes)


def extend_known(pixels: torch.Tensor, known_pixels: torch.Tensor) -> torch.Tensor:
    """
    Fill unknown pixels with a smooth continuation of the known ones (push-pull: means over growing cells).

    Args:
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`): Images; their unknown pixels are not read.
        known_pixels (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where a pixel is known, 0 elsewhere.

    Returns:
        `torch.Tensor` of the shape of `pixels`: Known pixels as they are; zero where an image has none at all.
    """
    pixels = pixels.masked_fill(known_pixels == 0, 0.0)
    size = tuple(pixels.shape[-2:])
    if known_pixels.bool().all() or size == (1, 1):
        return pixels
    # Overlapping cells, so that an unknown pixel at an edge continues its neighbour and not a distant mean.
    total = F.avg_pool2d(F.pad(known_pixels, (1, 2, 1, 2)), kernel_size=4, stride=2)
    coarse = F.avg_pool2d(F.pad(pixels, (1, 2, 1, 2)), kernel_size=4, stride=2) / total.clamp(min=1e-6)
    coarse = extend_known(coarse, (total > 0).to(known_pixels.dtype))
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    return torch.where(known_pixels > 0, pixels, smooth)
