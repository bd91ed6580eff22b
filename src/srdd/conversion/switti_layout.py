"""
Where the tensors of a [`ScaleTextTransformer2DModel`] lie in a state dict of the official Switti code (Apache-2.0,
github.com/yandex-research/switti), and what its shapes say about the configuration.

The names below are facts about the published checkpoints. Some things leave no trace in a state dict and are taken to
be what the official code builds by default: as many heads as blocks, and the base and extent of rotary positions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from srdd.conversion.official_config import Shapes, transformer_scale_sizes
from srdd.conversion.official_layout import Shape


SWITTI_RENAMES = (
    (r"^proj_in\.", "word_embed."),
    (r"^pooled_embed\.", "text_pooler."),
    (r"^size_embed\.frequencies$", "crop_embed.weight"),
    (r"^size_embed\.proj\.", "crop_proj."),
    (r"^scale_embed\.", "lvl_embed."),
    (r"^start_pos_embed$", "pos_start"),
    (r"^adaln_out\.", "head_nm.ada_lin.1."),
    (r"^proj_out\.", "head."),
    (r"\.size_scales$", ".crop_cond_scales"),
    (r"\.adaln\.", ".ada_lin.1."),
    (r"\.norm1\.", ".self_attention_norm1."),
    (r"\.norm1_out\.", ".self_attention_norm2."),
    (r"\.norm2\.", ".cross_attention_norm1."),
    (r"\.norm2_out\.", ".cross_attention_norm2."),
    (r"\.norm_text\.", ".attention_y_norm."),
    (r"\.norm3\.", ".ffn_norm1."),
    (r"\.norm3_out\.", ".ffn_norm2."),
    (r"\.attn2\.to_out\.0\.", ".cross_attn.proj."),
    (r"\.attn2\.to_q\.", ".cross_attn.to_q."),
    (r"\.attn2\.to_[kv]\.", ".cross_attn.to_kv."),
    (r"\.attn\.to_[qkv]\.", ".attn.to_qkv."),
    (r"\.attn\.to_out\.0\.", ".attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".ffn.up_proj."),
    (r"\.ff\.net\.2\.", ".ffn.down_proj."),
)

# Tables that the official code derives from its configuration and saves all the same.
SWITTI_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|freqs_cis")

# Keys by which its state dicts are told from those of other families.
SWITTI_KEYS = ("text_pooler.weight", "crop_proj.weight", "blocks.0.cross_attn.to_kv.weight")

# The scales of the published models, by their number.
SWITTI_SCALES = {
    10: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    14: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
}


@dataclass(frozen=True)
class SwittiOrigin:
    """
    Where one tensor of ours comes from.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): Names and shapes of the official tensors: one, or two whose rows follow
            each other in ours.
        place (`tuple[int, int]`, defaults to `(0, 1)`): Which one of how many equal parts of these rows is ours.
    """

    shapes: dict[str, Shape]
    place: tuple[int, int] = (0, 1)

    def take(self, state: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Our tensor, of the given shape: a view where it is one official tensor or a part of it."""
        tensors = [state[key] for key in self.shapes]
        index, count = self.place
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (whole if count == 1 else whole.chunk(count)[index]).reshape(shape)


