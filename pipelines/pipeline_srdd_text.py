from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from transformers import BatchEncoding, CLIPTextModel, CLIPTokenizer

from srdd.checks import shown
from srdd.models import MultiScaleVQModel, ScaleTextTransformer2DModel
from srdd.pipelines import scale_pipeline  # by module: as a `custom_pipeline` this file may hold one pipeline only
from srdd.pipelines.conditions import text_conditions
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.schedulers import ScaleScheduler


logger = logging.get_logger(__name__)


class SRDDTextPipeline(scale_pipeline.ScalePipeline):
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

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer"
    _usual_guidance_scale = 7.0  # Switti's
    _optional_components = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]

    def __init__(
        self,
        vqvae: MultiScaleVQModel,
        transformer: ScaleTextTransformer2DModel,
        scheduler: ScaleScheduler,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
    ):
        super().__init__(vqvae, transformer, scheduler)
        self.register_modules(
            text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer_2
        )

    @property
    def encodes_texts(self) -> bool:
        """Whether the pipeline has what it needs to encode texts."""
        return all(getattr(self, name) is not None for name in self._optional_components)

    def check_texts(self, name: str, texts: Any) -> list[str]:
        """
        Texts as a list.

        Raises:
            ValueError: If there are none, they are no strings, or the pipeline cannot encode them.
        """
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(text, str) for text in listed):
            raise ValueError(f"`{name}` must be a text or a list of texts, got {shown(texts)}.")
        if not self.encodes_texts:
            missing = [part for part in self._optional_components if getattr(self, part) is None]
            raise ValueError(f"`{name}` must be given as embeddings to a pipeline without {', '.join(missing)}.")
        return list(listed)

    def check_text_components(self) -> None:
        """
        Make sure that transformer and text encoders belong together.

        Raises:
            ValueError: If the transformer does not draw from texts, or widths differ.
        """
        config = self.transformer.config
        if "cross_attention_dim" not in config:
            raise ValueError(f"`transformer` must draw from texts, got a {type(self.transformer).__name__}.")
        if not self.encodes_texts:
            return
        widths = [encoder.config.hidden_size for encoder in (self.text_encoder, self.text_encoder_2)]
        if (sum(widths), widths[1]) != (config.cross_attention_dim, config.pooled_projection_dim):
            raise ValueError(
                f"`text_encoder` and `text_encoder_2` must have {config.cross_attention_dim} channels together and"
                f" {config.pooled_projection_dim} in the second, got {sum(widths)} and {widths[1]}."
            )

    def tokenize_texts(self, texts: list[str]) -> tuple[list[BatchEncoding], list[str]]:
        """Ids and masks for both encoders, padded to all that these allow, and the texts that are cut for it."""
        tokens, cut = [], []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            whole = tokenizer(texts, verbose=False).input_ids
            cut += [text for text, ids in zip(texts, whole) if len(ids) > length and text not in cut]
            options = {"padding": "max_length", "max_length": length, "truncation": True}
            tokens.append(tokenizer(texts, **options, return_tensors="pt"))
        return tokens, cut

    def encode_tokens(self, tokens: list[BatchEncoding]) -> tuple[torch.Tensor, torch.Tensor, torch.BoolTensor]:
        """What [`encode_texts`] gives, of what [`tokenize_texts`] gave."""
        states = []
        for encoder, each in zip((self.text_encoder, self.text_encoder_2), tokens):
            output = encoder(input_ids=each.input_ids, attention_mask=each.attention_mask)
            states.append(output.last_hidden_state)
        return torch.cat(states, dim=-1), output.pooler_output, each.attention_mask.bool()

    def encode_texts(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.BoolTensor]:
        """
        What the transformer is told of texts: the last states of both encoders side by side, the pooled output of the
        second, and what is no padding for it.

        Texts that are longer than tokenizers and encoders allow are cut, with a warning.
        """
        tokens, cut = self.tokenize_texts(texts)
        if cut:
            logger.warning(f"Texts of more than {tokens[-1].input_ids.shape[1]} tokens are cut: {shown(cut)}.")
        return self.encode_tokens([each.to(self._execution_device) for each in tokens])

    def encode_unless_given(
        self,
        prefix: str,
        texts: str | list[str] | None,
        embeds: torch.Tensor | None,
        pooled_embeds: torch.Tensor | None,
        attention_mask: torch.BoolTensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        States, pooled output and mask of one half's texts: encoded, or what was given in their place.

        Raises:
            ValueError: If there are both, or neither where there must be one. Names of arguments start with `prefix`.
        """
        given = {
            f"{prefix}prompt_embeds": embeds,
            f"{prefix}pooled_prompt_embeds": pooled_embeds,
            f"{prefix}prompt_attention_mask": attention_mask,
        }
        names = [f"`{name}`" for name, tensor in given.items() if tensor is not None]
        if texts is not None and names:
            raise ValueError(f"`{prefix}prompt` must be left out with {', '.join(names)}.")
        if texts is None and prefix and self.encodes_texts:
            texts = ""
        if names or (texts is None and prefix):
            return tuple(given.values())
        return self.encode_texts(self.check_texts(f"{prefix}prompt", texts))

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Encode texts. It needs no other components than text encoders and tokenizers, and what it returns is what
        `__call__` takes by these names.

        Args:
            prompt (`str` or `list[str]`, *optional*): As in `__call__`, as all others are.
            negative_prompt (`str` or `list[str]`, *optional*): The empty text by default, where texts are encoded.
            prompt_embeds (`torch.Tensor`, *optional*): In place of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): In place of `negative_prompt`.
            pooled_prompt_embeds (`torch.Tensor`, *optional*): Belongs to `prompt_embeds`.
            negative_pooled_prompt_embeds (`torch.Tensor`, *optional*): Belongs to `negative_prompt_embeds`.
            prompt_attention_mask (`torch.BoolTensor`, *optional*): Belongs to `prompt_embeds`.
            negative_prompt_attention_mask (`torch.BoolTensor`, *optional*): Belongs to `negative_prompt_embeds`.

        Returns:
            `tuple[torch.Tensor, ...]`: Embeddings of the prompt and the negative one, both pooled, and both masks;
            `None` for a negative prompt that is neither given nor can be encoded.

        Raises:
            ValueError: If a prompt is given twice or not at all, or cannot be encoded.
        """
        prompt_embeds, pooled_prompt_embeds, prompt_attention_mask = self.encode_unless_given(
            "", prompt, prompt_embeds, pooled_prompt_embeds, prompt_attention_mask
        )
        negative = negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask
        negative = self.encode_unless_given("negative_", negative_prompt, *negative)
        negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask = negative
        return (
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )

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
        self.check_text_components()
        encoded = self.encode_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        conditions = text_conditions(*encoded, device=self._execution_device).repeat_interleave(num_images_per_prompt)
        decodes = output_type != "latent"
        images, token_ids = self.draw(conditions, guidance_scale, generator, latents, None, *callback, decodes=decodes)
        if decodes:
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
