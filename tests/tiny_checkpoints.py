"""
Official checkpoints of all families, random and small, and how all of them draw. Names and shapes are facts about the
published ones.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_models import POOLED_DIM, TEXT_DIM

from srdd import MultiScaleVQModel


FIXTURES = Path(__file__).parent / "conversion" / "fixtures"
WIDTH, HEADS, DEPTH, NUM_CLASSES, CODEBOOK_SIZE, CHANNELS = 24, 3, 3, 10, 64, 8
SIDES = [1, 2, 3, 5]


def tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a random checkpoint. numpy promises that `RandomState` never changes its stream."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    values = torch.from_numpy(values)
    if "scale_mul" in key:
        return math.log(4) + 0.2 * values
    if len(shape) == 1:
        return float("norm" in key and key.endswith(".weight")) + 0.1 * values
    gain = {"head.weight": 3.0, "ns_head.weight": 3.0, "quantize.embedding.weight": 0.5}.get(key, 1.0)
    scale = 1.0 if key.startswith(("class_emb", "pos_", "lvl_embed")) else math.prod(shape[1:]) ** -0.5
    return values * gain * scale


@cache
def tokenizer_state() -> dict[str, torch.Tensor]:
    """Of the keys and shapes of the official tokenizer, small."""
    facts = json.loads((FIXTURES / "shared_adaln_no_norm.json").read_text())
    return {
        key: torch.zeros(shape) if key.endswith("ema_vocab_hit_SV") else tensor(key, tuple(shape))
        for key, shape in facts["tokenizer_shapes"].items()
        if "quant_resi" not in key
    } | {
        f"quantize.quant_resi.qresi_ls.{index}.{name}": tensor(f"{index}.{name}", shape)
        for index in range(4)
        for name, shape in (("weight", (CHANNELS, CHANNELS, 3, 3)), ("bias", (CHANNELS,)))
    }


def tables(sides, pattern) -> dict[str, torch.Tensor]:
    """Which scale a token is of, and which tokens it must not see."""
    scale_ids = torch.cat([torch.full((1, side**2), scale) for scale, side in enumerate(sides)], dim=1)
    allowed = scale_ids.mT >= scale_ids if pattern == "causal" else scale_ids.mT == scale_ids
    return {"lvl_1L": scale_ids, "attn_bias_for_masking": torch.where(allowed, 0.0, -torch.inf)[None, None]}


def var_state(sides=SIDES, pattern="causal", depth=DEPTH) -> dict[str, torch.Tensor]:
    """A transformer's, of VAR and of MVAR, with the tables that their code derives and saves."""
    num_tokens = sum(side**2 for side in sides)
    shapes = {
        "pos_start": (1, 1, WIDTH),
        "pos_1LC": (1, num_tokens, WIDTH),
        "lvl_embed.weight": (len(sides), WIDTH),
        "class_emb.weight": (NUM_CLASSES + 1, WIDTH),
        "word_embed.weight": (WIDTH, CHANNELS),
        "word_embed.bias": (WIDTH,),
        "head_nm.ada_lin.1.weight": (2 * WIDTH, WIDTH),
        "head_nm.ada_lin.1.bias": (2 * WIDTH,),
        "head.weight": (CODEBOOK_SIZE, WIDTH),
        "head.bias": (CODEBOOK_SIZE,),
    }
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= {
            f"{block}.attn.scale_mul_1H11": (1, HEADS, 1, 1),
            f"{block}.attn.q_bias": (WIDTH,),
            f"{block}.attn.v_bias": (WIDTH,),
            f"{block}.attn.mat_qkv.weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"{block}.attn.proj.bias": (WIDTH,),
            f"{block}.ffn.fc1.weight": (4 * WIDTH, WIDTH),
            f"{block}.ffn.fc1.bias": (4 * WIDTH,),
            f"{block}.ffn.fc2.weight": (WIDTH, 4 * WIDTH),
            f"{block}.ffn.fc2.bias": (WIDTH,),
            f"{block}.ada_lin.1.weight": (6 * WIDTH, WIDTH),
            f"{block}.ada_lin.1.bias": (6 * WIDTH,),
        }
    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    state |= {f"blocks.{index}.attn.zero_k_bias": torch.zeros(WIDTH) for index in range(depth)}
    return {**state, **tables(sides, pattern)}


def hmar_state(num_shared=1) -> dict[str, torch.Tensor]:
    """HMAR's: of blocks that both halves share, of the half that predicts scale after scale, and of the masked one."""
    state = {}
    for key, value in var_state(pattern="markov").items():
        if block := re.match(r"blocks\.(\d+)\.", key):
            index, rest = int(block[1]), key[block.end() :]
            if index < num_shared:
                state[f"base_blocks.{index}.{rest}"] = value
            else:
                state[f"ns_blocks.{index - num_shared}.{rest}"] = value
                state[f"mask_blocks.{index - num_shared}.{rest}"] = value + 1
        elif key.startswith("head"):
            state |= {f"ns_{key}": value, f"mask_{key}": value + 1}
        else:
            state["word_embed_bias" if key == "word_embed.bias" else key] = value
    return {**state, "mask_embed.weight": torch.ones(1, WIDTH)}


