"""
Markov-VAR (github.com/luokairo/Markov-VAR): scales that see a summary of the last three in their inputs.

Two things are folded, which changes nothing: the gains of RMS norms into the scales of the AdaLN behind them, and the
network of scale embeddings into a table. What joins inputs and history is two projections here, so that a summary is
projected once for a scale. The window of three scales and the base of rotary positions leave no trace in the tensors.
"""

import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import OfficialTransformer, Shapes, agreed_size, block_sizes, count_indices
from srdd.conversion.official_layout import TRANSFORMER_RENAMES, Origin, renamed
from srdd.models import ScaleHistoryTransformer2DModel


RENAMES = (
    (r"^scale_embed\.weight$", "lvl_embed"),
    (r"^history\.norm\.", "norm_x."),
    (r"^history\.norm_history\.", "norm_cond."),
    (r"^history\.query$", "context_pool.ca.mat_q"),
    (r"^history\.to_[kv]\.weight$", "context_pool.ca.mat_kv.weight"),
    (r"^history\.to_v\.bias$", "context_pool.ca.v_bias"),
    (r"^history\.to_out\.0\.", "context_pool.ca.proj."),
    (r"^history\.proj_(history|out)\.", "head_context."),
    (r"\.attn\.to_[qkv]\.weight$", ".attn.qkv_proj.weight"),
    (r"\.ff\.net\.0\.proj\.", ".ffn.up_proj."),
    (r"\.ff\.net\.2\.", ".ffn.down_proj."),
    *TRANSFORMER_RENAMES,
)

# Tables that the official code derives from its configuration and saves all the same.
BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|(blocks\.\d+\.attn|context_pool\.ca)\.zero_k_bias")

# Of the waves that scales are numbered by.
NUM_WAVES, LONGEST_PERIOD = 256, 10000


