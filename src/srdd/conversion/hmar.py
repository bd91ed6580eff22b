"""
HMAR (github.com/NVlabs/HMAR): the half that predicts scale after scale, with the pattern "markov".

Its blocks are `base_blocks`, which both halves share, then `ns_blocks`; its input projection keeps its bias apart.
"""

import re
from dataclasses import replace
from typing import Any

from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import OfficialTransformer, Shapes, count_indices, transformer_config
from srdd.conversion.official_layout import Origin, transformer_origins


# The half that draws tokens of a scale again, and tables as VAR's.
LEFT_OUT = re.compile(
    r"mask_(blocks|head|head_nm|embed)\..*|lvl_1L|attn_bias_for_masking|(base|ns)_blocks\.\d+\.attn\.zero_k_bias"
)


def _num_shared(shapes: Shapes) -> int:
    """How many blocks both halves share."""
    return count_indices(shapes, r"base_blocks\.(\d+)\.")


def hmar_key(key: str, num_shared: int) -> str:
    """What HMAR calls a tensor of VAR's."""
    if block := re.match(r"blocks\.(\d+)\.", key):
        index = int(block[1])
        name = f"base_blocks.{index}." if index < num_shared else f"ns_blocks.{index - num_shared}."
        return name + key[block.end() :]
    return re.sub(r"^head(_nm)?\.", r"ns_head\1.", "word_embed_bias" if key == "word_embed.bias" else key)


def _as_var(shapes: Shapes) -> Shapes:
    """Shapes by VAR's keys."""
    num_shared = _num_shared(shapes)

    def var_key(key: str) -> str:
        if block := re.match(r"(base|ns)_blocks\.(\d+)\.", key):
            index = int(block[2]) + num_shared * (block[1] == "ns")
            return f"blocks.{index}.{key[block.end() :]}"
        return re.sub(r"^ns_head(_nm)?\.", r"head\1.", "word_embed.bias" if key == "word_embed_bias" else key)

    return {var_key(key): shape for key, shape in shapes.items() if not LEFT_OUT.fullmatch(key)}


def hmar_config(official: OfficialTransformer) -> dict[str, Any]:
    """[`~srdd.conversion.official_config.transformer_config`] of the half that is converted."""
    return transformer_config(replace(official, shapes=_as_var(official.shapes)))


def hmar_origins(shapes: Shapes, official_shapes: Shapes) -> dict[str, Origin]:
    """[`~srdd.conversion.official_layout.transformer_origins`] by HMAR's keys."""
    num_shared = _num_shared(official_shapes)
    return {
        key: origin.renamed(lambda name: hmar_key(name, num_shared))
        for key, origin in transformer_origins(shapes).items()
    }


HMAR = Family(
    title="HMAR",
    prefix="base_blocks.",
    published=(
        PublishedSettings("hmar-d16", 16, 2.7, 1000, 0.99),
        PublishedSettings("hmar-d20", 20, 2.9, 950, 0.99),
        PublishedSettings("hmar-d24", 24, 3.1, 900, 0.99),
        PublishedSettings("hmar-d30", 30, 2.6, 650, 0.99),
    ),
    source="https://github.com/NVlabs/HMAR",
    licence={
        "license": "other",
        "license_name": "nvidia-one-way-noncommercial-license-v1",
        "license_link": "https://github.com/NVlabs/HMAR/blob/main/LICENSE",
    },
    licence_note="The authors publish code and weights under the NVIDIA One-Way Noncommercial License v1: for"
    " non-commercial research and education only, which holds for these converted weights, too.",
    citation="""@inproceedings{kumbong2025hmar,
  title     = {HMAR: Efficient Hierarchical Masked AutoRegressive Image Generation},
  author    = {Kumbong, Hermann and Liu, Xian and Lin, Tsung-Yi and Liu, Xihui and Liu, Ziwei and Fu, Daniel Y and
               Liu, Ming-Yu and Re, Christopher and Romero, David W},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025}
}""",
    attention_pattern="markov",
    config=hmar_config,
    origins=hmar_origins,
    left_out=LEFT_OUT,
    about="The half that predicts scale after scale is converted. The half that draws masked tokens of a scale again"
    " (`mask_blocks`, `mask_head`, `mask_embed`) is left out; the published settings are for both together.",
)
