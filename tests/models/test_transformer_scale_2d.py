"""
The transformer against a plain version of VAR's network with one dense N x N mask.

Shape legend: B batch, N tokens, D width, H heads.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, tiny_transformer
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import MarkStepBox

from srdd import ScaleKVCache, ScaleTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor, ModulationCache, ScaleAttnProcessor
from srdd.models.attention_scale import REACH, scale_segments


PATTERNS = ("causal", "markov", "banded")
SCALE_SIZES = [[1, 1], [1, 2], [2, 3], [4, 4]]
TOKENS = [slice(0, 1), slice(1, 3), slice(3, 9), slice(9, 25)]
NUM_TOKENS = 25
NUM_SCALE_TOKENS = [1, 2, 6, 16]
LAST = len(SCALE_SIZES) - 1


def make_transformer(attention_pattern="markov", **overrides) -> ScaleTransformer2DModel:
    return tiny_transformer(attention_pattern, **{"scale_sizes": SCALE_SIZES, **overrides})


def random_inputs(batch_size=2, num_tokens=NUM_TOKENS, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_tokens, LATENT_CHANNELS, generator=generator)


def sees(pattern: str, query_scale: int, key_scale: int) -> bool:
    """Whether a token of one scale attends to tokens of another, straight from the definition of the patterns."""
    if pattern == "markov":
        return key_scale == query_scale
    if pattern == "banded":
        return key_scale in (query_scale, query_scale - 1)
    return key_scale <= query_scale


def sees_by_token(pattern: str, scales: Sequence[int]) -> torch.Tensor:
    """`(N, N)`, true where attention is allowed; the scale before another is the one before it in `scales`."""
    order = [place for place, scale in enumerate(scales) for _ in range(TOKENS[scale].stop - TOKENS[scale].start)]
    return torch.tensor([[sees(pattern, query, key) for key in order] for query in order])


def plain_attention(attn, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch_size, num_tokens, dim = x.shape
    projections = (project(x) for project in (attn.to_q, attn.to_k, attn.to_v))
    query, key, value = (states.view(batch_size, num_tokens, attn.heads, -1).transpose(1, 2) for states in projections)
    if attn.qk_norm:
        temperature = attn.query_scale.clamp(max=math.log(100)).exp().view(1, -1, 1, 1)
        query = query / query.norm(dim=-1, keepdim=True) * temperature
        key = key / key.norm(dim=-1, keepdim=True)
        scores = query @ key.transpose(-1, -2)
    else:
        scores = query @ key.transpose(-1, -2) * 0.25 / math.sqrt(dim // attn.heads)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)  # (B, H, N, N)
    return attn.to_out[0]((weights @ value).transpose(1, 2).reshape(batch_size, num_tokens, dim))


def plain_logits(model, inputs: torch.Tensor, labels: torch.Tensor, scales=(0, 1, 2, 3)) -> torch.Tensor:
    """VAR's training forward, in one piece."""
    condition = model.class_embed.weight[labels]  # (B, D)
    x = model.proj_in(inputs)
    positions = [model.pos_embed[0, TOKENS[scale]] + model.scale_embed.weight[scale] for scale in scales]
    if scales[0] == 0:
        x = torch.cat([condition[:, None] + model.start_pos_embed, x[:, 1:]], dim=1)
    x = x + torch.cat(positions)
    mask = sees_by_token(model.config.attention_pattern, scales)
    activated = condition * torch.sigmoid(condition)
    for block in model.blocks:
        if model.adaln is None:
            six = block.adaln(activated).view(-1, 6, x.shape[-1])
        else:
            six = model.adaln(activated).view(-1, 6, x.shape[-1]) + block.scale_shift_table
        gate1, gate2, scale1, scale2, shift1, shift2 = (six[:, index, None] for index in range(6))
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate1 * plain_attention(block.attn, normed * (1 + scale1) + shift1, mask)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate2 * block.ff(normed * (1 + scale2) + shift2)
    scale, shift = model.adaln_out(activated)[:, None].chunk(2, dim=-1)
    return model.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln", "shared_adaln"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_those_of_dense_masked_attention(pattern, qk_norm, shared_adaln):
    model = make_transformer(pattern, qk_norm=qk_norm, shared_adaln=shared_adaln)
    inputs, labels = random_inputs(), torch.tensor([2, 5])
    logits = model(inputs, class_labels=labels).sample
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, plain_logits(model, inputs, labels), atol=1e-5, rtol=0)
    assert torch.equal(model(inputs, class_labels=labels, return_dict=False)[0], logits)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0, 1, 2, 3), (0, 2, 3), (2,)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_call_under_a_mask_gives_the_same_logits(pattern, scales):
    model = make_transformer(pattern)
    inputs = torch.cat([random_inputs()[:, TOKENS[scale]] for scale in scales], dim=1)
    timesteps = [LAST - scale for scale in scales]
    expected = model(inputs, timesteps).sample
    model.set_attn_processor(MaskedScaleAttnProcessor())
    assert all(isinstance(block.attn.processor, MaskedScaleAttnProcessor) for block in model.blocks)
    torch.testing.assert_close(model(inputs, timesteps).sample, expected, atol=1e-5, rtol=0)