def scale_table(
    weight: torch.Tensor, bias: torch.Tensor, out_weight: torch.Tensor, out_bias: torch.Tensor, num_scales: int
) -> torch.Tensor:
    """Embeddings `(num_scales, dim)`: of a scale's number by cosines and sines, through a network of two layers."""
    exponents = torch.arange(NUM_WAVES // 2) / (NUM_WAVES // 2)
    phases = torch.arange(num_scales).unsqueeze(1) * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    hidden = F.linear(torch.cat([phases.cos(), phases.sin()], dim=1), weight.float(), bias.float())
    return F.linear(F.silu(hidden), out_weight.float(), out_bias.float())


def with_gains(rows: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """
    Rows of an AdaLN, or its biases, that do what they did behind a norm with gains: `g (1 + s) = 1 + (g s + g - 1)`.
    The scales are the third and fourth of six parts, or the first of two.
    """
    parts, gains = list(rows.float().split(len(gains))), gains.float()
    for index in (2, 3) if len(parts) == 6 else (0,):
        parts[index] = gains * parts[index] + gains - 1 if rows.ndim == 1 else gains.unsqueeze(1) * parts[index]
    return torch.cat(parts)


def half_of_columns(matrix: torch.Tensor, index: int) -> torch.Tensor:
    """One of two halves."""
    return matrix.chunk(2, dim=1)[index]


def markov_var_origins(shapes: Shapes, official_shapes: Shapes) -> dict[str, Origin]:
    """
    Origins of a [`ScaleHistoryTransformer2DModel`]'s tensors.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Its state dict's keys and shapes.
        official_shapes (`Mapping[str, tuple[int, ...]]`): Those of the checkpoint; Markov-VAR's keys do not depend on
            them.

    Returns:
        `dict[str, Origin]`: By our key.
    """
    origins = {}
    for key, shape in shapes.items():
        official = renamed(key, RENAMES)
        if key == "start_pos_embed" or key.endswith(".attn.to_k.bias"):
            origins[key] = Origin({})
        elif official == "lvl_embed":
            num_scales, dim = shape
            first = {"lvl_embed.mlp.0.weight": (dim, NUM_WAVES), "lvl_embed.mlp.0.bias": (dim,)}
            second = {"lvl_embed.mlp.2.weight": (dim, dim), "lvl_embed.mlp.2.bias": (dim,)}
            origins[key] = Origin({**first, **second}, made_by=partial(scale_table, num_scales=num_scales))
        elif official.endswith((".qkv_proj.weight", ".mat_kv.weight")):
            letters = "qkv" if ".qkv_proj." in official else "kv"
            part = letters.index(re.search(r"\.to_([qkv])\.", key)[1]), len(letters)
            origins[key] = Origin({official: (part[1] * shape[0], shape[1])}, part)
        elif official == "head_context.weight":
            half = partial(half_of_columns, index=int(".proj_history." in key))
            origins[key] = Origin({official: (shape[0], 2 * shape[1])}, made_by=half)
        elif ".up_proj." in official:
            half_shape = (shape[0] // 2, shape[1])
            origins[key] = Origin({official: half_shape, official.replace(".up_proj.", ".gate_proj."): half_shape})
        elif ".ada_lin.1." in official:
            norm = official.split(".ada_lin.")[0] + ".ln_wo_grad.weight"
            dim = shape[0] // (2 if key.startswith("adaln_out.") else 6)
            origins[key] = Origin({official: shape, norm: (dim,)}, made_by=with_gains)
        elif official.endswith(".scale_mul_1H11"):
            origins[key] = Origin({official: (1, shape[0], 1, 1)})
        else:
            origins[key] = Origin({official: (1, *shape) if key == "history.query" else shape})
    return origins


def markov_var_config(official: OfficialTransformer) -> dict[str, Any]:
    """
    Configuration of the [`ScaleHistoryTransformer2DModel`] that an official Markov-VAR is.

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
        shapes, 64 * depth, ("class_emb.weight", 1), ("word_embed.weight", 0), ("norm_x.weight", 0), ("head.weight", 1)
    )
    hidden = agreed_size(shapes, 11 * width // 4, *((f"{block}.ffn.gate_proj.weight", 0) for block in blocks))
    heads = agreed_size(shapes, depth, *((f"{block}.attn.scale_mul_1H11", 1) for block in blocks))
    return {
        **block_sizes(official, depth, width, hidden, heads),
        "num_classes": agreed_size(shapes, 1001, ("class_emb.weight", 0)) - 1,
        "qk_norm": any(key.endswith(".attn.scale_mul_1H11") for key in shapes),
        "history_head_dim": agreed_size(shapes, 128, ("context_pool.ca.mat_q", 2)),
        "drop_path_rate": 0.1 * depth / 24,
    }


MARKOV_VAR = Family(
    title="Markov-VAR",
    prefix="context_pool.",
    published=(PublishedSettings("d24", 24, 6.0, 900, 0.95),),
    source="https://github.com/luokairo/Markov-VAR",
    licence={"license": "mit"},
    licence_note="The authors publish their code under the MIT licence. What holds for the weights is to be read on"
    " their page, https://huggingface.co/kairoliu/Markov-VAR. The tokenizer is VAR's, under MIT, too.",
    citation="""@article{zhang2025markovian,
  title   = {Markovian Scale Prediction: A New Era of Visual Autoregressive Generation},
  author  = {Zhang, Yu and Liu, Jingyi and Shi, Yiwei and Zhang, Qi and Miao, Duoqian and Wang, Changwei and
             Cao, Longbing},
  journal = {arXiv preprint arXiv:2511.23334},
  year    = {2025}
}""",
    attention_pattern="markov",
    model_names=("var_wo_ddp",),
    transformer=ScaleHistoryTransformer2DModel,
    config=markov_var_config,
    origins=markov_var_origins,
    left_out=BUFFERS,
    about="A scale gets a summary of the last three scales with its inputs (`ScaleHistoryTransformer2DModel`).",
)
