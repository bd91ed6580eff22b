"""
Markov-VAR, whose scales have a history, against a plain version of its network on tiny random weights under the
official keys.

Shape legend: B batch, N tokens, D width, H heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import (
    CHANNELS,
    DEPTH,
    HEADS,
    NUM_CLASSES,
    SIDES,
    WIDTH,
    greedy_tokens,
    markov_var_state,
    saved,
    tokenizer_state,
)

from srdd import ScaleHistoryTransformer2DModel, ScaleScheduler, SRDDPipeline
from srdd.conversion import convert_checkpoints
from srdd.conversion.__main__ import main


NUM_TOKENS = sum(side**2 for side in SIDES)
LABELS = torch.tensor([1, 7])
NULL = torch.full((2,), NUM_CLASSES)


def rotated(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Heads `(B, H, N, D/H)` with their places: rows for the first half of the channels, columns for the second."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-2 * torch.arange(half // 2) / half)
    places = [
        (SIDES[-1] * row / side, SIDES[-1] * column / side)
        for side in SIDES
        for row in range(side)
        for column in range(side)
    ]
    places = torch.tensor(places[:num_tokens])  # (N, 2)
    angles = (places[..., None] * frequencies).repeat(1, 1, 2).flatten(1)  # (N, D/H)
    partner = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * angles.cos() + partner * angles.sin()


def plain_logits(state, inputs, labels, input_labels=None) -> torch.Tensor:
    """Markov-VAR's training forward over the first scales, in one piece; inputs may be told another class."""
    linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    rms = lambda x, name: F.rms_norm(x, (WIDTH,), state[f"{name}.weight"], eps=1e-6)  # noqa: E731
    num_tokens = inputs.shape[1]
    condition = state["class_emb.weight"][labels]
    told = condition if input_labels is None else state["class_emb.weight"][input_labels]

    counts, seen, parts = [side**2 for side in SIDES], [], [condition[:, None]]
    num_scales = [sum(counts[:number]) for number in range(len(SIDES) + 1)].index(num_tokens)
    for part in inputs.split(counts[:num_scales], dim=1)[1:]:
        seen.append(norm(linear(part, "word_embed"), "norm_x"))
        past = torch.cat(seen[-3:], dim=1)
        key, value = linear(past, "context_pool.ca.mat_kv").chunk(2, dim=-1)
        key, value = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (key, value + state["context_pool.ca.v_bias"]))
        weights = (state["context_pool.ca.mat_q"].unsqueeze(2) @ key.mT / math.sqrt(8)).softmax(dim=-1)  # (B, H, 1, N)
        pooled = linear((weights @ value).transpose(1, 2).flatten(2), "context_pool.ca.proj")  # (B, 1, D)
        summary = norm(pooled + told[:, None], "norm_cond").expand_as(seen[-1])
        parts.append(linear(torch.cat([seen[-1], summary], dim=-1), "head_context"))
    scale_ids = state["lvl_1L"][0, :num_tokens]
    phases = scale_ids[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = linear(torch.cat([phases.cos(), phases.sin()], dim=1), "lvl_embed.mlp.0")
    x = torch.cat(parts, dim=1) + linear(F.silu(hidden), "lvl_embed.mlp.2")

    activated, allowed = F.silu(condition)[:, None], scale_ids[:, None] == scale_ids
    for name in (f"blocks.{index}" for index in range(DEPTH)):
        gate1, gate2, scale1, scale2, shift1, shift2 = linear(activated, f"{name}.ada_lin.1").chunk(6, dim=-1)
        modulated = rms(x, f"{name}.ln_wo_grad") * (1 + scale1) + shift1
        bias = torch.cat([state[f"{name}.attn.q_bias"], torch.zeros(WIDTH), state[f"{name}.attn.v_bias"]])
        states = F.linear(modulated, state[f"{name}.attn.qkv_proj.weight"], bias).unflatten(-1, (3, HEADS, -1))
        query, key, value = states.permute(2, 0, 3, 1, 4)  # (B, H, N, D/H) each
        query = F.normalize(query, dim=-1) * state[f"{name}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        query, key = rotated(query, num_tokens), rotated(F.normalize(key, dim=-1), num_tokens)
        weights = (query @ key.mT).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        x = x + gate1 * linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        modulated = rms(x, f"{name}.ln_wo_grad") * (1 + scale2) + shift2
        hidden = F.silu(linear(modulated, f"{name}.ffn.gate_proj")) * linear(modulated, f"{name}.ffn.up_proj")
        x = x + gate2 * linear(hidden, f"{name}.ffn.down_proj")
    scale, shift = linear(activated, "head_nm.ada_lin.1").chunk(2, dim=-1)
    return linear(rms(x, "head_nm.ln_wo_grad") * (1 + scale) + shift, "head")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return saved(tokenizer_state(), tmp_path_factory.mktemp("tokenizer"), "vae.pth")


@torch.no_grad()
def test_folders_compute_what_the_plain_network_does(vae, tmp_path):
    state, output = markov_var_state(), tmp_path / "out"
    path = saved({"epoch": 1, "trainer": {"var_wo_ddp": state}}, tmp_path, "d3.pth")
    main(["--vae", str(vae), "--transformer", str(path), "--output", str(output)])
    pipe = SRDDPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    assert isinstance(transformer, ScaleHistoryTransformer2DModel)
    assert (transformer.config.history_window, transformer.config.history_head_dim) == (3, 8)
    sampling = {"top_k": 900, "top_p": 0.95, "guidance_scale": 6.0}
    assert {name: pipe.scheduler.config[name] for name in sampling} == sampling

    inputs = torch.randn(2, NUM_TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    for labels, input_labels in ((LABELS, None), (NULL, None), (NULL, LABELS)):
        logits = transformer(inputs, class_labels=labels, history_class_labels=input_labels).sample
        assert logits.std() > 0.5
        expected = plain_logits(state, inputs, labels, input_labels)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, temperature=0.0)
    # The unconditional half's inputs are told the image's class, but for the coarsest scale.
    halves = [lambda x: plain_logits(state, x, LABELS), lambda x: plain_logits(state, x, NULL, LABELS)]
    for cfg in (0.0, 1.4):
        token_ids = pipe(LABELS.tolist(), guidance_scale=1 + cfg, output_type="latent").token_ids
        weights = [cfg * k / (len(SIDES) - 1) for k in range(len(SIDES))]
        assert torch.equal(token_ids, greedy_tokens(halves, pipe.vqvae, 2, SIDES, weights))
        assert len(token_ids.unique()) > 4


def test_keys_tell_the_family_and_shapes_the_architecture(vae, tmp_path):
    path = saved(markov_var_state(), tmp_path)
    config = convert_checkpoints(vae, path).transformer.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (DEPTH, HEADS, 8)
    assert (config.mlp_ratio, config.num_classes, config.qk_norm) == (80 / WIDTH, NUM_CLASSES, True)
    assert (config.attention_pattern, config.drop_path_rate) == ("markov", pytest.approx(0.1 * DEPTH / 24))
    assert convert_checkpoints(vae, path, "causal", family="markov-var").transformer.config.history_window == 3
    with pytest.raises(ValueError, match="context_pool.ca.mat_q is unknown"):
        convert_checkpoints(vae, path, family="var")
    with pytest.raises(ValueError, match="`attention_windows` must be None with Markov-VAR, whose .* no windows"):
        convert_checkpoints(vae, path, attention_windows=[0, 0, 3, 3])


@torch.no_grad()
def test_models_of_256_pixels_need_no_table_of_scales(vae, tmp_path):
    state = markov_var_state(depth=1)
    del state["lvl_1L"], state["attn_bias_for_masking"]
    config = convert_checkpoints(vae, saved(state, tmp_path)).transformer.config
    assert [size[0] for size in config.scale_sizes] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_folded_is_folded_in_float32(dtype, vae, tmp_path):
    state = markov_var_state()
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    rounded = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    found = convert_checkpoints(vae, saved(half, tmp_path)).transformer.state_dict()
    expected = convert_checkpoints(vae, saved(rounded, tmp_path, "rounded.pth")).transformer.state_dict()
    assert all(torch.equal(value, expected[key].to(dtype)) for key, value in found.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_context.bias": None}, "head_context.bias is missing"),
        ({"blocks.1.ln_wo_grad.weight": None}, "blocks.1.ln_wo_grad.weight is missing"),
        ({"lvl_embed.mlp.0.weight": torch.ones(WIDTH, 128)}, r"lvl_embed.mlp.0.weight must have shape \(24, 256\)"),
        ({"norm_cond.bias": torch.full((WIDTH,), torch.nan)}, "norm_cond.bias is not finite"),
        ({"pos_1LC": torch.ones(1, NUM_TOKENS, WIDTH)}, "pos_1LC is unknown"),
        ({"context_pool.ca.mat_q": torch.ones(1, 2, 7)}, "`history_head_dim`, got 8, 3 and 7"),
    ],
)
def test_other_checkpoints_are_refused(change, message, vae, tmp_path):
    state = {key: value for key, value in {**markov_var_state(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_checkpoints(vae, saved(state, tmp_path))
