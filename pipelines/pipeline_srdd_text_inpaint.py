from collections.abc import Callable
from functools import partial

import torch

from srdd.pictures import Pictures
from srdd.pipelines import inpaint_pipeline, text_pipeline  # by module: a `custom_pipeline` file may hold one only
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws
from srdd.pipelines.scale_pipeline import CallOptions


class SRDDTextInpaintPipeline(inpaint_pipeline.InpaintPipeline, text_pipeline.TextPipeline):
    r"""
    Draws a part of an image anew from a text, without fine-tuning: inpainting, outpainting and editing by text.

    It works as [`SRDDInpaintPipeline`] does, with the components of [`SRDDTextPipeline`]. Nothing of the unknown
    pixels reaches the result.
    """

    @draws
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        paste_known: bool = True,
        feather: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDTextInpaintPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Draw the masked part of images. Arguments that are not listed are those of [`SRDDTextPipeline`].

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts of the results, one for all images or one each (or several
                for one image).
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind, *optional*):
                Images, as in [`SRDDInpaintPipeline`]. Never left out, as `mask_image` is not.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind, *optional*):
                Masks, one for all images or one each: white (1) is drawn, black (0) is kept, grey is a soft edge.
            padding_mask_crop (`int`, *optional*): As in [`SRDDInpaintPipeline`]: work on the mask's surroundings only.
            strength (`float`, defaults to 1.0): As in [`SRDDInpaintPipeline`]: how much the masked part changes.
            negative_prompt (`str` or `list[str]`, *optional*):
                Texts to guide away from, one for all texts or one for each; the empty text by default.
            num_images_per_prompt (`int`, defaults to 1): Results for each pair of image and text.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness; one, or one for each
                result.
            paste_known (`bool`, defaults to `True`): Lay the known pixels over the result, so that they come back
                exactly; `False` gives the plain decoding.
            feather (`int`, defaults to 4): Pixels over which the result fades in inside a hard mask.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1], all of the image's size) or
                "latent".

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`.

        Raises:
            ValueError: If images, masks, texts or another argument do not fit.
        """
        embeds = prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        masks = prompt_attention_mask, negative_prompt_attention_mask
        encode = partial(self.encode_conditions, prompt, negative_prompt, *embeds, *masks)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        told = image, mask_image, strength, padding_mask_crop, paste_known, feather
        return self.inpaint_with(encode, *told, options=options)

    @draws
    @torch.no_grad()
    def outpaint(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        padding: int | tuple[int, int, int, int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        feather: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDTextInpaintPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Continue images beyond their borders, as [`SRDDInpaintPipeline.outpaint`] does. Arguments that are not listed
        are those of the call.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind, *optional*): Images of one
                size. Never left out, as `padding` is not.
            padding (`int` or `(int, int, int, int)`, *optional*): Pixels to add on all sides, or left, top, right and
                bottom.
            output_type (`str`, defaults to `"pil"`): "pil", "np" or "pt".
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`], for every window; ended early, what
                is not drawn yet stays a smooth continuation.

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If `padding` is not one or four numbers, none negative and not all zero, or another argument
                does not fit.
        """
        embeds = prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        masks = prompt_attention_mask, negative_prompt_attention_mask
        encode = partial(self.encode_conditions, prompt, negative_prompt, *embeds, *masks)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        return self.outpaint_with(encode, image, padding, feather, options)
