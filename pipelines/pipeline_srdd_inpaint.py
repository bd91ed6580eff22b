from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from srdd.area_means import area_means
from srdd.checks import check_bool, check_int, check_number
from srdd.pictures import Pictures, read_masks
from srdd.pipelines import scale_pipeline  # by module: as a `custom_pipeline` this file may hold one pipeline only
from srdd.pipelines.known_region import KnownRegion, coarse_tokens, extend_known
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pixel_regions import check_padding, crop_box, paste, resize
from srdd.pipelines.windowed_canvas import Window, WindowedCanvas


# Widest edge over which results fade in, in pixels.
MAX_FEATHER = 1024


class SRDDInpaintPipeline(scale_pipeline.ClassPipeline):
    r"""
    Draws a part of an image anew, without fine-tuning: inpainting, outpainting and editing by class.

    Scale by scale, tokens of known cells are forced and the others drawn (paper, Section 4.3). Any mask, any attention
    pattern, any schedule and resampling policy. Nothing of the unknown pixels reaches the result.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.

    Example:

    ```py
    >>> import torch
    >>> from PIL import Image
    >>> from srdd import SRDDInpaintPipeline

    >>> pipe = SRDDInpaintPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> image = Image.open("tomato.png")
    >>> mask = Image.new("L", image.size)
    >>> mask.paste(255, (16, 16, 48, 48))
    >>> edited = pipe(image, mask, "Tomato 2", generator=torch.Generator().manual_seed(0)).images[0]
    ```
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

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        mask_image: Pictures,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste_known: bool = True,
        feather: int = 2,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDInpaintPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Draw the masked part of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind):
                Images of any one size, read by [`~srdd.pictures.read_pictures`]: as one sees them, arrays and tensors
                being floats in [0, 1] or integers of 8 or 16 bits.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind):
                Masks of any shape, with the proportions of the images, one for all or one each: white (1) is drawn,
                black (0) is kept.
                Grey is a soft edge: tokens are drawn from 0.5 on, and the mask blends the result into the image.
            class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*):
                Classes of the result, one for all images or one each (or several for one image); another class than
                the image's own edits it. `None` draws without a class.
            strength (`float`, defaults to 1.0):
                As in diffusers, how much the masked part changes: at 1 nothing of it is looked at, below that the
                coarsest `1 - strength` of the scales keep the tokens of the image as hints of colour and layout.
            padding_mask_crop (`int`, *optional*):
                Work on the surroundings of the mask only, with this margin in pixels, at the model's full resolution.
            guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
            num_images_per_prompt (`int`, defaults to 1): Results for each pair of image and label.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness; one, or one for each
                result.
            paste_known (`bool`, defaults to `True`): Lay the known pixels over the result, so that they come back
                exactly; `False` gives the plain decoding.
            feather (`int`, defaults to 2): Pixels over which the result fades in inside a hard mask.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1], all of the image's size) or
                "latent".
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`.

        Raises:
            ValueError: If images, masks, labels or another argument do not fit.
        """
        self.check_inputs(
            guidance_scale,
            num_images_per_prompt,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        check_number("strength", strength, 0, 1)
        check_bool("paste_known", paste_known)
        feather = check_int("feather", feather, 0, MAX_FEATHER)
        if padding_mask_crop is not None:
            padding_mask_crop = check_int("padding_mask_crop", padding_mask_crop, 0, scale_pipeline.MAX_SIDE)
        pixels, mask = self.prepare_images(image, mask_image)
        conditions, pixels, mask = self.prepare_batch(class_labels, num_images_per_prompt, pixels, mask)
        box = (..., slice(None), slice(None))
        if padding_mask_crop is not None:
            box = (..., *crop_box(mask, padding_mask_crop, self.sample_size))
        region, hole = pixels[box], mask[box]
        decodes = output_type != "latent"
        images: Any
        images, token_ids = self.draw(
            conditions,
            guidance_scale=guidance_scale,
            generator=generator,
            known_tokens=self.prepare_known(region, hole, strength).token_ids,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            decodes=decodes,
        )
        if decodes:
            result = resize(images, region.shape[-2:])
            if paste_known:
                result = paste(region, hole, result, feather)
            whole = pixels.clone()
            whole[box] = result
            images = self.image_processor.postprocess(whole, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)

    @torch.no_grad()
    def outpaint(
        self,
        image: Pictures,
        padding: int | tuple[int, int, int, int],
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        feather: int = 2,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Continue images beyond their borders.

        A canvas as high and wide as the model's images, or more, is drawn in windows that overlap by half and fade
        into each other; each takes what was drawn before as known. A canvas that is lower or narrower is scaled to the
        model's size, as in inpainting.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind): Images of one size.
            padding (`int` or `(int, int, int, int)`): Pixels to add on all sides, or left, top, right and bottom.
            class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*): Classes of the results.
            guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
            num_images_per_prompt (`int`, defaults to 1): Results for each pair of image and label.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness.
            feather (`int`, defaults to 2): As in the call.
            output_type (`str`, defaults to `"pil"`): "pil", "np" or "pt".
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If `padding` is not one or four numbers, none negative and not all zero, or another argument
                does not fit.
        """
        left, top, right, bottom = check_padding(padding, scale_pipeline.MAX_SIDE)
        self.check_inputs(guidance_scale, num_images_per_prompt, generator, output_type, return_dict)
        feather = check_int("feather", feather, 0, MAX_FEATHER)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt' in outpainting, got 'latent'.")
        pixels = self.prepare_pixels(image)
        height, width = pixels.shape[-2] + top + bottom, pixels.shape[-1] + left + right
        if max(height, width) > scale_pipeline.MAX_SIDE:
            raise ValueError(
                f"`padding` must give a canvas of at most {scale_pipeline.MAX_SIDE} pixels a side, got {padding!r} for"
                f" {pixels.shape[-2]}x{pixels.shape[-1]} pixels."
            )
        border = (left, right, top, bottom)
        mask = F.pad(torch.zeros_like(pixels[:, :1]), border, value=1.0)
        conditions, pixels, mask = self.prepare_batch(class_labels, num_images_per_prompt, F.pad(pixels, border), mask)
        full_size = tuple(pixels.shape[-2:])
        size = tuple(max(side, least) for side, least in zip(full_size, self.sample_size))
        known_pixels = 1 - F.interpolate(mask, size=size, mode="nearest")
        canvas = WindowedCanvas(resize(extend_known(pixels, 1 - mask), size), known_pixels, self.sample_size)

        def draw_window(window: Window) -> tuple[torch.Tensor, torch.LongTensor]:
            place = (..., *window)
            region = self.prepare_known(canvas.pixels[place], 1 - canvas.known_pixels[place])
            return self.draw(
                conditions, guidance_scale, generator, known_tokens=region.token_ids, progress_bar=progress_bar
            )

        with self.progress_bar(total=canvas.num_windows * self.num_timesteps) as progress_bar:
            token_ids = canvas.fill(draw_window)
            progress_bar.update(progress_bar.total - progress_bar.n)
        result = paste(pixels, mask, resize(canvas.drawn_pixels, full_size), feather)
        images = self.image_processor.postprocess(result, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
