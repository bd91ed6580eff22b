from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from srdd.checks import check_bool, check_int
from srdd.pictures import Pictures
from srdd.pipelines import scale_pipeline  # by module: as a `custom_pipeline` this file may hold one pipeline only
from srdd.pipelines.known_region import KnownRegion, coarse_tokens
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pixel_regions import project_to_low_resolution, resize
from srdd.pipelines.scale_pipeline import MAX_SIDE
from srdd.pipelines.windowed_canvas import Window, WindowedCanvas


logger = logging.get_logger(__name__)


class SRDDSuperResolutionPipeline(scale_pipeline.ClassPipeline):
    r"""
    Enlarges images without fine-tuning: the coarse scales that the small image determines are forced, the finer ones
    drawn (paper, Section 4.3).

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.

    Example:

    ```py
    >>> import torch
    >>> from PIL import Image
    >>> from srdd import SRDDSuperResolutionPipeline

    >>> pipe = SRDDSuperResolutionPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> small = Image.open("tomato.png").resize((16, 16))
    >>> large = pipe(small, scale_factor=4, class_labels="Tomato 2").images[0]
    ```
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

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        scale_factor: int = 4,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        num_known_scales: int | None = None,
        consistent: bool = True,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDSuperResolutionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Enlarge images.

        A result of the model's size is drawn in one go; a larger one in windows that overlap by half and fade into
        each other, each taking what was drawn before as known. A smaller one is cut from a continued image.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind):
                Small images of any one size, read by [`~srdd.pictures.read_pictures`].
            scale_factor (`int`, defaults to 4): How many times larger the result is.
            class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*): Classes, one for all images
                or one each. `None` draws without a class.
            num_known_scales (`int`, *optional*): How many scales the small image determines, coarse to fine; by
                default those whose tokens cover 2 x 2 of its pixels or more ([`num_determined_scales`]).
            consistent (`bool`, defaults to `True`): Change the result as little as possible so that, made small again
                (bicubic, antialiased), it is the given image. Where contrasts are so high that no image is that, it
                comes as near as it can, and a warning says how near.
            guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
            num_images_per_prompt (`int`, defaults to 1): Results for each image.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness; one, or one for each
                result.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1]).
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If images, labels or another argument do not fit.
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
        check_bool("consistent", consistent)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt' in super-resolution, got 'latent'.")
        scale_factor, num_scales = check_int("scale_factor", scale_factor, 2, MAX_SIDE), len(self.scheduler.scales)
        if num_known_scales is None:
            num_known_scales = self.num_determined_scales(scale_factor)
        num_known_scales = check_int("num_known_scales", num_known_scales, 0, num_scales)
        small = self.prepare_pixels(image)
        conditions, small = self.prepare_batch(class_labels, num_images_per_prompt, small)
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
            return self.draw(
                conditions,
                guidance_scale=guidance_scale,
                generator=generator,
                known_tokens=region.token_ids,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                progress_bar=progress_bar,
            )

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
        images = self.image_processor.postprocess(large, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