def masked_transformer(pattern: str, backend: str, **overrides) -> ScaleTransformer2DModel:
    """A model with one call for all scales by a backend, which other models do not get."""
    model = make_transformer(pattern, **overrides)
    model.set_attn_processor(MaskedScaleAttnProcessor())
    with attention_backend():
        model.set_attention_backend(backend)
    return model


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "flex"])
def test_the_masked_processor_draws_with_a_cache_too(backend):
    inputs, cache = random_inputs(), ScaleKVCache()
    expected = make_transformer("causal")(inputs).sample
    model = masked_transformer("causal", backend)
    logits = [model(inputs[:, :3], [3, 2], kv_cache=cache).sample, model(inputs[:, 3:], [1, 0], kv_cache=cache).sample]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_attention_gives_the_same_logits(pattern):
    model, inputs, labels = make_transformer(pattern), random_inputs(), torch.tensor([2, 5])
    logits = masked_transformer(pattern, "flex")(inputs, class_labels=labels).sample
    torch.testing.assert_close(logits, model(inputs, class_labels=labels).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_attention_is_left_to_calls_under_a_mask(pattern):
    # On a CPU and with gradients it raises.
    model, inputs = masked_transformer(pattern, "flex"), random_inputs()[:, TOKENS[2]]
    assert torch.equal(model(inputs, 1).sample, make_transformer(pattern)(inputs, 1).sample)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(random_inputs())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_allow_what_the_pattern_does(pattern):
    segments = scale_segments(REACH[pattern], (3, 2, 1, 0), tuple(NUM_SCALE_TOKENS))
    processor, device = MaskedScaleAttnProcessor(), torch.device("cpu")
    expected = sees_by_token(pattern, range(4))
    dense = processor.attention_mask(segments, None, device)
    assert torch.equal(dense[0, 0], expected)
    processor._attention_backend = AttentionBackendName.FLEX
    block_mask = processor.attention_mask(segments, None, device)
    positions = torch.arange(NUM_TOKENS)
    assert torch.equal(block_mask.mask_mod(0, 0, positions[:, None], positions), expected)
    # Once for all layers and calls.
    again = scale_segments(REACH[pattern], (3, 2, 1, 0), tuple(NUM_SCALE_TOKENS))
    assert processor.attention_mask(again, None, device) is block_mask
    assert processor.attention_mask(segments[:1], None, device) is None
    assert processor.attention_mask(segments, ScaleKVCache(), device) is None


@pytest.mark.parametrize(("pattern", "num_tiles"), [("markov", 9 * 9 + 3 * 3 - 1), ("causal", 9 * 11 + 2 * 3)])
def test_flex_attention_skips_tiles_that_are_forbidden(pattern, num_tiles):
    # 1297 tokens are 11 x 11 tiles of 128: scales 1 to 3 lie in the first three rows, scale 4 from the third on.
    segments = scale_segments(REACH[pattern], (3, 2, 1, 0), (1, 16, 256, 1024))
    processor = MaskedScaleAttnProcessor()
    processor._attention_backend = AttentionBackendName.FLEX
    block_mask = processor.attention_mask(segments, None, torch.device("cpu"))
    tiles = block_mask.to_dense()[0, 0]
    assert tiles.shape == (11, 11)
    assert tiles.sum() == num_tiles


@torch.no_grad()
def test_compiled_blocks_are_given_the_mask():
    inputs, labels = random_inputs(), torch.tensor([2, 5])
    model = masked_transformer("markov", "flex")
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=False)
    counts = []
    for pattern in ("markov", "causal", "markov"):
        model.register_to_config(attention_pattern=pattern)
        plain = make_transformer(pattern)
        expected = plain(inputs, class_labels=labels).sample
        for _ in range(2):
            logits = model(inputs, class_labels=labels).sample
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        counts.append(counters["stats"]["unique_graphs"])
    # One graph for all layers and calls with a layout.
    assert counts[0] == 1
    assert counts[1] == counts[2] <= 2


