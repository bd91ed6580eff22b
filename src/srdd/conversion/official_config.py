"""
What the shapes in official checkpoints say about the models' configurations.

Some things leave no trace in a state dict and are taken to be what the official build function sets: the residual
ratio 0.5, codes compared by distance, 32 groups in every norm, a drop path rate of 0.1 * depth / 24, and as many heads
as blocks where no per-head temperature (QK l2-norm) tells.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srdd.conversion.official_layout import RESIDUAL_CONV_NAMES, Shape
from srdd.scales import MAX_SCALES


# The lists of the published models, by image size.
KNOWN_SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class OfficialTransformer:
    """
    What is known of an official transformer before our model of it is made.

    Args:
        path (`Path`): Its file.
        state (`Mapping[str, torch.Tensor]`): Its state dict.
        shapes (`Mapping[str, tuple[int, ...]]`): The shapes in it.
        scale_sizes (`list[int]`): Its scales.
        codebook_size (`int`): Number of codes of its tokenizer.
        latent_channels (`int`): Channels of its tokenizer's codes.
    """

    path: Path
    state: Mapping[str, torch.Tensor]
    shapes: Shapes
    scale_sizes: list[int]
    codebook_size: int
    latent_channels: int


def agreed_size(shapes: Shapes, default: int, *places: tuple[str, int]) -> int:
    """
    The size that most of these (key, axis) places have, so that one bad tensor does not make the others look bad; the
    published models' size if all are missing.
    """
    sizes = [shapes[key][axis] for key, axis in places if axis < len(shapes.get(key, ()))]
    return statistics.mode(sizes) if sizes else default


def count_indices(shapes: Shapes, pattern: str) -> int:
    """How many different indices the keys that match `pattern` have."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def residual_conv_layout(shapes: Shapes) -> tuple[str, int]:
    """The name of the residual convolutions, one of `RESIDUAL_CONV_NAMES`, and how many there are."""
    shared, single, separate = RESIDUAL_CONV_NAMES
    if any(key.startswith(single) for key in shapes):
        return single, 1
    for name in (separate, shared):
        if count := count_indices(shapes, name.replace(".", r"\.").format(r"(\d+)")):
            return name, count
    return shared, 4