def markov_var_state(sides=SIDES, depth=DEPTH) -> dict[str, torch.Tensor]:
    """Markov-VAR's. The pool of its history has heads of 8 channels in place of 128."""
    linears = {
        "word_embed": (WIDTH, CHANNELS),
        "lvl_embed.mlp.0": (WIDTH, 256),
        "lvl_embed.mlp.2": (WIDTH, WIDTH),
        "head_nm.ada_lin.1": (2 * WIDTH, WIDTH),
        "head": (CODEBOOK_SIZE, WIDTH),
        "context_pool.ca.proj": (WIDTH, WIDTH),
        "head_context": (WIDTH, 2 * WIDTH),
    }
    shapes = {
        "class_emb.weight": (NUM_CLASSES + 1, WIDTH),
        "context_pool.ca.mat_q": (1, WIDTH // 8, 8),
        "context_pool.ca.mat_kv.weight": (2 * WIDTH, WIDTH),
        "context_pool.ca.v_bias": (WIDTH,),
    }
    norms = {"norm_x": ("weight", "bias"), "norm_cond": ("weight", "bias"), "head_nm.ln_wo_grad": ("weight",)}
    for block in (f"blocks.{index}" for index in range(depth)):
        linears |= {f"{block}.ada_lin.1": (6 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        shapes |= {
            f"{block}.attn.scale_mul_1H11": (1, HEADS, 1, 1),
            f"{block}.attn.q_bias": (WIDTH,),
            f"{block}.attn.v_bias": (WIDTH,),
            f"{block}.attn.qkv_proj.weight": (3 * WIDTH, WIDTH),
            f"{block}.ffn.gate_proj.weight": (80, WIDTH),
            f"{block}.ffn.up_proj.weight": (80, WIDTH),
            f"{block}.ffn.down_proj.weight": (WIDTH, 80),
        }
        norms[f"{block}.ln_wo_grad"] = ("weight",)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{what}": (WIDTH,) for norm, names in norms.items() for what in names}
    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    state |= {f"{norm}.weight": 1 + 2 * tensor(norm, (WIDTH,)) for norm in norms}
    state |= {key: value * value.shape[1] ** -0.5 for key, value in state.items() if re.match(r"lvl.*weight", key)}
    state["context_pool.ca.mat_q"] *= 8  # so that it matters which token is looked at
    attentions = [*(f"blocks.{index}.attn" for index in range(depth)), "context_pool.ca"]
    return {**state, **{f"{name}.zero_k_bias": torch.zeros(WIDTH) for name in attentions}, **tables(sides, "markov")}


def switti_state(sides=SIDES, pattern="markov", depth=DEPTH) -> dict[str, torch.Tensor]:
    """Switti's, which has as many heads as blocks and draws from texts of [`tiny_models.random_texts`]."""
    linears = {
        "word_embed": (WIDTH, CHANNELS),
        "text_pooler": (WIDTH, POOLED_DIM),
        "crop_proj": (WIDTH, WIDTH),
        "head_nm.ada_lin.1": (2 * WIDTH, WIDTH),
        "head": (CODEBOOK_SIZE, WIDTH),
    }
    shapes = {"pos_start": (1, 1, WIDTH), "lvl_embed.weight": (len(sides), WIDTH), "crop_embed.weight": (WIDTH // 8,)}
    for block in (f"blocks.{index}" for index in range(depth)):
        linears |= {
            f"{block}.ada_lin.1": (6 * WIDTH, WIDTH),
            f"{block}.attn.to_qkv": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj": (WIDTH, WIDTH),
            f"{block}.cross_attn.to_q": (WIDTH, WIDTH),
            f"{block}.cross_attn.to_kv": (2 * WIDTH, TEXT_DIM),
            f"{block}.cross_attn.proj": (WIDTH, WIDTH),
        }
        shapes |= {
            f"{block}.ffn.gate_proj.weight": (8 * WIDTH // 3, WIDTH),
            f"{block}.ffn.up_proj.weight": (8 * WIDTH // 3, WIDTH),
            f"{block}.ffn.down_proj.weight": (WIDTH, 8 * WIDTH // 3),
            f"{block}.crop_cond_scales": (1, WIDTH),
            f"{block}.attention_y_norm.weight": (TEXT_DIM,),
        }
        norms = [f"{name}_norm{place}" for name in ("self_attention", "cross_attention", "ffn") for place in (1, 2)]
        shapes |= {f"{block}.{norm}.weight": (WIDTH,) for norm in norms}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {**{key: tensor(key, shape) for key, shape in shapes.items()}, **tables(sides, pattern)}


def saved(content, folder: Path, name="model.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


Logits = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def greedy_tokens(
    halves: tuple[Logits, Logits], vqvae: MultiScaleVQModel, batch_size: int, sides, weights: Sequence[float]
) -> torch.Tensor:
    """
    The most probable tokens scale after scale under `(1 + w) cond - w uncond`. Both halves give logits of all tokens
    of which they get the inputs.
    """
    latents, inputs, drawn = torch.zeros(batch_size, CHANNELS, sides[-1], sides[-1]), [], []
    for side, weight in zip(sides, weights, strict=True):
        inputs.append(F.interpolate(latents, size=(side, side), mode="area").flatten(2).mT)
        cond, uncond = (half(torch.cat(inputs, dim=1))[:, -(side**2) :] for half in halves)
        drawn.append(((1 + weight) * cond - weight * uncond).argmax(dim=-1))
        latents = latents + vqvae.residual_map(drawn[-1].unflatten(1, (side, side)))
    return torch.cat(drawn, dim=1)