@torch.no_grad()
def test_fused_projections_give_the_same_logits():
    model, inputs = make_transformer("causal"), random_inputs()
    expected = model(inputs).sample
    model.fuse_qkv_projections()
    assert all(block.attn.fused_projections for block in model.blocks)
    torch.testing.assert_close(model(inputs).sample, expected, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    assert torch.equal(model(inputs).sample, expected)


def test_what_a_folder_cannot_hold_is_not_saved(tmp_path):
    fused, adapted = make_transformer(), make_transformer()
    fused.fuse_qkv_projections()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for model in (fused, adapted):
        with pytest.raises(ValueError, match="must be undone before a model is saved"):
            model.save_pretrained(tmp_path)
    fused.unfuse_qkv_projections()
    adapted.fuse_lora()
    adapted.unload_lora()
    inputs = random_inputs()
    for model in (fused, adapted):
        model.save_pretrained(tmp_path)
        loaded = ScaleTransformer2DModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(inputs).sample, model(inputs).sample)


def test_adapters_and_fused_projections_do_not_mix():
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model, inputs = make_transformer(), random_inputs()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="Projections must not be fused where an adapter is added"):
        model.add_adapter(config)
    model.unfuse_qkv_projections()
    model.add_adapter(config)
    with pytest.raises(ValueError, match="An adapter must be merged"):
        model.fuse_qkv_projections()
    expected = model(inputs).sample
    model.fuse_lora()
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(inputs).sample, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0, 3), (0, 2, 3), (1, 2), (2,)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_subset_of_scales_is_dense_masked_attention_over_these(pattern, scales):
    model = make_transformer(pattern)
    inputs = torch.cat([random_inputs()[:, TOKENS[scale]] for scale in scales], dim=1)
    labels = torch.tensor([0, 4])
    logits = model(inputs, [LAST - scale for scale in scales], labels).sample
    torch.testing.assert_close(logits, plain_logits(model, inputs, labels, scales), atol=1e-5, rtol=0)