def is_switti(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of the official Switti code, by its keys."""
    return all(key in state for key in SWITTI_KEYS)


def switti_origins(shapes: Mapping[str, Shape]) -> dict[str, SwittiOrigin]:
    """
    Origins of a [`ScaleTextTransformer2DModel`]'s tensors.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Its state dict's keys and shapes.

    Returns:
        `dict[str, SwittiOrigin]`: By our key.
    """
    origins = {}
    for key, shape in shapes.items():
        official = key
        for pattern, replacement in SWITTI_RENAMES:
            official = re.sub(pattern, replacement, official)
        joint = re.search(r"\.(to_qkv|to_kv)\.", official)
        if joint:
            letters = joint[1].removeprefix("to_")
            place = letters.index(re.search(r"\.to_([qkv])\.", key)[1]), len(letters)
            origins[key] = SwittiOrigin({official: (len(letters) * shape[0], *shape[1:])}, place)
        elif ".up_proj." in official:
            half = (shape[0] // 2, *shape[1:])
            origins[key] = SwittiOrigin({official: half, official.replace(".up_proj.", ".gate_proj."): half})
        else:
            origins[key] = SwittiOrigin({official: (1, *shape) if key.endswith("size_scales") else shape})
    return origins


def switti_scale_sizes(state: Mapping[str, torch.Tensor]) -> list[int]:
    """
    The scales of an official Switti: from its table of the tokens' scales, or else the published list of as many.

    Raises:
        ValueError: If neither tells.
    """
    if "lvl_1L" in state:
        return transformer_scale_sizes(state)
    table = state.get("lvl_embed.weight")
    num_scales = len(table) if table is not None and table.ndim else 0
    if num_scales not in SWITTI_SCALES:
        raise ValueError(
            f"The scales of a transformer without `lvl_1L` must be those of a published model, {SWITTI_SCALES}, but it"
            f" has {num_scales} scales."
        )
    return SWITTI_SCALES[num_scales]


def switti_attention_pattern(state: Mapping[str, torch.Tensor]) -> str:
    """What the tokens of an official Switti see: its attention bias tells; without one, their own scale."""
    bias = state.get("attn_bias_for_masking")
    is_table = bias is not None and bias.ndim == 4 and bias.numel() > 1
    return "causal" if is_table and bias[0, 0, -1, 0] == 0 else "markov"


def switti_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Configuration of the [`ScaleTextTransformer2DModel`] that an official Switti is.

    Args:
        state (`Mapping[str, torch.Tensor]`): Its state dict.

    Returns:
        `dict[str, Any]`: Arguments of the model class.

    Raises:
        ValueError: If this is no official Switti, or one of another architecture.
    """
    shapes: Shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    sources = {
        "word_embed.weight": 2,
        "head.weight": 2,
        "text_pooler.weight": 2,
        "blocks.0.cross_attn.to_kv.weight": 2,
        "blocks.0.ffn.gate_proj.weight": 2,
    }
    unclear = [key for key, ndim in sources.items() if len(shapes.get(key, ())) != ndim or 0 in shapes[key]]
    if unclear:
        raise ValueError(
            f"The transformer must be an official Switti with a gated MLP, but {', '.join(unclear)} are missing or no"
            " matrices."
        )
    width, latent_channels = shapes["word_embed.weight"]
    depth = len({match[1] for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))})
    if width % depth:
        raise ValueError(f"The width of the transformer must be a multiple of its {depth} heads, got {width}.")
    return {
        "codebook_size": shapes["head.weight"][0],
        "latent_channels": latent_channels,
        "scale_sizes": switti_scale_sizes(state),
        "num_layers": depth,
        "num_attention_heads": depth,
        "attention_head_dim": width // depth,
        "mlp_ratio": shapes["blocks.0.ffn.gate_proj.weight"][0] / width,
        "cross_attention_dim": shapes["blocks.0.cross_attn.to_kv.weight"][1],
        "pooled_projection_dim": shapes["text_pooler.weight"][1],
        "attention_pattern": switti_attention_pattern(state),
    }


def switti_sampling(scale_sizes: list[int]) -> dict[str, Any]:
    """
    Scheduler options by which a published Switti draws. The finest scales, those of 512 pixels from the ninth and
    those of 1024 from the twelfth on, are drawn without guidance and nearly greedily.
    """
    num_scales = len(scale_sizes)
    first_unguided = {10: 8, 14: 11}.get(num_scales, num_scales)
    return {
        "guidance_scale": 7.0,
        "top_k": 400,
        "top_p": 0.95,
        "guidance_stop": first_unguided / num_scales,
        "temperature": [1.0] * first_unguided + [0.1] * (num_scales - first_unguided),
    }
