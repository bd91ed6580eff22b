"""Enlarging images, whatever says what to draw."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from srdd.checks import check_bool, check_int
from srdd.pictures import Pictures
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.known_region import KnownRegion, coarse_tokens
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pixel_regions import project_to_low_resolution, resize
from srdd.pipelines.scale_pipeline import MAX_SIDE, CallOptions, ScalePipeline
from srdd.pipelines.windowed_canvas import Window, WindowedCanvas


logger = logging.get_logger(__name__)


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

    def enlarge_with(
        self,
        encode: Callable[[], Conditions],
        image: Pictures,
        scale_factor: int,
        num_known_scales: int | None,
        consistent: bool,
        options: CallOptions,
    ) -> SRDDPipelineOutput | tuple:
        """
        Enlarge images. Arguments are those of [`SRDDSuperResolutionPipeline`].

        Args:
            encode (`Callable`): Says what to draw. It is called when all that needs no model has been checked.

        Raises:
            ValueError: If an argument does not fit.
        """
        self.check_inputs(*options)
        check_bool("consistent", consistent)
        if options.output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt' in super-resolution, got 'latent'.")
        scale_factor, num_scales = check_int("scale_factor", scale_factor, 2, MAX_SIDE), len(self.scheduler.scales)
        if num_known_scales is None:
            num_known_scales = self.num_determined_scales(scale_factor)
        num_known_scales = check_int("num_known_scales", num_known_scales, 0, num_scales)
        small = self.prepare_pixels(image)
        conditions, small = self.prepare_batch(encode(), options.num_images_per_prompt, small)
        size = [side * scale_factor for side in small.shape[-2:]]
        if max(size) > MAX_SIDE:
            raise ValueError(
                f"`scale_factor` must give results of at most {MAX_SIDE} pixels a side, got {scale_factor} for"
                f" {small.shape[-2]}x{small.shape[-1]} pixels."
            )
        smooth = resize(small, size)
        missing = [max(0, least - side) for least, side in zip(self.sample_size, size)]
        smooth = F.pad(smooth, (0, missing[1], 0, missing[0]), mode="replicate")
        canvas = WindowedCanvas(smooth, torch.zeros_like(smooth[:, :1]), self.sample_size)
        determined = self.scheduler.scales[:num_known_scales]

        def draw_window(window: Window) -> tuple[torch.Tensor, torch.LongTensor]:
            place = (..., *window)
            filled = torch.where(canvas.known_pixels[place] > 0, canvas.pixels[place], smooth[place])
            region = KnownRegion(
                self.vqvae,
                self.vqvae.encode(filled.to(self.vqvae.dtype)).latents.float(),
                canvas.known_pixels[place],
                coarse_tokens(self.vqvae, smooth[place], determined),
            )
            known_tokens = region.token_ids
            return self.draw(conditions, **options.of_draw, known_tokens=known_tokens, progress_bar=progress_bar)

        with self.progress_bar(total=canvas.num_windows * self.num_timesteps) as progress_bar:
            token_ids = canvas.fill(draw_window, lambda: self.interrupt)
            progress_bar.update(progress_bar.total - progress_bar.n)
        large = canvas.pixels[..., : size[0], : size[1]]
        if consistent:
            large, errors = project_to_low_resolution(large, small)
            left = errors.amax().item() * 127.5
            if left > 1:
                logger.warning(
                    f"Made small again, the result differs from `image` by up to {left:.0f} of 255: no picture gives"
                    " contrasts as high as these when it is made small. The result comes as near as it can."
                )
        images = self.image_processor.postprocess(large, output_type=options.output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if options.return_dict else (images, token_ids)
