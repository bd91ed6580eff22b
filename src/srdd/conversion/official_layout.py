"""
Where the tensors of our models lie in the state dicts of the official VAR code.

The names below are facts about the published checkpoints. Nearly every tensor of ours is one of theirs under another
name; the exceptions are the projections of an attention, which they keep in one tensor, and the key bias, which they
do not have.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
        key (`str`, *optional*): Its name in the official state dict; `None` if it is zero there and not stored.
        shape (`tuple[int, ...]`): The shape it has there.
        third (`int`, *optional*): Which third of its rows is ours; the whole by default.
    """

    key: str | None
    shape: Shape
    third: int | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the official tensors that it is made of."""
        return {} if self.key is None else {self.key: self.shape}

    def take(self, state: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Our tensor, of the given shape: a view of the official one, or zeros."""
        if self.key is None:
            return torch.zeros(shape)
        tensor = state[self.key]
        return (tensor if self.third is None else tensor.chunk(3)[self.third]).reshape(shape)


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _third(key: str) -> int | None:
    projection = re.search(r"\.to_([qkv])\.", key)
    return "qkv".index(projection[1]) if projection else None


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
        official, third = _renamed(key, TRANSFORMER_RENAMES), None
        if key.endswith(".to_k.bias"):
            official = None
        elif official.endswith(".mat_qkv.weight"):
            shape, third = (3 * shape[0], shape[1]), _third(key)
        elif official.endswith(".scale_mul_1H11"):
            shape = (1, shape[0], 1, 1)
        elif official.endswith(".ada_gss"):
            shape = (1, 1, *shape)
        origins[key] = Origin(official, shape, third)
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
        official, third = _renamed(official, TOKENIZER_RENAMES), _third(key)
        if residual_conv := re.match(r"quantize\.residual_convs\.(\d+)\.", key):
            official = residual_conv_name.format(residual_conv[1]) + key[residual_conv.end() :]
        if third is not None:
            shape = (3 * shape[0], *shape[1:])
        if official.endswith((".qkv.weight", ".proj_out.weight")):
            shape = (*shape, 1, 1)
        origins[key] = Origin(official, shape, third)
    return origins
