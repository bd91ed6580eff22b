"""
The transformer with a history against a plain version of Markov-VAR's network.

Shape legend: B batch, N tokens, D width, H heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, tiny_history_transformer
from torch._dynamo.utils import counters

from srdd import ScaleHistoryTransformer2DModel, ScaleKVCache
from srdd.models import MaskedScaleAttnProcessor, ModulationCache
from srdd.models.attention_scale_history import history_rotary_embedding


PATTERNS = ("causal", "markov", "banded")
SCALE_SIZES = [[1, 1], [1, 2], [2, 3], [3, 3], [4, 4]]
TOKENS = [slice(0, 1), slice(1, 3), slice(3, 9), slice(9, 18), slice(18, 34)]
NUM_TOKENS = 34
LAST = len(SCALE_SIZES) - 1
LABELS = torch.tensor([2, 5])


def make_transformer(attention_pattern="markov", **overrides) -> ScaleHistoryTransformer2DModel:
    return tiny_history_transformer(attention_pattern, **{"scale_sizes": SCALE_SIZES, **overrides})


def random_inputs(batch_size=2, num_tokens=NUM_TOKENS, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_tokens, LATENT_CHANNELS, generator=generator)


def of_scales(inputs: torch.Tensor, scales) -> torch.Tensor:
    return torch.cat([inputs[:, TOKENS[scale]] for scale in scales], dim=1)


def timesteps_of(scales) -> list[int]:
    return [LAST - scale for scale in scales]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


def places(scales) -> list[tuple[int, float, float]]:
    """Scale, row and column of every token, in units of the finest scale."""
    height, width = SCALE_SIZES[-1]
    return [
        (scale, height * row / rows, width * column / columns)
        for scale in scales
        for rows, columns in (SCALE_SIZES[scale],)
        for row in range(rows)
        for column in range(columns)
    ]


def placed(head: torch.Tensor, row: float, column: float, theta: float) -> torch.Tensor:
    """A head `(..., D / H)` at a place: pairs of channels, half a head apart, the two of a pair by other angles."""
    half, channels = head.shape[-1] // 2, head.unbind(-1)
    first, second = [], []
    for pair in range(half):
        frequency = theta ** (-2 * (pair % (half // 2)) / half)
        a, b = channels[pair], channels[pair + half]
        first.append(a * math.cos(row * frequency) - b * math.sin(row * frequency))
        second.append(b * math.cos(column * frequency) + a * math.sin(column * frequency))
    return torch.stack(first + second, dim=-1)


def plain_attention(model, attn, x: torch.Tensor, scales) -> torch.Tensor:
    heads = attn.heads
    query, key, value = (to(x).unflatten(-1, (heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    scale = 0.25 / math.sqrt(query.shape[-1])
    if model.config.qk_norm:
        query, key = (states / states.norm(dim=-1, keepdim=True) for states in (query, key))
        query, scale = query * attn.query_scale.clamp(max=math.log(100)).exp(), 1.0
    tokens, theta = places(scales), model.config.rope_theta
    query, key = (
        torch.stack([placed(states[:, n], row, column, theta) for n, (_, row, column) in enumerate(tokens)], dim=1)
        for states in (query, key)
    )
    order = {scale: index for index, scale in enumerate(scales)}
    reach = {"markov": 0, "banded": 1, "causal": LAST}[model.config.attention_pattern]
    sees = [[0 <= order[mine] - order[other] <= reach for other, *_ in tokens] for mine, *_ in tokens]
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    weights = scores.masked_fill(~torch.tensor(sees), -math.inf).softmax(dim=-1)
    return attn.to_out[0](torch.einsum("bhnm,bmhd->bnhd", weights, value).flatten(2))


def plain_pool(history, states: torch.Tensor) -> torch.Tensor:
    """`(B, D)` of all tokens of a history, head by head."""
    key, value = (to(states).unflatten(-1, (len(history.query), -1)) for to in (history.to_k, history.to_v))
    pooled = []
    for head, query in enumerate(history.query):
        weights = (key[:, :, head] @ query / math.sqrt(len(query))).softmax(dim=1)
        pooled.append((weights[..., None] * value[:, :, head]).sum(dim=1))
    return history.to_out[0](torch.cat(pooled, dim=-1))


def plain_inputs(model, inputs, embedding, scales) -> torch.Tensor:
    """What the blocks get, without the embeddings of start and scale: scale after scale, with those before at hand."""
    history, seen, joined, start = model.history, [], [], 0
    for scale in scales:
        count = TOKENS[scale].stop - TOKENS[scale].start
        own, start = model.proj_in(inputs[:, start : start + count]), start + count
        if scale == 0:
            joined.append(embedding[:, None] * torch.ones(1, count, 1))
            continue
        seen.append(layer_norm(own, history.norm))
        pooled = plain_pool(history, torch.cat(seen[-model.config.history_window :], dim=1))
        summary = layer_norm(pooled + embedding, history.norm_history)[:, None].expand_as(seen[-1])
        joined.append(history.proj_out(seen[-1]) + history.proj_history(summary))
    return torch.cat(joined, dim=1)


def plain_logits(model, inputs, labels=LABELS, scales=tuple(range(LAST + 1))) -> torch.Tensor:
    """Markov-VAR's training forward over some scales, in one piece."""
    embedding = model.class_embed.weight[labels]  # (B, D)
    x = plain_inputs(model, inputs, embedding, scales)
    if scales[0] == 0:
        x = torch.cat([x[:, :1] + model.start_pos_embed, x[:, 1:]], dim=1)
    x = x + torch.stack([model.scale_embed.weight[scale] for scale, *_ in places(scales)])
    condition = silu(embedding)
    for block in model.blocks:
        six = block.adaln(condition).view(len(x), 6, 1, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = (six[:, index] for index in range(6))
        x = x + plain_attention(model, block.attn, rms(x) * (1 + scale1) + shift1, scales) * gate1
        wide, gate = block.ff.net[0].proj(rms(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        x = x + block.ff.net[2](wide * silu(gate)) * gate2
    scale, shift = model.adaln_out(condition)[:, None].chunk(2, dim=-1)
    return model.proj_out(rms(x) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_those_of_a_plain_network(pattern):
    model, inputs = make_transformer(pattern), random_inputs()
    logits = model(inputs, class_labels=LABELS).sample
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, plain_logits(model, inputs), atol=1e-5, rtol=0)
    assert torch.equal(model(inputs, class_labels=LABELS, return_dict=False)[0], logits)
    # One call under a mask, and fused projections.
    model.set_attn_processor(MaskedScaleAttnProcessor())
    torch.testing.assert_close(model(inputs, class_labels=LABELS).sample, logits, atol=1e-5, rtol=0)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(inputs, class_labels=LABELS).sample, logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [{"history_window": 1}, {"history_window": 2}, {"history_window": 100}, {"history_head_dim": 4}]
    + [{"qk_norm": False}, {"rope_theta": 20.0, "mlp_ratio": 1.5}],
    ids=str,
)
def test_other_windows_heads_and_positions(overrides):
    model, inputs = make_transformer(**overrides), random_inputs()
    logits = model(inputs, class_labels=LABELS).sample
    torch.testing.assert_close(logits, plain_logits(model, inputs), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0, 2, 4), (0, 1, 3, 4), (1, 2, 4), (3,), (0,)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_history_is_of_the_last_scales_that_were_visited(pattern, scales):
    model = make_transformer(pattern, history_window=2)
    inputs = of_scales(random_inputs(), scales)
    logits = model(inputs, timesteps_of(scales), LABELS).sample
    torch.testing.assert_close(logits, plain_logits(model, inputs, LABELS, scales), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_scale_depends_on_to_the_last_bit():
    model, inputs = make_transformer("markov"), random_inputs()
    before = model(inputs, class_labels=LABELS).sample
    for changed in range(LAST + 1):
        others = inputs.clone()
        others[:, TOKENS[changed]] += 1.0
        after = model(others, class_labels=LABELS).sample
        for scale in range(LAST + 1):
            seen = changed > 0 and 0 <= scale - changed < 3  # the coarsest scale's inputs are not read
            assert torch.equal(before[:, TOKENS[scale]], after[:, TOKENS[scale]]) == (not seen), (scale, changed)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_gradients_are_those_of_a_plain_network(pattern, checkpointing):
    model = make_transformer(pattern, class_dropout_prob=0.0).train()
    targets = torch.randint(CODEBOOK_SIZE, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = []
    for forward in (lambda x: model(x, class_labels=LABELS).sample, lambda x: plain_logits(model, x)):
        model.zero_grad()
        F.cross_entropy(forward(random_inputs()).transpose(1, 2), targets).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("keeps_own_scale", [True, False])
@pytest.mark.parametrize("scales", [(0, 1, 2, 3, 4), (0, 2, 4), (1, 3, 4)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scale_by_scale_with_caches_is_the_forward_over_all_scales(pattern, scales, keeps_own_scale):
    model = make_transformer(pattern, history_window=2)
    assert pattern not in model.patterns_without_cache
    inputs = [random_inputs()[:, TOKENS[scale]] for scale in scales]
    expected = model(torch.cat(inputs, dim=1), timesteps_of(scales), LABELS).sample
    cache, stored = ScaleKVCache(NUM_TOKENS, keeps_own_scale), ModulationCache()
    told = {"class_labels": LABELS, "kv_cache": cache, "modulation_cache": stored}
    logits = [model(x, timestep, **told).sample for x, timestep in zip(inputs, timesteps_of(scales))]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)
    # Two layers of blocks, and that of the history.
    expected = {2} if pattern == "markov" and not keeps_own_scale else {0, 1, 2}
    assert cache.buffers.keys() == expected


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_takes_several_scales_at_once(pattern):
    model, inputs, cache = make_transformer(pattern), random_inputs(), ScaleKVCache()
    expected = model(inputs, class_labels=LABELS).sample
    parts = (0, 1), (2, 3), (4,)
    logits = [model(of_scales(inputs, part), timesteps_of(part), LABELS, kv_cache=cache).sample for part in parts]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("keeps_own_scale", [True, False])
def test_a_further_pass_replaces_what_the_history_holds_of_its_scale(keeps_own_scale):
    model, inputs = make_transformer(), random_inputs()
    cache, once = ScaleKVCache(None, keeps_own_scale), ScaleKVCache(None, keeps_own_scale)
    for scale in range(LAST):
        model(random_inputs(seed=9)[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache)
    for scale in range(LAST):
        # A pass at a coarse scale must not see what an earlier pass left of the finer ones.
        again = model(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache).sample
        assert torch.equal(again, model(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=once).sample)
    finest = [model(inputs[:, TOKENS[LAST]], 0, LABELS, kv_cache=which).sample for which in (cache, once)]
    assert torch.equal(*finest)


@torch.no_grad()
@pytest.mark.parametrize("keeps_own_scale", [True, False])
def test_a_read_only_cache_is_seen_and_not_changed(keeps_own_scale):
    model, inputs, cache = make_transformer(), random_inputs(), ScaleKVCache(None, keeps_own_scale)
    for scale in (0, 1):
        model(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache)
    stored = cache.get(2, [LAST - 1])[1].clone()
    fine = model(inputs[:, TOKENS[2]], LAST - 2, LABELS, kv_cache=cache.read_only()).sample
    other = model(random_inputs(seed=3)[:, TOKENS[1]], LAST - 1, LABELS, kv_cache=cache.read_only()).sample
    alone = ScaleKVCache()
    model(inputs[:, :1], LAST, LABELS, kv_cache=alone)
    assert torch.equal(other, model(random_inputs(seed=3)[:, TOKENS[1]], LAST - 1, LABELS, kv_cache=alone).sample)
    assert torch.equal(cache.get(2, [LAST - 1])[1], stored)
    assert LAST - 2 not in cache.timesteps
    torch.testing.assert_close(model(inputs[:, TOKENS[2]], LAST - 2, LABELS, kv_cache=cache).sample, fine)


def cache_of(model, inputs, num_scales: int) -> ScaleKVCache:
    """The cache after the coarsest scales, one after the other."""
    cache = ScaleKVCache()
    for scale in range(num_scales):
        model(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scale", range(LAST + 1))
def test_some_tokens_of_a_scale_are_computed_as_all_of_them_are(pattern, scale):
    model, inputs = make_transformer(pattern), random_inputs()
    expected = model(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache_of(model, inputs, scale)).sample
    num_tokens = TOKENS[scale].stop - TOKENS[scale].start
    indices = torch.stack([torch.arange(num_tokens)[::2], torch.arange(num_tokens).flip(0)[::2]])
    indices[1, -1] = indices[1, 0]  # twice
    states = inputs[:, TOKENS[scale]].take_along_dim(indices[..., None], dim=1)
    cache = cache_of(model, inputs, scale + 1)
    logits = model(states, LAST - scale, LABELS, kv_cache=cache, token_indices=indices).sample
    torch.testing.assert_close(logits, expected.take_along_dim(indices[..., None], dim=1), atol=1e-5, rtol=0)
    # One image of the batch, by its row.
    row = torch.tensor([1])
    told = {"kv_cache": cache.select(row), "token_indices": indices[row]}
    logits = model(states[row], LAST - scale, LABELS[row], **told).sample
    expected = expected[row].take_along_dim(indices[row, :, None], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tokens_with_new_inputs_replace_their_part_of_the_history():
    model, inputs = make_transformer(), random_inputs()
    cache, others = cache_of(model, inputs, 3), cache_of(model, inputs, 2)
    indices, states = torch.tensor([[0, 3], [5, 1]]), random_inputs(seed=9)[:, :2]
    mixed = inputs[:, TOKENS[2]].scatter(1, indices[..., None].expand_as(states), states)
    model(mixed, LAST - 2, LABELS, kv_cache=others)
    copied, before = cache.clone(), cache.get(2, [LAST - 2])[0].clone()
    pooled, history = [], model.history.to_out[0]
    history.register_forward_hook(lambda module, args, output: pooled.append(output))
    model(states, LAST - 2, LABELS, kv_cache=copied, token_indices=indices)
    assert torch.equal(cache.get(2, [LAST - 2])[0], before)
    torch.testing.assert_close(copied.get(2, [LAST - 2])[0], others.get(2, [LAST - 2])[0], atol=1e-5, rtol=0)
    # And the summary is of the new ones.
    model(mixed, LAST - 2, LABELS, kv_cache=others)
    torch.testing.assert_close(*pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_some_tokens_need_a_cache_that_keeps_the_others():
    model, inputs = make_transformer(), random_inputs()
    cache = ScaleKVCache(keeps_own_scale=False)
    model(inputs[:, :3], [LAST, LAST - 1], kv_cache=cache)
    told = {"kv_cache": cache, "token_indices": torch.tensor([[0, 1], [1, 0]])}
    with pytest.raises(ValueError, match="`kv_cache` must hold the timestep 3 and .* got one that keeps no scale"):
        model(inputs[:, 1:3], LAST - 1, **told)


@torch.no_grad()
def test_the_history_may_be_told_another_class():
    model, inputs, null = make_transformer(), random_inputs(), torch.tensor([5, 5])
    logits = model(inputs, class_labels=null, history_class_labels=LABELS).sample
    assert torch.equal(model(inputs, history_class_labels=LABELS).sample, logits)
    own = model(inputs, class_labels=null).sample
    assert torch.equal(model(inputs, class_labels=null, history_class_labels=null).sample, own)
    # The coarsest scale has no history, and the null class itself is told nothing else.
    assert torch.equal(logits[:, TOKENS[0]], own[:, TOKENS[0]])
    torch.testing.assert_close(logits[1], own[1], atol=1e-6, rtol=0)
    assert (logits[0, 1:] - own[0, 1:]).abs().max() > 0.01
    embedding, condition = model.class_embed.weight[LABELS], model.class_embed.weight[null]
    joined = plain_inputs(model, inputs, embedding, range(LAST + 1))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1].condition)))
    model(inputs, class_labels=null, history_class_labels=LABELS)
    scales = torch.stack([model.scale_embed.weight[scale] for scale, *_ in places(range(LAST + 1))])
    torch.testing.assert_close(seen[0][0][:, 1:], (joined + scales)[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0][1], silu(condition), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_image_does_not_depend_on_the_others_in_its_batch(pattern):
    model, inputs = make_transformer(pattern), random_inputs()
    logits = model(inputs, class_labels=LABELS).sample
    for image in range(2):
        alone = slice(image, image + 1)
        torch.testing.assert_close(
            model(inputs[alone], class_labels=LABELS[alone]).sample, logits[alone], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_halves_are_merged_before_the_last_layer_as_if_after_it():
    model, inputs = make_transformer(), random_inputs(1).repeat(2, 1, 1)
    conditional, unconditional = model(inputs, class_labels=LABELS).sample.chunk(2)
    for weight in (1.5, torch.tensor(1.5)):
        logits = model(inputs, class_labels=LABELS, guidance_weight=weight).sample
        torch.testing.assert_close(logits, 2.5 * conditional - 1.5 * unconditional, atol=1e-5, rtol=0)


def test_labels_are_dropped_from_the_history_too():
    model, inputs = make_transformer(class_dropout_prob=1.0), random_inputs()
    expected = model(inputs).sample
    assert not torch.allclose(model(inputs, class_labels=LABELS).sample, expected, atol=1e-2)
    model.train()
    torch.testing.assert_close(model(inputs, class_labels=LABELS).sample, expected, atol=1e-6, rtol=0)
    # What the history is told on purpose is not dropped.
    told = model(inputs, class_labels=LABELS, history_class_labels=LABELS).sample
    torch.testing.assert_close(told, model(inputs, history_class_labels=LABELS).sample, atol=1e-6, rtol=0)
    assert not torch.allclose(told, expected, atol=1e-2)


def test_whole_branches_are_dropped_in_training_alone():
    model, inputs = make_transformer(drop_path_rate=0.9, class_dropout_prob=0.0), random_inputs()
    expected = make_transformer()(inputs, class_labels=LABELS).sample
    assert torch.equal(model(inputs, class_labels=LABELS).sample, expected)
    assert not torch.allclose(model.train()(inputs, class_labels=LABELS).sample, expected, atol=1e-2)


@torch.no_grad()
def test_rotary_positions_are_places_in_the_latent_grid():
    cosines, sines = history_rotary_embedding([[1, 2], [4, 1]], [4, 6], 8, 16.0, torch.device("cpu"))
    assert cosines.shape == sines.shape == (1, 6, 1, 8)
    rows, columns = [0, 0, 0, 1, 2, 3], [0, 3, 0, 0, 0, 0]
    angles = torch.tensor([[r, r / 4, r, r / 4, c, c / 4, c, c / 4] for r, c in zip(rows, columns)])
    torch.testing.assert_close(cosines[0, :, 0], angles.cos())
    torch.testing.assert_close(sines[0, :, 0], angles.sin())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    model, inputs = make_transformer("causal"), random_inputs()
    expected = model(inputs, class_labels=LABELS).sample
    model.save_pretrained(tmp_path)
    half = ScaleHistoryTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    logits = half(inputs, class_labels=LABELS).sample
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15) * expected.std() * 4
    cache = ScaleKVCache()
    half(inputs[:, :18], range(LAST, 0, -1), LABELS, kv_cache=cache)
    assert {states.dtype for pair in cache.buffers.values() for states in pair} == {dtype}
    drawn = half(inputs[:, 18:], 0, LABELS, kv_cache=cache).sample
    torch.testing.assert_close(drawn, logits[:, 18:], atol=0.1, rtol=0.1)


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(tmp_path):
    model, inputs = make_transformer("causal", history_window=2), random_inputs()
    model.save_pretrained(tmp_path)
    loaded = ScaleHistoryTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs, class_labels=LABELS).sample, model(inputs, class_labels=LABELS).sample)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert loaded.id2label[1] == "banana"


@torch.no_grad()
def test_lora_by_the_names_of_diffusers(tmp_path):
    model, inputs = make_transformer(), random_inputs()
    expected = model(inputs).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = model(inputs).sample
    assert not torch.allclose(adapted, expected, atol=1e-3)
    # Of two blocks, and of the history without `to_q`, which is a parameter there.
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 4 + 3
    model.save_lora_adapter(tmp_path)
    other = make_transformer()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(other(inputs).sample, adapted)
    model.disable_adapters()
    assert torch.equal(model(inputs).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_compiled_blocks_are_one_graph_for_all_scales(pattern):
    model, plain, inputs = make_transformer(pattern), make_transformer(pattern), random_inputs()
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    counts = []
    for _ in range(2):
        caches = [ScaleKVCache(NUM_TOKENS, False), ScaleKVCache(NUM_TOKENS, False)]
        stored = [ModulationCache(), ModulationCache()]
        for scale in range(1, LAST + 1):
            drawn = [
                each(inputs[:, TOKENS[scale]], LAST - scale, LABELS, kv_cache=cache, modulation_cache=kept).sample
                for each, cache, kept in zip((model, plain), caches, stored)
            ]
            torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)
        counts.append(counters["stats"]["unique_graphs"])
    # Without and with what is stored.
    assert counts == [2, 2]
    assert not counters["graph_break"]


def test_initial_blocks_change_their_input_little():
    torch.manual_seed(0)
    model = ScaleHistoryTransformer2DModel(
        codebook_size=512, num_layers=4, num_attention_heads=4, attention_head_dim=16, scale_sizes=SCALE_SIZES,
        latent_channels=LATENT_CHANNELS, num_classes=5, history_head_dim=32,
    )  # fmt: skip
    std = math.sqrt(1 / (3 * 64))
    expected = {
        "proj_in.weight": std,
        "history.to_k.weight": std,
        "history.to_out.0.weight": std,
        "history.proj_history.weight": std,
        "proj_out.weight": 0.02 * std,
        "blocks.3.attn.to_out.0.weight": std / math.sqrt(8),
        "blocks.3.ff.net.2.weight": std / math.sqrt(8),
    }
    weights = dict(model.named_parameters())
    assert {name: weights[name].std().item() for name in expected} == pytest.approx(expected, rel=0.15)
    assert weights["history.query"].std().item() == pytest.approx(std, rel=0.3)
    assert weights["blocks.1.adaln.weight"][: 2 * 64].std().item() == pytest.approx(1e-5 * std, rel=0.1)
    with torch.no_grad():
        logits = model(random_inputs(), class_labels=LABELS).sample
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(512, (2 * NUM_TOKENS,)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_pattern": "full"}, "`attention_pattern` must be one of"),
        ({"scale_sizes": [2, 1]}, "`scale_sizes` must grow"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4, .* got 6, 2 and 8"),
        ({"history_head_dim": 3}, "`history_head_dim`, got 8, 2 and 3"),
        ({"history_window": 0}, r"`history_window` must be an integer in \[1, 100\], got 0"),
        ({"id2label": {9: "x"}}, "`id2label` must name classes in"),
        ({"num_layers": 256, "num_attention_heads": 1024}, "must give a model of at most 2e.10 parameters"),
    ],
)
def test_constructor_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**overrides)


@pytest.mark.parametrize("name", ["class_labels", "history_class_labels"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1]), r"must have shape \(2,\), got \(1,\)"),
        (torch.tensor([1.0, 2.0]), "must be an int64 or int32 tensor, got .*float32"),
        ([1, 2], "must be an int64 or int32 tensor, got list"),
        (torch.tensor([1, 6]), r"must lie in \[0, 5\], got \[1, 6\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name, labels, message):
    with pytest.raises(ValueError, match=f"^`{name}` {message}"):
        make_transformer()(random_inputs(), **{name: labels})


def test_other_arguments_are_checked_as_those_of_the_first_class_are():
    model = make_transformer()
    with pytest.raises(ValueError, match=r"`timestep` must be falling integers in \[0, 4\], got \[5\]"):
        model(random_inputs(), 5)
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 34, 8\)"):
        model(random_inputs(num_tokens=33))
    with pytest.raises(ValueError, match="`guidance_weight` must be a finite number, got nan"):
        model(random_inputs(), guidance_weight=math.nan)
