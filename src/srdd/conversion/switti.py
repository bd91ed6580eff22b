"""
Switti (github.com/yandex-research/switti): a transformer that draws from texts, with the pattern "markov"; its AR
models have "causal".

Heads are as many as blocks, which leaves no trace in the tensors; what else leaves none is in the `config.json` that
its authors publish beside them.
"""

import json
import re
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from srdd.checks import check_bool, check_number
from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import (
    KNOWN_SCALES,
    OfficialTransformer,
    Shapes,
    agreed_size,
    block_sizes,
    count_indices,
)
from srdd.conversion.official_layout import Origin, renamed
from srdd.conversion.var import has_causal_table
from srdd.models import ScaleTextTransformer2DModel
from srdd.pipelines import SRDDTextPipeline


logger = logging.get_logger(__name__)

RENAMES = (
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
BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|freqs_cis")


def switti_origins(shapes: Shapes, official_shapes: Shapes) -> dict[str, Origin]:
    """
    Origins of a [`ScaleTextTransformer2DModel`]'s tensors.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Its state dict's keys and shapes.
        official_shapes (`Mapping[str, tuple[int, ...]]`): Those of the checkpoint; Switti's keys do not depend on
            them.

    Returns:
        `dict[str, Origin]`: By our key.
    """
    origins = {}
    for key, shape in shapes.items():
        official = renamed(key, RENAMES)
        if joint := re.search(r"\.to_(qkv|kv)\.", official):
            part = joint[1].index(re.search(r"\.to_([qkv])\.", key)[1]), len(joint[1])
            origins[key] = Origin({official: (part[1] * shape[0], *shape[1:])}, part)
        elif ".up_proj." in official:
            half = (shape[0] // 2, *shape[1:])
            origins[key] = Origin({official: half, official.replace(".up_proj.", ".gate_proj."): half})
        else:
            origins[key] = Origin({official: (1, *shape) if key.endswith("size_scales") else shape})
    return origins


def _published_config(transformer: Path) -> dict[str, Any]:
    """What `config.json` beside a transformer says; nothing where there is none, with a warning."""
    path = transformer.with_name("config.json")
    if not path.is_file():
        logger.warning(
            f"There is no config.json beside {transformer}. RoPE is taken to be that of the published models, and what"
            " tokens see that of the table in the file."
        )
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} beside it must be read, too, but it is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} beside it must hold a JSON object")
    return config


def switti_config(official: OfficialTransformer) -> dict[str, Any]:
    """
    Configuration of the [`ScaleTextTransformer2DModel`] that an official Switti is.

    `config.json` beside the file has the last word, as in the official code: that draws by `use_ar`, whatever the
    table says by which it was trained.

    Args:
        official ([`OfficialTransformer`]): The transformer.

    Returns:
        `dict[str, Any]`: Arguments of the model class.

    Raises:
        ValueError: If its width does not fit its heads, or `config.json` cannot be read.
    """
    shapes, config = official.shapes, _published_config(official.path)
    depth = count_indices(shapes, r"blocks\.(\d+)\.")
    blocks = [f"blocks.{index}" for index in range(depth)]
    width = agreed_size(shapes, 64 * depth, ("pos_start", 2), ("lvl_embed.weight", 1), ("head.weight", 1))
    hidden = agreed_size(shapes, 8 * width // 3, *((f"{block}.ffn.gate_proj.weight", 0) for block in blocks))
    is_causal = config.get("use_ar", has_causal_table(official.state))
    return {
        **block_sizes(official, depth, width, hidden, heads=depth),
        "cross_attention_dim": agreed_size(
            shapes, 2048, *((f"{block}.cross_attn.to_kv.weight", 1) for block in blocks)
        ),
        "pooled_projection_dim": agreed_size(shapes, 1280, ("text_pooler.weight", 1)),
        "attention_pattern": "causal" if check_bool("config.json: use_ar", is_causal) else "markov",
        "rope_theta": check_number("config.json: rope_theta", config.get("rope_theta", 10000.0), over=0),
        "rope_extent": check_number("config.json: rope_size", config.get("rope_size", 128.0), over=0),
    }


SWITTI = Family(
    title="Switti",
    prefix="blocks.0.cross_attn.",
    published=(
        PublishedSettings("Switti", 30, 7.0, 400, 0.95, KNOWN_SCALES[512], 8, 0.1),
        PublishedSettings("Switti-1024", 30, 7.0, 400, 0.95, KNOWN_SCALES[1024], 11, 0.1),
    ),
    source="https://github.com/yandex-research/switti",
    licence={"license": "unknown"},
    licence_note="The authors publish their code under Apache-2.0. Which licence the weights have is not known here:"
    " pages of them on the Hub (https://huggingface.co/yresearch) named none in 2025. Read there, or ask the authors,"
    " what you may do with the weights. The text encoders have licences of their own.",
    citation="""@article{voronov2024switti,
  title   = {Switti: Designing Scale-Wise Transformers for Text-to-Image Synthesis},
  author  = {Voronov, Anton and Kuznedelev, Denis and Khoroshikh, Mikhail and Khrulkov, Valentin and
             Baranchuk, Dmitry},
  journal = {arXiv preprint arXiv:2412.01819},
  year    = {2024}
}""",
    attention_pattern="markov",
    transformer=ScaleTextTransformer2DModel,
    pipeline=SRDDTextPipeline,
    config=switti_config,
    origins=switti_origins,
    left_out=BUFFERS,
    about="It draws from texts, which CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 encode. The soft mix of codes at the"
    " middle scales in its authors' examples (`more_smooth`) has no tokens and is left out.",
)