def tokenizer_config(shapes: Shapes, scale_sizes: list[int]) -> dict[str, Any]:
    """
    Configuration of the [`MultiScaleVQModel`] that an official tokenizer is.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Keys and shapes of its state dict.
        scale_sizes (`list[int]`): The scales it will be used with; the state dict does not say.

    Returns:
        `dict[str, Any]`: Arguments of the model class.

    Raises:
        ValueError: If this is no official tokenizer.
    """
    prefixes = ("encoder.down.0.block.", "decoder.", "quantize.")
    absent = [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in shapes)]
    if absent:
        raise ValueError(f"The tokenizer must be an official one, but no key of it starts with {', '.join(absent)}.")
    levels = count_indices(shapes, r"encoder\.down\.(\d+)\.")
    attention = "Attn" if any(key.startswith(f"encoder.down.{levels - 1}.attn.") for key in shapes) else ""
    return {
        "in_channels": agreed_size(shapes, 3, ("encoder.conv_in.weight", 1)),
        "out_channels": agreed_size(shapes, 3, ("decoder.conv_out.bias", 0), ("decoder.conv_out.weight", 0)),
        "down_block_types": ["DownEncoderBlock2D"] * (levels - 1) + [f"{attention}DownEncoderBlock2D"],
        "up_block_types": [f"{attention}UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
        "block_out_channels": [
            agreed_size(
                shapes,
                160,
                *((f"encoder.down.{level}.block.0.{name}.bias", 0) for name in ("conv1", "norm2", "conv2")),
                *((f"decoder.up.{level}.block.0.{name}.bias", 0) for name in ("conv1", "norm2", "conv2")),
            )
            for level in range(levels)
        ],
        "layers_per_block": count_indices(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "mid_block_add_attention": any(key.startswith("encoder.mid.attn_1.") for key in shapes),
        "latent_channels": agreed_size(
            shapes, 32, ("quantize.embedding.weight", 1), ("quant_conv.bias", 0), ("post_quant_conv.bias", 0)
        ),
        "codebook_size": agreed_size(shapes, 4096, ("quantize.embedding.weight", 0), ("quantize.ema_vocab_hit_SV", 1)),
        "scale_sizes": scale_sizes,
        "sample_size": scale_sizes[-1] * 2 ** (levels - 1),
        "quant_conv_kernel_size": agreed_size(shapes, 3, ("quant_conv.weight", 3), ("post_quant_conv.weight", 3)),
        "num_residual_convs": residual_conv_layout(shapes)[1],
    }


def transformer_scale_sizes(
    state: Mapping[str, torch.Tensor], published: Sequence[tuple[int, ...]] = tuple(KNOWN_SCALES.values())
) -> list[int]:
    """
    The scales of an official transformer: read from its table of the tokens' scales, or else, where a file leaves the
    tables out, the first published list with as many scales and tokens.

    Args:
        state (`Mapping[str, torch.Tensor]`): Its state dict.
        published (`Sequence[tuple[int, ...]]`, *optional*): The lists of its family's models.

    Returns:
        `list[int]`: The side of each.

    Raises:
        ValueError: If neither tells.
    """
    if "lvl_1L" in state:
        scale_ids = state["lvl_1L"].flatten().long()
        low, high = (bound.item() for bound in scale_ids.aminmax()) if scale_ids.numel() else (-1, -1)
        if low < 0 or high >= MAX_SCALES:
            raise ValueError(f"`lvl_1L` must number the tokens' scales in [0, {MAX_SCALES - 1}], got [{low}, {high}].")
        counts = scale_ids.bincount().tolist()
        sides = [math.isqrt(count) for count in counts]
        if [side**2 for side in sides] != counts:
            raise ValueError(f"`lvl_1L` must give every scale a square number of tokens, got {counts}.")
        return sides
    counts = {
        what: state[key].shape[axis]
        for what, key, axis in (("scales", "lvl_embed.weight", 0), ("tokens", "pos_1LC", 1))
        if key in state and state[key].ndim > axis
    }
    for sides in published:
        own = {"scales": len(sides), "tokens": sum(side**2 for side in sides)}
        if counts.items() <= own.items():
            return list(sides)
    raise ValueError(
        f"The scales of a transformer without `lvl_1L` must be those of a published model, {list(published)}, but it"
        f" has {' and '.join(f'{count} {what}' for what, count in counts.items())}."
    )


def block_sizes(official: OfficialTransformer, depth: int, width: int, hidden: int, heads: int) -> dict[str, Any]:
    """
    What all configurations of transformers have.

    Args:
        official ([`OfficialTransformer`]): The transformer.
        depth (`int`): Number of blocks.
        width (`int`): Width of the hidden states.
        hidden (`int`): Width of the MLP.
        heads (`int`): Number of heads.

    Raises:
        ValueError: If its width does not fit its heads.
    """
    if min(width, heads) < 1 or width % heads:
        raise ValueError(f"The width of the transformer must be a multiple of its {heads} heads, got {width}.")
    return {
        "codebook_size": official.codebook_size,
        "latent_channels": official.latent_channels,
        "scale_sizes": official.scale_sizes,
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": hidden / width,
    }


def transformer_config(official: OfficialTransformer) -> dict[str, Any]:
    """
    Configuration of the [`ScaleTransformer2DModel`] that an official transformer is.

    Args:
        official ([`OfficialTransformer`]): The transformer.

    Returns:
        `dict[str, Any]`: Arguments of the model class, but for what no tensor tells.

    Raises:
        ValueError: If its width does not fit its heads.
    """
    shapes = official.shapes
    depth = count_indices(shapes, r"blocks\.(\d+)\.")
    blocks = [f"blocks.{index}" for index in range(depth)]
    width = agreed_size(
        shapes, 64 * depth, ("pos_1LC", 2), ("class_emb.weight", 1), ("lvl_embed.weight", 1), ("head.weight", 1)
    )
    hidden = agreed_size(shapes, 4 * width, *((f"{block}.ffn.fc1.bias", 0) for block in blocks))
    heads = agreed_size(shapes, depth, *((f"{block}.attn.scale_mul_1H11", 1) for block in blocks))
    return {
        **block_sizes(official, depth, width, hidden, heads),
        "num_classes": agreed_size(shapes, 1001, ("class_emb.weight", 0)) - 1,
        "qk_norm": any(key.endswith(".attn.scale_mul_1H11") for key in shapes),
        "shared_adaln": any(key.startswith("shared_ada_lin.") for key in shapes),
        "drop_path_rate": 0.1 * depth / 24,
    }
