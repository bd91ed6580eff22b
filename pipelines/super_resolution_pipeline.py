"""Enlarging images, whatever says what to draw."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from srdd.checks import check_bool, check_int
from srdd.models import MultiScaleVQModel
from srdd.pictures import Pictures
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.known_region import KnownRegion, coarse_tokens
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pixel_regions import project_to_low_resolution, resize
from srdd.pipelines.scale_pipeline import MAX_SIDE, CallOptions, ScalePipeline
from srdd.pipelines.scale_sampling import KnownTokens
from srdd.pipelines.windowed_canvas import Window, WindowedCanvas, draw_windows


logger = logging.get_logger(__name__)


class EnlargedCanvas(WindowedCanvas):
    """
    A canvas on which images are enlarged: smooth at first, and drawn window by window.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        small (`torch.Tensor` of shape `(batch, 3, height, width)`): The images, in [-1, 1].
        scale_factor (`int`): How many times larger they become.
        sample_size (`(int, int)`): Height and width of a window; a canvas that is smaller is continued to it.
        determined (`Sequence`): The scales that the small images determine.
        consistent (`bool`): Whether results, made small again, are the small images, as far as they can be.
    """

    def __init__(
        self,
        vqvae: MultiScaleVQModel,
        small: torch.Tensor,
        scale_factor: int,
        sample_size: Sequence[int],
        determined: Sequence[Sequence[int]],
        consistent: bool,
    ):
        self.vqvae, self.small, self.determined, self.consistent = vqvae, small, determined, consistent
        self.full_size = [side * scale_factor for side in small.shape[-2:]]
        smooth = resize(small, self.full_size)
        missing = [max(0, least - side) for least, side in zip(sample_size, self.full_size)]
        self.smooth = F.pad(smooth, (0, missing[1], 0, missing[0]), mode="replicate")
        super().__init__(self.smooth, torch.zeros_like(self.smooth[:, :1]), sample_size)

    def known_tokens(self, window: Window) -> KnownTokens:
        """What is known of a window: what was drawn of it before, and the scales that small images determine."""
        place = (..., *window)
        known_pixels, smooth = self.known_pixels[place], self.smooth[place]
        filled = torch.where(known_pixels > 0, self.pixels[place], smooth)
        latents = self.vqvae.encode(filled.to(self.vqvae.dtype)).latents
        # The first window is smooth all over, and encoded as such already.
        smooth_latents = None if known_pixels.any() else latents
        hint_ids = coarse_tokens(self.vqvae, smooth, self.determined, smooth_latents)
        return KnownRegion(self.vqvae, latents.float(), known_pixels, hint_ids).token_ids

    def finished(self) -> torch.Tensor:
        """The large images, `(batch, 3, height, width)` in [-1, 1]; a warning where they are not consistent."""
        large = self.pixels[..., : self.full_size[0], : self.full_size[1]]
        if self.consistent:
            large, errors = project_to_low_resolution(large, self.small)
            left = errors.amax().item() * 127.5
            if left > 1:
                logger.warning(
                    f"Made small again, the result differs from `image` by up to {left:.0f} of 255: no picture gives"
                    " contrasts as high as these when it is made small. The result comes as near as it can."
                )
        return large


class SuperResolutionPipeline(ScalePipeline):
    r"""
    Base of the pipelines that enlarge images without fine-tuning: the coarse scales that the small image determines
    are forced, the finer ones drawn (paper, Section 4.3).
    """

    def num_determined_scales(self, scale_factor: int) -> int:
        """
        How many scales an image that is `scale_factor` times smaller determines: those whose tokens cover 2 x 2 of its
        pixels each, or more; at least one is left to be drawn.
        """
        height, width = self.sample_size
        fitting = [
            size
            for size in self.scheduler.scales
            if 2 * size[0] <= height / scale_factor and 2 * size[1] <= width / scale_factor
        ]
        return min(max(len(fitting), 1), len(self.scheduler.scales) - 1)

    def prepare_canvas(
        self,
        encode: Callable[[], Conditions],
        image: Pictures,
        scale_factor: int,
        num_known_scales: int | None,
        consistent: bool,
        num_images_per_prompt: int,
        output_type: str,
    ) -> tuple[Conditions, EnlargedCanvas]:
        """
        What to draw, and what it is drawn on. Arguments are those of [`SRDDSuperResolutionPipeline`].

        Args:
            encode (`Callable`): Says what to draw. It is called when all that needs no model has been checked.

        Raises:
            ValueError: If an argument does not fit.
        """
        check_bool("consistent", consistent)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt' in super-resolution, got 'latent'.")
        scale_factor, num_scales = check_int("scale_factor", scale_factor, 2, MAX_SIDE), len(self.scheduler.scales)
        if num_known_scales is None:
            num_known_scales = self.num_determined_scales(scale_factor)
        num_known_scales = check_int("num_known_scales", num_known_scales, 0, num_scales)
        small = self.prepare_pixels(image)
        conditions, small = self.prepare_batch(encode(), num_images_per_prompt, small)
        if max(small.shape[-2:]) * scale_factor > MAX_SIDE:
            raise ValueError(
                f"`scale_factor` must give results of at most {MAX_SIDE} pixels a side, got {scale_factor} for"
                f" {small.shape[-2]}x{small.shape[-1]} pixels."
            )
        determined = self.scheduler.scales[:num_known_scales]
        return conditions, EnlargedCanvas(self.vqvae, small, scale_factor, self.sample_size, determined, consistent)

    def enlarge_with(
        self, encode: Callable[[], Conditions], *told: Any, options: CallOptions
    ) -> SRDDPipelineOutput | tuple:
        """
        Enlarge images.

        Args:
            encode (`Callable`): As in `prepare_canvas`, as are `told`: image, scale factor and what follows.
            options ([`CallOptions`]): What every call may be told.

        Raises:
            ValueError: If an argument does not fit.
        """
        self.check_inputs(*options)
        conditions, canvas = self.prepare_canvas(encode, *told, options.num_images_per_prompt, options.output_type)
        token_ids = draw_windows(self, canvas, conditions, canvas.known_tokens, **options.of_draw)
        images = self.image_processor.postprocess(canvas.finished(), output_type=options.output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if options.return_dict else (images, token_ids)
