"""Drawing a part of an image anew, whatever says what to draw."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from srdd.area_means import area_means
from srdd.checks import check_bool, check_int, check_number
from srdd.pictures import Pictures, read_masks
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.known_region import KnownRegion, coarse_tokens, extend_known
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pixel_regions import Hole, check_padding, crop_box, paste, resize
from srdd.pipelines.scale_pipeline import MAX_SIDE, CallOptions, ScalePipeline
from srdd.pipelines.scale_sampling import KnownTokens
from srdd.pipelines.windowed_canvas import Window, WindowedCanvas, draw_windows


# Widest edge over which results fade in, in pixels.
MAX_FEATHER = 1024


class InpaintPipeline(ScalePipeline):
    r"""
    Base of the pipelines that draw a part of an image anew, without fine-tuning: inpainting, outpainting and editing.

    Scale by scale, tokens of known cells are forced and the others drawn (paper, Section 4.3). Any mask, any attention
    pattern, any schedule and resampling policy. Nothing of the unknown pixels reaches the result.
    """

    def prepare_images(self, image: Pictures, mask_image: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Images and masks as tensors of one batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Pixels in [-1, 1] of shape `(batch, 3, height, width)`, and masks in
            [0, 1] of shape `(batch, 1, height, width)`, 1 where to draw.

        Raises:
            ValueError: If images differ in size, the numbers of images and masks do not match, or masks have values
                outside [0, 1].
        """
        pixels = self.prepare_pixels(image)
        mask = read_masks("mask_image", mask_image).to(self._execution_device)
        if len(mask) not in (1, len(pixels)):
            raise ValueError(f"`mask_image` must hold 1 or {len(pixels)} masks, got {len(mask)}.")
        (height, width), (mask_height, mask_width) = pixels.shape[-2:], mask.shape[-2:]
        # Both sides may have been rounded by half a pixel when the mask was scaled.
        if abs(mask_height * width - height * mask_width) >= (height + width) / 2:
            raise ValueError(
                f"`mask_image` must have the proportions of `image`, {height} to {width} (height to width), got"
                f" {mask_height} to {mask_width}."
            )
        if mask.shape[-2:] != pixels.shape[-2:]:
            mask = F.interpolate(mask, size=pixels.shape[-2:], mode="bilinear", antialias=True).clamp(0, 1)
        return pixels, mask.expand(len(pixels), -1, -1, -1)

    def prepare_known(self, pixels: torch.Tensor, mask: torch.Tensor, strength: float = 1.0) -> KnownRegion:
        """
        What is known of a batch of images of any size.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in [-1, 1].
            mask (`torch.Tensor` of shape `(batch, 1, height, width)`): Masks in [0, 1], 1 where to draw.
            strength (`float`, defaults to 1.0): Share of the scales to draw inside the mask.
        """
        known_pixels = (mask < 0.5).float()
        filled = resize(extend_known(pixels, known_pixels), self.sample_size)
        # A pixel of the model is known if all pixels that it stands for are.
        known_pixels = (area_means(known_pixels, self.sample_size) > 1 - 1e-4).float()
        latents = self.vqvae.encode(filled.to(self.vqvae.dtype)).latents.float()
        hinted = self.scheduler.scales[: round((1 - strength) * len(self.scheduler.scales))]
        return KnownRegion(
            self.vqvae, latents, known_pixels, coarse_tokens(self.vqvae, resize(pixels, self.sample_size), hinted)
        )

    def prepare_hole(
        self,
        encode: Callable[[], Conditions],
        image: Pictures,
        mask_image: Pictures,
        strength: float,
        padding_mask_crop: int | None,
        paste_known: bool,
        feather: int,
        num_images_per_prompt: int,
    ) -> tuple[Conditions, Hole, KnownTokens]:
        """
        What to draw, where, and what is known there. Arguments are those of [`SRDDInpaintPipeline`].

        Args:
            encode (`Callable`): Says what to draw. It is called when all that needs no model has been checked.

        Raises:
            ValueError: If an argument does not fit.
        """
        check_number("strength", strength, 0, 1)
        check_bool("paste_known", paste_known)
        feather = check_int("feather", feather, 0, MAX_FEATHER)
        if padding_mask_crop is not None:
            padding_mask_crop = check_int("padding_mask_crop", padding_mask_crop, 0, MAX_SIDE)
        pixels, mask = self.prepare_images(image, mask_image)
        conditions, pixels, mask = self.prepare_batch(encode(), num_images_per_prompt, pixels, mask)
        box = (slice(None), slice(None))
        if padding_mask_crop is not None:
            box = crop_box(mask, padding_mask_crop, self.sample_size)
        hole = Hole(pixels, mask, box, paste_known, feather)
        return conditions, hole, self.prepare_known(*hole.surroundings, strength).token_ids

    def inpaint_with(
        self, encode: Callable[[], Conditions], *told: Any, options: CallOptions
    ) -> SRDDPipelineOutput | tuple:
        """
        Draw the masked part of images.

        Args:
            encode (`Callable`): As in `prepare_hole`, as are `told`: image, mask, strength and what follows.
            options ([`CallOptions`]): What every call may be told.

        Raises:
            ValueError: If an argument does not fit.
        """
        self.check_inputs(*options)
        conditions, hole, known_tokens = self.prepare_hole(encode, *told, options.num_images_per_prompt)
        decodes = options.output_type != "latent"
        images: Any
        images, token_ids = self.draw(conditions, **options.of_draw, known_tokens=known_tokens, decodes=decodes)
        if decodes:
            images = self.image_processor.postprocess(hole.filled(images), output_type=options.output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if options.return_dict else (images, token_ids)

    def outpaint_with(
        self,
        encode: Callable[[], Conditions],
        image: Pictures,
        padding: int | tuple[int, int, int, int],
        feather: int,
        options: CallOptions,
    ) -> SRDDPipelineOutput | tuple:
        """
        Continue images beyond their borders. Arguments are those of [`SRDDInpaintPipeline`]'s `outpaint`.

        Args:
            encode (`Callable`): Says what to draw. It is called when all that needs no model has been checked.

        Raises:
            ValueError: If an argument does not fit.
        """
        left, top, right, bottom = check_padding(padding, MAX_SIDE)
        self.check_inputs(*options)
        feather = check_int("feather", feather, 0, MAX_FEATHER)
        if options.output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt' in outpainting, got 'latent'.")
        pixels = self.prepare_pixels(image)
        height, width = pixels.shape[-2] + top + bottom, pixels.shape[-1] + left + right
        if max(height, width) > MAX_SIDE:
            raise ValueError(
                f"`padding` must give a canvas of at most {MAX_SIDE} pixels a side, got {padding!r} for"
                f" {pixels.shape[-2]}x{pixels.shape[-1]} pixels."
            )
        border = (left, right, top, bottom)
        mask = F.pad(torch.zeros_like(pixels[:, :1]), border, value=1.0)
        pixels = F.pad(pixels, border)
        conditions, pixels, mask = self.prepare_batch(encode(), options.num_images_per_prompt, pixels, mask)
        full_size = tuple(pixels.shape[-2:])
        size = tuple(max(side, least) for side, least in zip(full_size, self.sample_size))
        known_pixels = 1 - F.interpolate(mask, size=size, mode="nearest")
        canvas = WindowedCanvas(resize(extend_known(pixels, 1 - mask), size), known_pixels, self.sample_size)

        def known_tokens(window: Window) -> KnownTokens:
            place = (..., *window)
            return self.prepare_known(canvas.pixels[place], 1 - canvas.known_pixels[place]).token_ids

        token_ids = draw_windows(self, canvas, conditions, known_tokens, **options.of_draw)
        result = paste(pixels, mask, resize(canvas.drawn_pixels, full_size), feather)
        images = self.image_processor.postprocess(result, output_type=options.output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if options.return_dict else (images, token_ids)
