"""
A random checkpoint of the size of a published one, under the official keys, and a tokenizer to go with it: what
`python -m srdd.conversion` needs in time and memory, and what drawing with its folder does.

    python benchmarks/random_checkpoint.py --weights mvar-finetune-d24 --output random
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors.torch import save_file

from srdd import MultiScaleVQModel
from srdd.console import write_text
from srdd.conversion.checkpoint_files import StateDict, shapes_of
from srdd.conversion.families import FAMILIES
from srdd.conversion.official_layout import RESIDUAL_CONV_NAMES, Origin, Shape, tokenizer_origins


FAMILY_OF = {settings.name: name for name, family in FAMILIES.items() for settings in family.published}

# Where a file holds its transformer; in most it is all that there is.
CONTAINERS = {"mvar": ("mvar_wo_ddp",), "markov-var": ("var_wo_ddp", "trainer")}

# HMAR's two halves share so many of their blocks here; files tell by their keys how many it is.
SHARED_BY_HALVES = 0.75


def random_tensor(key: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Small numbers, but for what multiplies and would make nothing of all others."""
    if "scale_mul" in key:
        return torch.full(shape, math.log(4), dtype=dtype)
    if len(shape) == 1 and key.endswith(".weight"):
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype) * 0.02


def random_state(origins: Iterable[Origin], dtype: torch.dtype) -> StateDict:
    """Numbers for all official tensors that ours are made of."""
    shapes = {key: shape for origin in origins for key, shape in origin.shapes.items()}
    return {key: random_tensor(key, shape, dtype) for key, shape in shapes.items()}


def without_weights(kind: type[ModelMixin], **config) -> ModelMixin:
    with init_empty_weights():
        return kind(**config)


def random_transformer(family_name: str, depth: int, scale_sizes: tuple[int, ...], dtype: torch.dtype) -> StateDict:
    """A transformer's state dict, with the tables that the official code derives and saves."""
    family = FAMILIES[family_name]
    sizes = {"num_layers": depth, "num_attention_heads": depth, "scale_sizes": scale_sizes}
    if family_name == "markov-var":  # hidden channels in steps of 256
        width = 64 * depth
        sizes["mlp_ratio"] = (8 * width // 3 + 255) // 256 * 256 / width
    shapes = shapes_of(without_weights(family.transformer, **sizes).state_dict())
    num_shared = max(1, round(SHARED_BY_HALVES * depth))
    shared = {f"base_blocks.{index}.": () for index in range(num_shared)} if family_name == "hmar" else {}
    state = random_state(family.origins(shapes, shared).values(), dtype)
    if family_name == "hmar":
        own = [key for key in state if key.startswith("ns_")]
        state |= {f"mask_{key.removeprefix('ns_')}": torch.randn_like(state[key]) for key in own}
    scale_ids = torch.cat([torch.full((side**2,), scale) for scale, side in enumerate(scale_sizes)])
    sees = torch.ge if family.attention_pattern == "causal" else torch.eq
    table = torch.where(sees(scale_ids[:, None], scale_ids), 0.0, -torch.inf)
    return {**state, "lvl_1L": scale_ids[None], "attn_bias_for_masking": table[None, None]}


def random_tokenizer(channels: int) -> StateDict:
    """The state dict of VAR's tokenizer."""
    widths = [factor * channels for factor in (1, 1, 2, 2, 4)]
    shapes = shapes_of(without_weights(MultiScaleVQModel, block_out_channels=widths).state_dict())
    return random_state(tokenizer_origins(shapes, RESIDUAL_CONV_NAMES[0]).values(), torch.float32)


def write_pair(args: argparse.Namespace) -> tuple[Path, Path]:
    """
    Write tokenizer and transformer as their authors publish them.

    Returns:
        `tuple[Path, Path]`: The files.
    """
    torch.manual_seed(0)
    name = FAMILY_OF[args.weights]
    (settings,) = [settings for settings in FAMILIES[name].published if settings.name == args.weights]
    dtype, depth = getattr(torch, args.dtype), args.depth or settings.depth
    tokenizer = random_tokenizer(args.vae_channels)
    state = random_transformer(name, depth, settings.scale_sizes, dtype)
    if name == "switti":
        files = args.output / "VQVAE-Switti" / "model.safetensors", args.output / args.weights / "model.safetensors"
        for file, content in zip(files, (tokenizer, state)):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(content, file)
        config = {"depth": depth, "rope_size": 128, "rope_theta": 10000, "use_ar": False}
        files[1].with_name("config.json").write_text(json.dumps(config))
        return files
    args.output.mkdir(parents=True, exist_ok=True)
    files = args.output / "vae_ch160v4096z32.pth", args.output / f"{args.weights}.pth"
    torch.save(tokenizer, files[0])
    for container in CONTAINERS.get(name, ()):
        state = {container: state}
    torch.save(state, files[1])
    return files


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write random checkpoints of the sizes that are published.")
    parser.add_argument("--weights", choices=FAMILY_OF, required=True, help="As their authors name them.")
    parser.add_argument("--output", type=Path, required=True, help="A folder.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--depth", type=int, help="Number of blocks and heads; that of the weights by default.")
    parser.add_argument("--vae_channels", type=int, default=160, help="Of the tokenizer at the full resolution.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    vae, transformer = write_pair(args)
    output = args.output / "converted"
    write_text(f"python -m srdd.conversion --vae {vae} --transformer {transformer} --output {output}\n")


if __name__ == "__main__":
    main(parse_args())
