"""What the pipelines that draw from texts share: text encoders, and what they make of texts."""

from typing import Any

import torch
from diffusers.utils import logging
from transformers import BatchEncoding, CLIPTextModel, CLIPTokenizer

from srdd.checks import described, shown
from srdd.models import MultiScaleVQModel, ScaleTextTransformer2DModel
from srdd.pipelines.conditions import Conditions, text_conditions
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.schedulers import ScaleScheduler


logger = logging.get_logger(__name__)


class TextPipeline(ScalePipeline):
    r"""
    Base of the pipelines that draw from texts. Its components are those of [`SRDDTextPipeline`].
    """

    transformer: ScaleTextTransformer2DModel

    _told_by = "`prompt` or `prompt_embeds`", "texts"
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

    def texts_to_encode(
        self, prefix: str, texts: str | list[str] | None, given: tuple[torch.Tensor | None, ...]
    ) -> list[str] | None:
        """
        One half's texts, or `None` where there is nothing to encode.

        Args:
            prefix (`str`): What names of arguments start with.
            texts (`str` or `list[str]`, *optional*): The prompt. A negative one may be left out: it is the empty text
                then, where texts can be encoded.
            given (`tuple`): States, pooled output and mask that were given in its place, `None` where they were not.

        Raises:
            ValueError: If there are both, or neither where there must be one, or texts that cannot be encoded.
        """
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        names = [f"`{prefix}{name}`" for name, tensor in zip(names, given) if tensor is not None]
        if texts is not None and names:
            raise ValueError(f"`{prefix}prompt` must be left out with {', '.join(names)}.")
        if texts is None and prefix and self.encodes_texts:
            texts = ""
        return None if names or (texts is None and prefix) else self.check_texts(f"{prefix}prompt", texts)

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
        given = prompt_embeds, pooled_prompt_embeds, prompt_attention_mask
        negative = negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask
        texts = self.texts_to_encode("", prompt, given)
        negative_texts = self.texts_to_encode("negative_", negative_prompt, negative)
        if texts is not None:
            prompt_embeds, pooled_prompt_embeds, prompt_attention_mask = self.encode_texts(texts)
        if negative_texts is not None:
            negative = self.encode_texts(negative_texts)
            negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask = negative
        return (
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )

    def encode_conditions(self, *prompts: Any) -> Conditions:
        """
        What the transformer is told of prompts: the arguments of `encode_prompt`, in its order.

        Raises:
            ValueError: If components or embeddings do not fit, or as `encode_prompt`.
        """
        self.check_text_components()
        encoded, config = self.encode_prompt(*prompts), self.transformer.config
        conditions = text_conditions(*encoded, device=self._execution_device)
        names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        widths = *(config.cross_attention_dim,) * 2, *(config.pooled_projection_dim,) * 2
        for name, tensor, width in zip(names, encoded, widths):
            if tensor is not None and tensor.shape[-1] != width:
                raise ValueError(f"`{name}` must have {width} channels, got {described(tensor)}.")
        return conditions
