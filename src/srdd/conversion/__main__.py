import argparse
import os
import tempfile
from pathlib import Path

import torch

from srdd.conversion import convert_checkpoints
from srdd.models import ATTENTION_PATTERNS
from srdd.pipelines import SRDDPipeline


# Bounds what older versions of safetensors copy while they write.
MAX_SHARD_SIZE = "5GB"


def save_whole(pipeline: SRDDPipeline, folder: Path) -> None:
    """Write a folder whole or not at all; it must not exist yet, or be empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        unfinished = Path(beside) / folder.name
        pipeline.save_pretrained(unfinished, max_shard_size=MAX_SHARD_SIZE)
        if folder.is_dir():
            folder.rmdir()
        os.replace(unfinished, folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srdd.conversion",
        description="Convert official VAR checkpoints into a folder for SRDDPipeline.",
    )
    parser.add_argument("--vae", required=True, help="The official tokenizer, vae_ch160v4096z32.pth.")
    parser.add_argument(
        "--transformer",
        required=True,
        help="The official transformer, var_d16.pth to var_d36.pth, or a checkpoint of the official trainer.",
    )
    parser.add_argument("--output", required=True, help="Folder to write, which must not exist yet, or be empty.")
    parser.add_argument(
        "--attention-pattern",
        choices=ATTENTION_PATTERNS,
        default="causal",
        help="'causal' (the default) is the checkpoint's model; the others start a fine-tuning from its weights.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Dtype of the weights; the checkpoint's by default.",
    )
    args = parser.parse_args(arguments)
    output = Path(args.output).resolve()
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            parser.error(f"`--output` must be a new or an empty folder, got {args.output}.")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        pipeline = convert_checkpoints(args.vae, args.transformer, args.attention_pattern, dtype)
    except (OSError, ValueError) as error:
        parser.error(str(error).replace("`vae_path`", "`--vae`").replace("`transformer_path`", "`--transformer`"))
    try:
        save_whole(pipeline, output)
    except OSError as error:
        parser.error(f"`--output` must be a folder that can be written, got {args.output}: {error}")


if __name__ == "__main__":
    main()
