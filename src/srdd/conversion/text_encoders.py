"""Text encoders for pipelines that draw from texts; the authors of such weights publish none of their own."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from srdd.checks import shown
from srdd.models.saved_weights import check_finite_weights


# Components of a pipeline, which are subfolders as in SDXL's repositories: an encoder and its tokenizer.
PAIRS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))

RULE = (
    f"`text_encoders` must be a folder or a repository of the Hub with CLIP's text encoders and tokenizers in"
    f" {', '.join(name for pair in PAIRS for name in pair)}, as SDXL's have them, got"
)


def load_text_encoders(source: str | os.PathLike, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """
    Text encoders and tokenizers for a [`SRDDTextPipeline`].

    Args:
        source (`str` or `os.PathLike`): A folder or a repository of the Hub in the layout of SDXL's, with subfolders
            `text_encoder`, `tokenizer`, `text_encoder_2` and `tokenizer_2`. That of SDXL,
            "stabilityai/stable-diffusion-xl-base-1.0", has the encoders of Switti.
        dtype (`torch.dtype`, *optional*): The encoders' dtype; that of the files by default.

    Returns:
        `dict[str, Any]`: The components by these names.

    Raises:
        ValueError: If something is not there, cannot be read, lacks tensors, has numbers that are not finite, or an
            encoder and its tokenizer do not fit.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{RULE} {shown(source)}.")
    components: dict[str, Any] = {}
    for encoder_name, tokenizer_name in PAIRS:
        encoder = _load(CLIPTextModel, source, encoder_name, output_loading_info=True)
        tokenizer = _load(CLIPTokenizer, source, tokenizer_name)
        check_finite_weights(encoder, "text_encoders", f"{source}")
        if len(tokenizer) != encoder.config.vocab_size:
            raise ValueError(
                f"{RULE} {source}, where {encoder_name} knows {encoder.config.vocab_size} tokens and {tokenizer_name}"
                f" {len(tokenizer)}."
            )
        components |= {encoder_name: encoder.to(dtype) if dtype else encoder, tokenizer_name: tokenizer}
    return components


def _load(kind: type, source: str | os.PathLike, name: str, **options: Any) -> Any:
    if Path(source).exists() and not Path(source, name).is_dir():
        raise ValueError(f"{RULE} {source}, where {name} is missing.")
    try:
        loaded = kind.from_pretrained(source, subfolder=name, **options)
    except Exception as error:  # whatever files of another kind, or a network, lead transformers to
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{RULE} {source}, where {name} cannot be read: {reason}.") from error
    if not options:
        return loaded
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{RULE} {source}, where {name} lacks {shown(sorted(report['missing_keys']))}.")
    return model.eval()
