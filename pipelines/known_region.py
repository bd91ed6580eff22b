"""What an image tells about its token pyramid where only a part of it is known: inpainting, outpainting, editing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from srdd.models import MultiScaleVQModel
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


# A token cell counts as known if more than this share of it is; see `KnownRegion.known_mask`.
KNOWN_CELLS = {"spread": 0.5, "all": 1.0, "majority": 0.5, "any": 0.0}

KNOWN_TOKENS = ("adaptive", "original")


@dataclass
class KnownRegion:
    """
    The known part of images, and the rule that makes tokens of it.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The tokenizer's latent map of the images,
            their unknown part filled by [`extend_known`]. Nothing in it comes from unknown pixels.
        known (`torch.Tensor` of shape `(batch, 1, image_height, image_width)`): 1 where a pixel is known, 0 elsewhere.
        cells (`str`, defaults to `"spread"`): A token cell is known if `"all"`, the `"majority"` or `"any"` of its
            pixels are. `"spread"`: a cell of the finest scale is if a quarter of its pixels is, a cell of a coarser
            scale if the majority of it lies in known cells of the finest. Scattered known pixels, which say what is
            between them, then count for all of it, and a small known part does not speak for a coarse cell.
        tokens (`str`, defaults to `"adaptive"`): `"original"` forces the tokens of the latent map itself, as VAR's
            notebook does. `"adaptive"` takes at each scale the codes nearest to what is still missing from the latent
            map, averaged over known positions: what a coarse token got wrong, finer ones then repair.
        hint_ids (`torch.LongTensor` of shape `(batch, num_hint_tokens)`, *optional*): Tokens of the coarsest scales
            that are known everywhere, packed.
    """

    latents: torch.Tensor
    known: torch.Tensor
    cells: str = "spread"
    tokens: str = "adaptive"
    hint_ids: torch.LongTensor | None = None

    def known_mask(self, scale_size: Sequence[int]) -> torch.BoolTensor:
        """Which cells of a scale are known, `(batch, height, width)`: the one rule for all scales and tasks."""
        known = self.known
        if self.cells == "spread":
            grid_size = tuple(self.latents.shape[-2:])
            known = (F.interpolate(known, size=grid_size, mode="area") > 0.25 - 1e-4).to(known.dtype)
            if tuple(scale_size) == grid_size:
                return known.bool().squeeze(1)
        share = F.interpolate(known, size=tuple(scale_size), mode="area").squeeze(1)
        # Area means of ones may miss 1 by rounding.
        return share > 1 - 1e-4 if self.cells == "all" else share > KNOWN_CELLS[self.cells] + 1e-4

    def token_ids(
        self,
        vqvae: MultiScaleVQModel,
        state: torch.Tensor,
        coarser_scales: Sequence[Sequence[int]],
        scale_size: Sequence[int],
    ) -> torch.LongTensor:
        """
        Known tokens of a scale.

        Args:
            vqvae ([`MultiScaleVQModel`]): The tokenizer.
            state (`torch.Tensor` of the shape of `latents`): The latent state before the scale.
            coarser_scales (`Sequence`): The scales before it.
            scale_size (`(int, int)`): The scale.

        Returns:
            `torch.LongTensor` of shape `(batch, height * width)`: -1 where a token is not known.
        """
        first = sum(height * width for height, width in coarser_scales)
        count = scale_size[0] * scale_size[1]
        if self.hint_ids is not None and self.hint_ids.shape[1] >= first + count:
            return self.hint_ids[:, first : first + count]
        if self.tokens == "original":
            token_ids = vqvae.quantize_latents(self.latents, [*coarser_scales, scale_size])[:, first:]
        else:
            weights = F.interpolate(self.known, size=self.latents.shape[-2:], mode="area")
            rest = F.interpolate((self.latents - state) * weights, size=tuple(scale_size), mode="area")
            total = F.interpolate(weights, size=tuple(scale_size), mode="area")
            token_ids = vqvae.quantize_latents(rest / total.clamp(min=1e-6), [scale_size])
        return torch.where(self.known_mask(scale_size).flatten(1), token_ids, MASK_TOKEN_ID)


def extend_known(pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """
    Fill unknown pixels with a smooth continuation of the known ones (push-pull: means over growing cells).

    Args:
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`): Images; their unknown pixels are not read.
        known (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where a pixel is known, 0 elsewhere.

    Returns:
        `torch.Tensor` of the shape of `pixels`: Known pixels as they are; zero where an image has none at all.
    """
    pixels = pixels.masked_fill(known == 0, 0.0)
    size = tuple(pixels.shape[-2:])
    if known.bool().all() or size == (1, 1):
        return pixels
    # Overlapping cells, so that an unknown pixel at an edge continues its neighbour and not a distant mean.
    total = F.avg_pool2d(F.pad(known, (1, 2, 1, 2)), kernel_size=4, stride=2)
    coarse = F.avg_pool2d(F.pad(pixels, (1, 2, 1, 2)), kernel_size=4, stride=2) / total.clamp(min=1e-6)
    coarse = extend_known(coarse, (total > 0).to(known.dtype))
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    return torch.where(known > 0, pixels, smooth)