@pytest.mark.parametrize("processor", [ScaleAttnProcessor, MaskedScaleAttnProcessor])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_those_of_dense_masked_attention(pattern, processor):
    model = make_transformer(pattern)
    model.set_attn_processor(processor())
    labels, targets = torch.tensor([2, 5]), torch.randint(CODEBOOK_SIZE, (2, NUM_TOKENS))
    gradients = []
    for forward in (lambda x: model(x, class_labels=labels).sample, lambda x: plain_logits(model, x, labels)):
        inputs = random_inputs().requires_grad_()
        model.zero_grad()
        F.cross_entropy(forward(inputs).transpose(1, 2), targets).backward()
        gradients.append({"inputs": inputs.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_scale_depends_on_to_the_last_bit(pattern, num_layers):
    model = make_transformer(pattern, num_layers=num_layers)
    inputs, labels = random_inputs(), torch.tensor([2, 5])
    before = model(inputs, class_labels=labels).sample
    for changed in range(LAST + 1):
        # Through the position embedding, because the inputs of the coarsest scale are not read.
        kept = model.pos_embed.clone()
        model.pos_embed[:, TOKENS[changed]] += 1.0
        after = model(inputs, class_labels=labels).sample
        model.pos_embed.copy_(kept)
        for scale in range(LAST + 1):
            same = torch.equal(before[:, TOKENS[scale]], after[:, TOKENS[scale]])
            reach = num_layers if pattern == "banded" else 1
            seen = sees(pattern, scale, changed) or (pattern == "banded" and 0 <= scale - changed <= reach)
            assert same == (not seen), (scale, changed)


@torch.no_grad()
def test_markov_scale_depends_on_its_own_input_only():
    model, labels = make_transformer("markov"), torch.tensor([2, 5])
    inputs = random_inputs()
    before = model(inputs, class_labels=labels).sample
    for scale in range(LAST + 1):
        others = random_inputs(seed=1 + scale)
        others[:, TOKENS[scale]] = inputs[:, TOKENS[scale]]
        after = model(others, class_labels=labels).sample
        assert torch.equal(after[:, TOKENS[scale]], before[:, TOKENS[scale]])
        if scale < LAST:
            assert not torch.equal(after[:, TOKENS[scale + 1]], before[:, TOKENS[scale + 1]])


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_class_embedding_stands_for_the_coarsest_input(pattern):
    model, inputs = make_transformer(pattern), random_inputs()
    without = inputs.clone()
    without[:, TOKENS[0]] = math.nan
    labels = torch.tensor([2, 5])
    assert torch.equal(model(inputs, class_labels=labels).sample, model(without, class_labels=labels).sample)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0, 1, 2, 3), (0, 2, 3), (0, 3)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scale_by_scale_with_a_cache_is_the_forward_over_all_scales(pattern, scales):
    model, labels = make_transformer(pattern), torch.tensor([2, 5])
    inputs = [random_inputs()[:, TOKENS[scale]] for scale in scales]
    timesteps = [LAST - scale for scale in scales]
    expected = model(torch.cat(inputs, dim=1), timesteps, labels).sample
    cache = None if pattern in model.patterns_without_cache else ScaleKVCache()
    logits = [model(x, timestep, labels, kv_cache=cache).sample for x, timestep in zip(inputs, timesteps)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_a_cache_takes_several_scales_at_once(pattern):
    model, inputs, labels = make_transformer(pattern), random_inputs(), torch.tensor([2, 5])
    expected = model(inputs, class_labels=labels).sample
    cache = ScaleKVCache()
    coarse = model(inputs[:, :3], [3, 2], labels, kv_cache=cache).sample
    assert cache.timesteps == [3, 2]
    fine = model(inputs[:, 3:], torch.tensor([1, 0]), labels, kv_cache=cache).sample
    assert cache.timesteps == [3, 2, 1, 0]
    torch.testing.assert_close(torch.cat([coarse, fine], dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_a_further_pass_replaces_what_the_cache_holds_of_its_scale(pattern):
    model, inputs, labels = make_transformer(pattern), random_inputs(), torch.tensor([2, 5])
    cache, once = ScaleKVCache(), ScaleKVCache()
    for scale in range(LAST):
        model(random_inputs(seed=9)[:, TOKENS[scale]], LAST - scale, labels, kv_cache=cache)
    for scale in range(LAST):
        # A pass at a coarse scale must not see what an earlier pass left of the finer ones.
        again = model(inputs[:, TOKENS[scale]], LAST - scale, labels, kv_cache=cache).sample
        first = model(inputs[:, TOKENS[scale]], LAST - scale, labels, kv_cache=once).sample
        assert torch.equal(again, first)
    finest = [model(inputs[:, TOKENS[LAST]], 0, labels, kv_cache=which).sample for which in (cache, once)]
    assert torch.equal(*finest)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_a_read_only_cache_is_seen_and_not_changed(pattern):
    model, inputs = make_transformer(pattern), random_inputs()
    cache = ScaleKVCache()
    model(inputs[:, TOKENS[0]], 3, kv_cache=cache)
    stored = cache.get(1, [3])[1].clone()
    fine = model(inputs[:, TOKENS[1]], 2, kv_cache=cache.read_only()).sample
    assert cache.timesteps == [3]
    model(inputs[:, TOKENS[0]], 3, torch.tensor([1, 2]), kv_cache=cache.read_only())
    assert torch.equal(cache.get(1, [3])[1], stored)
    assert torch.equal(model(inputs[:, TOKENS[1]], 2, kv_cache=cache).sample, fine)
    assert cache.timesteps == [3, 2]


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [None, 3, 30])
def test_a_cache_holds_each_scale_once_whatever_its_first_size(num_tokens):
    model, inputs, cache = make_transformer("causal"), random_inputs(), ScaleKVCache(num_tokens)
    model(inputs[:, :3], [3, 2], kv_cache=cache)
    model(inputs[:, TOKENS[2]], 1, kv_cache=cache)
    model(inputs[:, TOKENS[1]], 2, kv_cache=cache)
    sizes = [tokens.stop - tokens.start for tokens in TOKENS[:3]]
    assert [tensor.shape for tensor in cache.get(1, [2])] == [(2, sizes[1], 2, 8)] * 2
    assert [tensor.shape for tensor in cache.get(1, [3, 2, 1])] == [(2, sum(sizes), 2, 8)] * 2
    # Scales that do not lie side by side.
    expected = torch.cat([cache.get(1, [3])[0], cache.get(1, [1])[0]], dim=1)
    assert torch.equal(cache.get(1, [3, 1])[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_selected_images_of_the_caches_give_those_of_the_batch(pattern):
    model, inputs, labels = make_transformer(pattern, shared_adaln=False), random_inputs(), torch.tensor([2, 5])
    cache, modulations = ScaleKVCache(), ModulationCache()
    model(inputs[:, :3], [3, 2], labels, kv_cache=cache, modulation_cache=modulations)
    image_indices = torch.tensor([1])
    expected = model(inputs[:, 3:], [1, 0], labels, kv_cache=cache.read_only()).sample[image_indices]
    selected = {
        "kv_cache": cache.read_only().select(image_indices),
        "modulation_cache": modulations.select(image_indices),
    }
    logits = model(inputs[image_indices, 3:], [1, 0], labels[image_indices], **selected).sample
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def cache_of(model, inputs, labels, num_scales: int) -> ScaleKVCache:
    """The cache after the coarsest scales, one after the other."""
    cache = ScaleKVCache()
    for scale in range(num_scales):
        model(inputs[:, TOKENS[scale]], LAST - scale, labels, kv_cache=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded", "markov"])
@pytest.mark.parametrize("scale", range(LAST + 1))
def test_some_tokens_of_a_scale_are_computed_as_all_of_them_are(pattern, scale):
    model, inputs, labels = make_transformer(pattern), random_inputs(), torch.tensor([2, 5])
    expected = model(inputs[:, TOKENS[scale]], LAST - scale, labels, kv_cache=cache_of(model, inputs, labels, scale))
    num_tokens = TOKENS[scale].stop - TOKENS[scale].start
    indices = torch.stack([torch.arange(num_tokens)[::2], torch.arange(num_tokens).flip(0)[::2]])
    indices[1, -1] = indices[1, 0]  # twice
    states = inputs[:, TOKENS[scale]].take_along_dim(indices[..., None], dim=1)
    cache = cache_of(model, inputs, labels, scale + 1)
    logits = model(states, LAST - scale, labels, kv_cache=cache, token_indices=indices).sample
    torch.testing.assert_close(logits, expected.sample.take_along_dim(indices[..., None], dim=1), atol=1e-5, rtol=0)
    # One image of the batch, by its row.
    row = torch.tensor([1])
    logits = model(states[row], LAST - scale, labels[row], kv_cache=cache.select(row), token_indices=indices[row])
    expected = expected.sample[row].take_along_dim(indices[row, :, None], dim=1)
    torch.testing.assert_close(logits.sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "banded", "markov"])
def test_tokens_with_new_inputs_see_the_others_as_they_were(pattern):
    # In one block, keys and values follow from a token's own input.
    model, inputs, labels = make_transformer(pattern, num_layers=1), random_inputs(), torch.tensor([2, 5])
    cache, others = cache_of(model, inputs, labels, 3), cache_of(model, inputs, labels, 2)
    indices, states = torch.tensor([[0, 3], [5, 1]]), random_inputs(seed=9)[:, :2]
    mixed = inputs[:, TOKENS[2]].scatter(1, indices[..., None].expand_as(states), states)
    expected = model(mixed, LAST - 2, labels, kv_cache=others).sample.take_along_dim(indices[..., None], dim=1)
    copied, before = cache.clone(), cache.get(0, [LAST - 2])[0].clone()
    logits = model(states, LAST - 2, labels, kv_cache=copied, token_indices=indices).sample
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(cache.get(0, [LAST - 2])[0], before)
    torch.testing.assert_close(copied.get(0, [LAST - 2])[0], others.get(0, [LAST - 2])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_some_tokens_need_a_cache_that_knows_the_others():
    model, inputs = make_transformer(), random_inputs()
    indices, states = torch.tensor([[0, 1], [1, 0]]), inputs[:, :2]
    for cache, found in ((None, "None"), (ScaleKVCache(), r"\[\]"), (ScaleKVCache().read_only(), "a read-only one")):
        with pytest.raises(ValueError, match=f"`kv_cache` must hold the timestep 2 and not be .* got {found}"):
            model(states, LAST - 1, kv_cache=cache, token_indices=indices)
    cache = cache_of(model, inputs, None, 2)
    with pytest.raises(ValueError, match=r"`timestep` must be one scale's with `token_indices`, got \[3, 2\]"):
        model(states, [LAST, LAST - 1], kv_cache=cache, token_indices=indices)
    with pytest.raises(ValueError, match=r"`token_indices` must lie in \[0, 1\], got \[0, 2\]"):
        model(states, LAST - 1, kv_cache=cache, token_indices=torch.tensor([[0, 2], [1, 0]]))
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 2, 8\)"):
        model(inputs[:, :3], LAST - 1, kv_cache=cache, token_indices=indices)


@torch.no_grad()
@pytest.mark.parametrize("shared_adaln", [True, False])
def test_modulations_are_computed_once_for_all_scales(shared_adaln):
    model, inputs, labels = make_transformer(shared_adaln=shared_adaln), random_inputs(), torch.tensor([2, 5])
    cache, calls = ModulationCache(), []
    linears = [model.adaln] if shared_adaln else [block.adaln for block in model.blocks]
    for linear in [*linears, model.adaln_out]:
        linear.register_forward_hook(lambda *_: calls.append(1))
    expected = [model(inputs[:, TOKENS[scale]], LAST - scale, labels).sample for scale in range(LAST + 1)]
    assert len(calls) == (len(linears) + 1) * (LAST + 1)
    calls.clear()
    logits = [
        model(inputs[:, TOKENS[scale]], LAST - scale, labels, modulation_cache=cache).sample
        for scale in range(LAST + 1)
    ]
    assert len(calls) == len(linears) + 1
    assert all(torch.equal(*pair) for pair in zip(logits, expected))


@torch.no_grad()
def test_what_blocks_return_may_be_overwritten_by_the_next_forward():
    # As a CUDA graph does that is replayed.
    model, inputs, labels = make_transformer("markov"), random_inputs(), torch.tensor([2, 5])
    cache, returned = ModulationCache(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: returned.extend(output))
    coarse = model(inputs[:, TOKENS[0]], LAST, labels, modulation_cache=cache).sample
    kept = coarse.clone()
    for tensor in returned:
        tensor.fill_(math.nan)
    assert torch.equal(coarse, kept)
    fine = model(inputs[:, TOKENS[1]], LAST - 1, labels, modulation_cache=cache).sample
    assert torch.equal(fine, model(inputs[:, TOKENS[1]], LAST - 1, labels).sample)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {}])
def test_every_forward_is_one_step_of_cuda_graphs(arguments):
    model, steps = make_transformer("markov"), []
    model.compile_repeated_blocks(**arguments)
    for block in model.blocks:
        block._compiled_call_impl = None  # what is traced is not the matter here
        block.register_forward_pre_hook(lambda *_: steps.append(MarkStepBox.mark_step_counter))
    before = MarkStepBox.mark_step_counter
    for scale in (1, 2):
        model(random_inputs()[:, TOKENS[scale]], LAST - scale)
    per_forward = 1 if arguments else 0
    assert steps == [before - per_forward] * 2 + [before - 2 * per_forward] * 2


@torch.no_grad()
def test_halves_are_merged_before_the_last_layer_as_if_after_it():
    model, inputs = make_transformer(), random_inputs()
    labels = torch.tensor([2, model.config.num_classes])
    conditional, unconditional = model(inputs[:1].repeat(2, 1, 1), class_labels=labels).sample.chunk(2)
    logits = model(inputs[:1].repeat(2, 1, 1), class_labels=labels, guidance_weight=1.5).sample
    torch.testing.assert_close(logits, 2.5 * conditional - 1.5 * unconditional, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="must be two halves with `guidance_weight`.* got a batch of 1"):
        model(inputs[:1], class_labels=labels[:1], guidance_weight=1.5)


@pytest.mark.parametrize(("pattern", "needed"), [("causal", True), ("markov", False), ("banded", True)])
def test_only_the_markov_pattern_needs_no_cache(pattern, needed):
    assert (pattern not in make_transformer(pattern).patterns_without_cache) is needed


@torch.no_grad()
def test_weights_fit_all_patterns():
    causal, markov = make_transformer("causal"), make_transformer("markov")
    markov.load_state_dict(causal.state_dict(), strict=True)
    inputs = random_inputs()
    coarsest = [model(inputs).sample[:, TOKENS[0]] for model in (causal, markov)]
    torch.testing.assert_close(*coarsest, atol=1e-5, rtol=0)
    assert not torch.allclose(causal(inputs).sample, markov(inputs).sample, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [1, [1], (1,), torch.tensor(1), torch.tensor([1])])
def test_a_timestep_may_be_a_number_a_list_or_a_tensor(timestep):
    model, x = make_transformer(), random_inputs()[:, TOKENS[2]]
    assert torch.equal(model(x, timestep).sample, model(x, 1).sample)


@torch.no_grad()
def test_the_null_class_is_the_default():
    model, inputs = make_transformer(), random_inputs()
    null = torch.full((2,), model.config.num_classes)
    assert torch.equal(model(inputs).sample, model(inputs, class_labels=null).sample)
    assert not torch.allclose(model(inputs).sample, model(inputs, class_labels=null - 1).sample, atol=1e-2)


@torch.no_grad()
def test_unconditional_model_has_the_null_class_only():
    model = make_transformer(num_classes=0)
    assert model.class_embed.weight.shape[0] == 1
    assert model.id2label == {}
    logits = model(random_inputs()).sample
    torch.testing.assert_close(
        logits, plain_logits(model, random_inputs(), torch.zeros(2, dtype=torch.long)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35])
def test_labels_are_dropped_as_often_as_asked(share):
    model = make_transformer(class_dropout_prob=share).train()
    draws = 10_000
    torch.manual_seed(0)
    inputs = torch.zeros(draws, 1, LATENT_CHANNELS)
    logits = model(inputs, LAST, torch.full((draws,), 2)).sample[:, 0]
    model.eval()
    kept, null = (model(inputs[:1], LAST, torch.tensor([label])).sample[0] for label in (2, model.config.num_classes))
    is_kept, is_null = (torch.isclose(logits, row, atol=1e-5).all(dim=1) for row in (kept, null))
    assert (is_kept ^ is_null).all()
    assert abs(is_null.sum().item() - share * draws) <= 4 * math.sqrt(draws * share * (1 - share))


@torch.no_grad()
def test_no_label_is_dropped_outside_training():
    model = make_transformer(class_dropout_prob=1.0)
    inputs, labels = random_inputs(), torch.tensor([0, 1])
    torch.testing.assert_close(
        model(inputs, class_labels=labels).sample, plain_logits(model, inputs, labels), atol=1e-5, rtol=0
    )


def test_drop_path_keeps_the_expectation_and_drops_whole_images():
    block = make_transformer(drop_path_rate=0.3).blocks[-1].train()
    torch.manual_seed(0)
    images = 20_000
    dropped = block.drop_path(torch.ones(images, 2, 3))
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    values = dropped[:, 0, 0]
    assert torch.isclose(values, torch.tensor(1 / 0.7)).logical_or(values == 0).all()
    assert abs((values == 0).sum().item() - 0.3 * images) <= 4 * math.sqrt(images * 0.3 * 0.7)
    assert values.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(0.3 / 0.7 / images))
    # Outside of training no branch is dropped.
    models = [make_transformer(drop_path_rate=rate) for rate in (0.3, 0.0)]
    assert torch.equal(*(model(random_inputs()).sample for model in models))


def test_drop_path_rate_grows_linearly_from_zero():
    rates = [block.drop_path_rate for block in make_transformer(num_layers=4, drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [block.drop_path_rate for block in make_transformer(num_layers=1, drop_path_rate=0.3).blocks] == [0.0]


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(shared_adaln):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer("causal", drop_path_rate=0.5, shared_adaln=shared_adaln).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        model(random_inputs(8), class_labels=torch.arange(8) % 5).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def fresh_transformer(**overrides) -> ScaleTransformer2DModel:
    config = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "scale_sizes": SCALE_SIZES}
    torch.manual_seed(0)
    return ScaleTransformer2DModel(codebook_size=512, num_classes=50, **{**config, **overrides})


def test_initial_weights_have_vars_standard_deviations():
    model = fresh_transformer()
    std = math.sqrt(1 / (3 * 64))
    expected = {
        "proj_in.weight": std,
        "class_embed.weight": std,
        "scale_embed.weight": std,
        "pos_embed": std,
        "proj_out.weight": 0.02 * std,
        "adaln_out.weight": 0.5 * std,
        "blocks.0.attn.to_q.weight": std,
        "blocks.0.ff.net.0.proj.weight": std,
        "blocks.3.attn.to_out.0.weight": std / math.sqrt(2 * 4),
        "blocks.3.ff.net.2.weight": std / math.sqrt(2 * 4),
    }
    weights = dict(model.named_parameters())
    assert {name: weights[name].std().item() for name in expected} == pytest.approx(expected, rel=0.15)
    gates, scales_and_shifts = model.blocks[1].adaln.weight.split([2 * 64, 4 * 64])
    assert gates.std().item() == pytest.approx(1e-5 * std, rel=0.1)
    assert scales_and_shifts.std().item() == pytest.approx(0.5 * std, rel=0.1)
    assert not any(weights[name].any() for name in weights if name.endswith(".bias"))
    assert torch.equal(model.blocks[0].attn.query_scale, torch.full((4, 1), math.log(4.0)))


def test_initial_gates_and_modulations_of_shared_adaln():
    table = fresh_transformer(shared_adaln=True, attention_head_dim=64).blocks[1].scale_shift_table
    assert table[:2].std().item() == pytest.approx(1e-5 / 16, rel=0.15)
    assert table[2:].std().item() == pytest.approx(0.5 / 16, rel=0.15)


@torch.no_grad()
def test_initial_blocks_are_close_to_the_identity_and_predictions_to_uniform():
    model = fresh_transformer(latent_channels=LATENT_CHANNELS).eval()
    entered, left = [], []
    model.blocks[0].register_forward_hook(lambda module, args, output: entered.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, output: left.append(output[0]))
    logits = model(random_inputs(), class_labels=torch.tensor([3, 7])).sample
    assert (left[0] - entered[0]).abs().max() < 1e-4 * entered[0].abs().max()
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(512, (2 * NUM_TOKENS,)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


@torch.no_grad()
def test_query_temperature_is_bounded():
    model, inputs = make_transformer(), random_inputs()
    for block in model.blocks:
        block.attn.query_scale.fill_(math.log(100))
    bounded = model(inputs).sample
    for block in model.blocks:
        block.attn.query_scale.fill_(9.0)
    assert torch.equal(model(inputs).sample, bounded)


def test_class_names_survive_json():
    names = {0: "a", 3: "b"}
    model = make_transformer(id2label=names)
    assert model.config.id2label == {"0": "a", "3": "b"}
    assert model.id2label == names
    assert make_transformer(id2label=model.config.id2label).id2label == names


def test_class_names_stand_in_the_order_of_their_ids(tmp_path):
    names = {index: f"class {index}" for index in range(12)}
    make_transformer(num_classes=12, id2label=names).save_pretrained(tmp_path)
    loaded = ScaleTransformer2DModel.from_pretrained(tmp_path)
    assert list(loaded.config.id2label)[:3] == ["0", "1", "10"]  # as JSON files are sorted
    assert list(loaded.id2label.items()) == list(names.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"attention_pattern": "full"},
            r"`attention_pattern` must be one of \('causal', 'markov', 'banded'\).*'full'",
        ),
        ({"scale_sizes": [2, 1]}, r"`scale_sizes` must grow"),
        ({"class_dropout_prob": 1.5}, r"`class_dropout_prob` must be a finite number in \[0, 1\], got 1.5"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must be .* of at least 0 and below 1, got 1.0"),
        ({"id2label": {5: "x"}}, r"`id2label` must name classes in \[0, 4\], got \['5'\]"),
        ({"id2label": ["x"]}, r"`id2label` must be a dict of names by class id, got \['x'\]"),
        ({"id2label": {1: 2}}, r"`id2label` must hold names that are strings, got \[2\]"),
        ({"id2label": {"²": "x"}}, r"`id2label` must name classes in \[0, 4\], got \['²'\]"),
        ({"id2label": {-1: "x", "one": "y"}}, r"`id2label` must name classes in \[0, 4\], got \['-1', 'one'\]"),
    ],
)
def test_constructor_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**overrides)


@pytest.mark.parametrize("timestep", [4, -1, [0, 1], [1, 1], [], [3, 2, 1, 0, -1], torch.tensor([2, 3])])
def test_timesteps_that_do_not_fall_or_do_not_exist_are_refused(timestep):
    with pytest.raises(ValueError, match=r"`timestep` must be falling integers in \[0, 3\], got \["):
        make_transformer()(random_inputs(), timestep)


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 25, 7), (2, 25), (25, 8)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 25, 8\) .*got \("):
        make_transformer()(torch.zeros(shape))


def test_other_than_one_label_for_each_image_is_refused():
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(2,\), got \(1,\)"):
        make_transformer()(random_inputs(), class_labels=torch.tensor([1]))


@pytest.mark.parametrize("wrong", [None, [[1.0]], "x", torch.zeros(2, 25, 8, dtype=torch.long)])
def test_inputs_that_are_no_tensor_of_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="`hidden_states` must be a floating-point tensor, got "):
        make_transformer()(wrong)


