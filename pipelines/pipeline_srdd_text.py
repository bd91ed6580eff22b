from collections.abc import Callable

import torch

from srdd.pipelines import text_pipeline  # by module: as a `custom_pipeline` this file may hold one pipeline only
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws


class SRDDTextPipeline(text_pipeline.TextPipeline):
    r"""
    Draws images from texts, scale by scale, coarse to fine, as a discrete diffusion.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTextTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it
            and a text.
        scheduler ([`ScaleScheduler`]): The scale schedule.
        text_encoder (`CLIPTextModel`, *optional*): The first text encoder; without both, texts come as embeddings.
        text_encoder_2 (`CLIPTextModel`, *optional*): The second one, whose pooled output is used, too.
        tokenizer (`CLIPTokenizer`, *optional*): The first encoder's tokenizer.
        tokenizer_2 (`CLIPTokenizer`, *optional*): The second encoder's tokenizer, which says what is padding.
    """

    @draws
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDTextPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts to draw; one image each.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance, as in [`SRDDPipeline`]; 1 and below is off. By default that of the
                scheduler's config, or 7 if it has none; 1 with a guidance-distilled transformer.
            negative_prompt (`str` or `list[str]`, *optional*):
                Texts to guide away from, one for all images or one for each; the empty text by default.
            num_images_per_prompt (`int`, defaults to 1): Images per text.
            generator (`torch.Generator` or a list, *optional*): As in [`SRDDPipeline`].
            latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`, *optional*):
                Latent state that the drawn scales are added to; zeros by default.
            prompt_embeds (`torch.Tensor` of shape `(batch, num_text_tokens, cross_attention_dim)`, *optional*):
                States of the texts' tokens, in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                The same of the texts to guide away from, of a batch of 1 or as many; without text encoders there is no
                guidance if it is left out.
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch, pooled_projection_dim)`, *optional*):
                Pooled texts; they belong to `prompt_embeds`.
            negative_pooled_prompt_embeds (`torch.Tensor`, *optional*): They belong to `negative_prompt_embeds`.
            prompt_attention_mask (`torch.BoolTensor` of shape `(batch, num_text_tokens)`, *optional*):
                False where `prompt_embeds` are padding; nowhere by default.
            negative_prompt_attention_mask (`torch.BoolTensor`, *optional*): The same of `negative_prompt_embeds`.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`.

        Raises:
            ValueError: If an argument, what a callback returns, or the schedule does not fit.
        """
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        self.check_inputs(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        embeds = prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        masks = prompt_attention_mask, negative_prompt_attention_mask
        conditions = self.encode_conditions(prompt, negative_prompt, *embeds, *masks)
        conditions = conditions.repeat_interleave(num_images_per_prompt)
        decodes = output_type != "latent"
        images, token_ids = self.draw(conditions, guidance_scale, generator, latents, None, *callback, decodes=decodes)
        if decodes:
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
