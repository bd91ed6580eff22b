import argparse
import sys

import torch

from srdd.conversion import convert_checkpoints
from srdd.models import ATTENTION_PATTERNS


# Bounds what older versions of safetensors copy while they write.
MAX_SHARD_SIZE = "5GB"


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
    parser.add_argument("--output", required=True, help="Folder to write.")
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
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        pipeline = convert_checkpoints(args.vae, args.transformer, args.attention_pattern, dtype)
    except ValueError as error:
        sys.exit(f"error: {error}")
    pipeline.save_pretrained(args.output, max_shard_size=MAX_SHARD_SIZE)


if __name__ == "__main__":
    main()