@pytest.mark.parametrize("wrong", [[1, 2], "apple", 3, torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_labels_that_are_no_tensor_of_integers_are_refused(wrong):
    with pytest.raises(ValueError, match="`class_labels` must be an int64 or int32 tensor, got "):
        make_transformer()(random_inputs(), class_labels=wrong)


@pytest.mark.parametrize("wrong", [[6, 0], [0, -1], [10**12, 0]])
def test_labels_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"`class_labels` must lie in \[0, 5\], got \[{min(wrong)}, {max(wrong)}\]"):
        make_transformer()(random_inputs(), class_labels=torch.tensor(wrong))


@pytest.mark.parametrize("wrong", ["0", 1.0, True, [0.0], [None], "210", torch.tensor(0.5), torch.tensor([[1, 0]])])
def test_timesteps_that_are_no_integers_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`timestep` must be falling integers in \[0, 3\], got \["):
        make_transformer()(random_inputs(), wrong)


@pytest.mark.parametrize("timestep", [np.int64(0), np.array([0]), torch.tensor(0), [np.int32(0)], range(0, -1, -1)])
def test_timesteps_of_other_libraries(timestep):
    model, inputs = make_transformer(), random_inputs()[:, -16:]
    with torch.no_grad():
        assert torch.equal(model(inputs, timestep).sample, model(inputs, 0).sample)


@pytest.mark.parametrize("wrong", ["2", math.nan, math.inf, [1.0]])
def test_guidance_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="`guidance_weight` must be a finite number, got "):
        make_transformer()(random_inputs(), guidance_weight=wrong)
