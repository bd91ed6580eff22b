import argparse
from pathlib import Path

import torch

from srdd.console import write_text
from srdd.conversion.converted_card import converted_card
from srdd.conversion.families import FAMILIES
from srdd.conversion.official_checkpoints import Converted, convert
from srdd.models import ATTENTION_PATTERNS
from srdd.pipelines.model_folders import CARD
from srdd.whole_folders import is_free, whole_folder


# Bounds what older versions of safetensors copy while they write.
MAX_SHARD_SIZE = "5GB"

# What messages about arguments call them, and what the command does.
OPTIONS = {
    "vae_path": "vae",
    "transformer_path": "transformer",
    "family": "family",
    "attention_windows": "attention-windows",
    "text_encoders": "text-encoders",
}


def save_whole(converted: Converted, folder: Path) -> None:
    """Write a folder whole or not at all; it must not exist yet, or be empty."""
    with whole_folder(folder) as unfinished:
        converted.pipeline.save_pretrained(unfinished, max_shard_size=MAX_SHARD_SIZE)
        (unfinished / CARD).write_text(converted_card(converted, folder.name), encoding="utf-8")


def as_options(message: str) -> str:
    """A message about arguments of [`convert`], about options of the command."""
    for name, option in OPTIONS.items():
        message = message.replace(f"`{name}`", f"`--{option}`").replace(f"`{name}[", f"`--{option}[")
    return message


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srdd.conversion",
        description="Convert official checkpoints of VAR and of models that build on it into a folder for"
        " SRDDPipeline, or SRDDTextPipeline where they draw from texts, with a model card.",
    )
    parser.add_argument("--vae", required=True, help="The official tokenizer, as vae_ch160v4096z32.pth.")
    parser.add_argument(
        "--transformer",
        required=True,
        help="The official transformer, as var_d16.pth or mvar-d16.pth, or a checkpoint of an official trainer. Of"
        " Switti's model.safetensors, the config.json beside it is read, too: use_ar, rope_theta and rope_size.",
    )
    parser.add_argument("--output", required=True, help="Folder to write, which must not exist yet, or be empty.")
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        help="What the transformer is of; recognised by default. A state dict alone may not tell VAR from MVAR.",
    )
    parser.add_argument(
        "--attention-pattern",
        choices=ATTENTION_PATTERNS,
        help="The default is the checkpoint's model; the others start a fine-tuning from its weights.",
    )
    parser.add_argument(
        "--attention-windows",
        nargs="+",
        type=int,
        metavar="SIDE",
        help="For each scale, the side of the square that a token sees of it, an odd number; 0 is the whole scale. The"
        " default is that of the family's published models.",
    )
    parser.add_argument(
        "--text-encoders",
        metavar="FOLDER_OR_REPOSITORY",
        help="For Switti: where text_encoder, tokenizer, text_encoder_2 and tokenizer_2 are, as in"
        " stabilityai/stable-diffusion-xl-base-1.0. They become a part of the folder; without them it draws from"
        " embeddings of texts.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Dtype of the weights; the checkpoint's by default.",
    )
    args = parser.parse_args(arguments)
    output = Path(args.output).resolve()
    try:
        if not is_free(output):
            parser.error(f"`--output` must be a new or an empty folder, got {args.output}.")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        options = args.attention_pattern, dtype, args.family, args.attention_windows, args.text_encoders
        converted = convert(args.vae, args.transformer, *options)
    except (OSError, ValueError) as error:
        parser.error(as_options(str(error)))
    try:
        save_whole(converted, output)
    except OSError as error:
        parser.error(f"`--output` must be a folder that can be written, got {args.output}: {error}")
    write_text(f"{args.output}: {converted.family.title}. {converted.family.about}".rstrip() + "\n")


if __name__ == "__main__":
    main()
