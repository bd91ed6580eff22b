"""
Where the tensors of our models lie in the state dicts of the official VAR code.

The names below are facts about the published checkpoints. Nearly every tensor of ours is one of theirs under another
name; the exceptions are the projections of an attention, which they keep in one tensor, and the key bias, which they
do not have.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


Shape = tuple[int, ...]

TRANSFORMER_RENAMES = (
    (r"^proj_in\.", "word_embed."),
    (r"^class_embed\.", "class_emb."),
    (r"^scale_embed\.", "lvl_embed."),
    (r"^pos_embed$", "pos_1LC"),
    (r"^start_pos_embed$", "pos_start"),
    (r"^adaln\.", "shared_ada_lin.1."),
    (r"^adaln_out\.", "head_nm.ada_lin.1."),
    (r"^proj_out\.", "head."),
    (r"\.adaln\.", ".ada_lin.1."),
    (r"\.scale_shift_table$", ".ada_gss"),
    (r"\.query_scale$", ".scale_mul_1H11"),
    (r"\.to_[qkv]\.weight$", ".mat_qkv.weight"),
    (r"\.to_([qv])\.bias$", r".\1_bias"),
    (r"\.to_out\.0\.", ".proj."),
    (r"\.ff\.net\.0\.proj\.", ".ffn.fc1."),
    (r"\.ff\.net\.2\.", ".ffn.fc2."),
)

TOKENIZER_RENAMES = (
    (r"^quantize\.codebook\.", "quantize.embedding."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_[qkv]\.", ".qkv."),
    (r"\.to_out\.0\.", ".proj_out."),
)

# Tables that the official code derives from its configuration and saves all the same, and usage statistics.
TRANSFORMER_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")
TOKENIZER_BUFFERS = re.compile(r"quantize\.ema_vocab_hit_SV")

# How the official code names the residual convolutions when the scales share several, one, or none of them.
RESIDUAL_CONV_NAMES = ("quantize.quant_resi.qresi_ls.{}.", "quantize.quant_resi.qresi.", "quantize.quant_resi.{}.")


@dataclass(frozen=True)
class Origin:
    """
    Where one tensor of ours comes from.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): Names and shapes of the official tensors that it is made of; none for
            one that is zero there and not stored.
        part (`tuple[int, int]`, defaults to `(0, 1)`): Which one of how many equal parts of their rows is ours.
        made_by (`Callable`, *optional*): Makes one tensor of them, in their order; by default their rows follow each
            other.
    """

    shapes: dict[str, Shape]
    part: tuple[int, int] = (0, 1)
    made_by: Callable[..., torch.Tensor] | None = None

    def take(self, state: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Our tensor, of the given shape: a view where it is one official tensor or a part of it."""
        tensors = [state[key] for key in self.shapes]
        if not tensors:
            return torch.zeros(shape)
        if self.made_by is not None:
            whole = self.made_by(*tensors)
        else:
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        index, count = self.part
        return (whole if count == 1 else whole.chunk(count)[index]).reshape(shape)

    def renamed(self, name: Callable[[str], str]) -> "Origin":
        """The same with other official names."""
        return replace(self, shapes={name(key): shape for key, shape in self.shapes.items()})


def renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    """A name after all replacements of patterns."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _part(key: str) -> tuple[int, int]:
    projection = re.search(r"\.to_([qkv])\.", key)
    return ("qkv".index(projection[1]), 3) if projection else (0, 1)


def transformer_origins(
    shapes: Mapping[str, Shape], official_shapes: Mapping[str, Shape] | None = None
) -> dict[str, Origin]:
    """
    Origins of a [`ScaleTransformer2DModel`]'s tensors.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Its state dict's keys and shapes.
        official_shapes (`Mapping[str, tuple[int, ...]]`, *optional*): Those of the checkpoint; VAR's keys do not
            depend on them.

    Returns:
        `dict[str, Origin]`: By our key.
    """
    origins = {}
    for key, shape in shapes.items():
        official, part = renamed(key, TRANSFORMER_RENAMES), (0, 1)
        if official.endswith(".mat_qkv.weight"):
            shape, part = (3 * shape[0], shape[1]), _part(key)
        elif official.endswith(".scale_mul_1H11"):
            shape = (1, shape[0], 1, 1)
        elif official.endswith(".ada_gss"):
            shape = (1, 1, *shape)
        origins[key] = Origin({} if key.endswith(".to_k.bias") else {official: shape}, part)
    return origins


def tokenizer_origins(shapes: Mapping[str, Shape], residual_conv_name: str) -> dict[str, Origin]:
    """
    Origins of a [`MultiScaleVQModel`]'s tensors.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Its state dict's keys and shapes.
        residual_conv_name (`str`): The one of `RESIDUAL_CONV_NAMES` that the checkpoint uses.

    Returns:
        `dict[str, Origin]`: By our key.
    """
    levels = len({match[1] for key in shapes if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))})
    origins = {}
    for key, shape in shapes.items():
        # The official list of upward blocks starts at the finest one, ours at the one that runs first.
        official = re.sub(r"\.up_blocks\.(\d+)", lambda match: f".up_blocks.{levels - 1 - int(match[1])}", key)
        official, part = renamed(official, TOKENIZER_RENAMES), _part(key)
        if residual_conv := re.match(r"quantize\.residual_convs\.(\d+)\.", key):
            official = residual_conv_name.format(residual_conv[1]) + key[residual_conv.end() :]
        shape = (part[1] * shape[0], *shape[1:])
        if official.endswith((".qkv.weight", ".proj_out.weight")):
            shape = (*shape, 1, 1)
        origins[key] = Origin({official: shape}, part)
    return origins
