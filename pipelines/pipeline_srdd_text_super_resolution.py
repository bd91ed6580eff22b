from collections.abc import Callable
from functools import partial

import torch

from srdd.pictures import Pictures
from srdd.pipelines import super_resolution_pipeline, text_pipeline  # by module: a `custom_pipeline` file holds one
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws
from srdd.pipelines.scale_pipeline import CallOptions


class SRDDTextSuperResolutionPipeline(super_resolution_pipeline.SuperResolutionPipeline, text_pipeline.TextPipeline):
    r"""
    Enlarges images with the help of a text, without fine-tuning: the coarse scales that the small image determines are
    forced, the finer ones drawn (paper, Section 4.3).

    It works as [`SRDDSuperResolutionPipeline`] does, with the components of [`SRDDTextPipeline`].
    """

    @draws
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        scale_factor: int = 4,
        num_known_scales: int | None = None,
        consistent: bool = True,
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
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDTextSuperResolutionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Enlarge images, larger ones than the model's in windows. Arguments that are not listed are those of
        [`SRDDTextPipeline`].

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts, one for all images or one each (or several for one
                image).
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind, *optional*):
                Small images of any one size, read by [`~srdd.pictures.read_pictures`]. Never left out.
            scale_factor (`int`, defaults to 4): How many times larger the result is.
            num_known_scales (`int`, *optional*): How many scales the small image determines, coarse to fine; by
                default those whose tokens cover 2 x 2 of its pixels or more (`num_determined_scales`).
            consistent (`bool`, defaults to `True`): As in [`SRDDSuperResolutionPipeline`]: change the result so that,
                made small again, it is the given image.
            negative_prompt (`str` or `list[str]`, *optional*):
                Texts to guide away from, one for all texts or one for each; the empty text by default.
            num_images_per_prompt (`int`, defaults to 1): Results for each pair of image and text.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness; one, or one for each
                result.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1]).

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If images, texts or another argument do not fit.
        """
        embeds = prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        masks = prompt_attention_mask, negative_prompt_attention_mask
        encode = partial(self.encode_conditions, prompt, negative_prompt, *embeds, *masks)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        return self.enlarge_with(encode, image, scale_factor, num_known_scales, consistent, options=options)
