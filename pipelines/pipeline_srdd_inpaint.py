from collections.abc import Callable, Sequence
from functools import partial

import torch

from srdd.pictures import Pictures
from srdd.pipelines import inpaint_pipeline, scale_pipeline  # by module: a `custom_pipeline` file may hold one only
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws
from srdd.pipelines.scale_pipeline import CallOptions


class SRDDInpaintPipeline(inpaint_pipeline.InpaintPipeline, scale_pipeline.ClassPipeline):
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

    @draws
    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        mask_image: Pictures,
        class_labels: int | str | Sequence[int | str] | torch.LongTensor | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste_known: bool = True,
        feather: int = 4,
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
            feather (`int`, defaults to 4): Pixels over which the result fades in inside a hard mask.
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
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        encode = partial(self.encode_class_labels, class_labels)
        told = image, mask_image, strength, padding_mask_crop, paste_known, feather
        return self.inpaint_with(encode, *told, options=options)

    @draws
    @torch.no_grad()
    def outpaint(
        self,
        image: Pictures,
        padding: int | tuple[int, int, int, int],
        class_labels: int | str | Sequence[int | str] | torch.LongTensor | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        feather: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDInpaintPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
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
            feather (`int`, defaults to 4): As in the call.
            output_type (`str`, defaults to `"pil"`): "pil", "np" or "pt".
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`], for every window; ended early, what
                is not drawn yet stays a smooth continuation.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If `padding` is not one or four numbers, none negative and not all zero, or another argument
                does not fit.
        """
        encode = partial(self.encode_class_labels, class_labels)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        return self.outpaint_with(encode, image, padding, feather, options)
