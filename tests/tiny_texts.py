"""Real text encoders and tokenizers, small enough for tests: letters are tokens, and texts have 9 of them at most."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tiny_models import POOLED_DIM, TEXT_DIM, tiny_scheduler, tiny_text_transformer, tiny_vqvae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from srdd import SRDDTextPipeline


MAX_LENGTH = 9
LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "!", START, END]

# Components of a pipeline that cannot encode texts.
WITHOUT_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))

# What `encode_prompt` returns, by the names that a call takes it by.
ENCODED = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
)


@cache
def tiny_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    with TemporaryDirectory() as folder:
        contents = {
            "vocab.json": json.dumps({token: index for index, token in enumerate(VOCABULARY)}),
            "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": json.dumps({**special, "model_max_length": MAX_LENGTH}),
        }
        for name, content in contents.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def tiny_text_encoder(width: int, seed: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=8, projection_dim=width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=MAX_LENGTH, bos_token_id=VOCABULARY.index(START),
        eos_token_id=VOCABULARY.index(END), pad_token_id=VOCABULARY.index("!"),
    )  # fmt: skip
    model, generator = CLIPTextModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = float("norm" in name and name.endswith("weight"))
            parameter.copy_(gain + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_text_pipeline(attention_pattern: str = "markov", **components: Any) -> SRDDTextPipeline:
    """A pipeline of tiny components, without a progress bar; `components` replace some."""
    own = {
        "vqvae": tiny_vqvae(),
        "transformer": tiny_text_transformer(attention_pattern),
        "scheduler": tiny_scheduler(),
        "text_encoder": tiny_text_encoder(TEXT_DIM - POOLED_DIM, seed=3),
        "text_encoder_2": tiny_text_encoder(POOLED_DIM, seed=4),
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer("!"),
    }
    pipe = SRDDTextPipeline(**{**own, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe
