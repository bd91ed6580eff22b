"""
The transformer that draws from texts against a plain version of Switti's network, token by token where that is plain.

Shape legend: B batch, N tokens, L tokens of the text, D width, H heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny_models import (
    CODEBOOK_SIZE,
    LATENT_CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    random_texts,
    tiny_text_transformer,
)
from torch._dynamo.utils import counters

from srdd import ScaleKVCache, ScaleTextTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor, ModulationCache
from srdd.models.attention_scale_text import scale_rotary_embedding


PATTERNS = ("causal", "markov", "banded")
SCALE_SIZES = [[1, 1], [1, 2], [2, 3], [4, 4]]
TOKENS = [slice(0, 1), slice(1, 3), slice(3, 9), slice(9, 25)]
NUM_TOKENS = 25
LAST = len(SCALE_SIZES) - 1
EPS = 1e-6


def make_transformer(attention_pattern="markov", **overrides) -> ScaleTextTransformer2DModel:
    return tiny_text_transformer(attention_pattern, **{"scale_sizes": SCALE_SIZES, **overrides})


def random_inputs(batch_size=2, num_tokens=NUM_TOKENS, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_tokens, LATENT_CHANNELS, generator=generator)


def sees(pattern: str, query_scale: int, key_scale: int) -> bool:
    reach = {"markov": 0, "banded": 1, "causal": LAST}[pattern]
    return 0 <= query_scale - key_scale <= reach


def rms(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.weight


def standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + EPS).sqrt()


def turned(head: torch.Tensor, row: float, column: float, theta: float) -> torch.Tensor:
    """A head `(B, D / H)` at a place, its pairs of channels taken for complex numbers."""
    numbers = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous())
    num_pairs = numbers.shape[-1]
    angles = [
        (column if pair < num_pairs // 2 else row) * theta ** (-2 * (pair % (num_pairs // 2)) / num_pairs)
        for pair in range(num_pairs)
    ]
    return torch.view_as_real(numbers * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])).flatten(-2)


def places(extent: float) -> list[tuple[int, float, float]]:
    """Scale, row and column of every token; the last row and column of a scale is at `extent`."""
    return [
        (scale, extent * row / max(height - 1, 1), extent * column / max(width - 1, 1))
        for scale, (height, width) in enumerate(SCALE_SIZES)
        for row in range(height)
        for column in range(width)
    ]


def attend(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """What one token of one image sees: `(D / H)` each."""
    scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
    return (scores.softmax(dim=0)[:, None] * torch.stack(values)).sum(dim=0)


def plain_self_attention(model, attn, x: torch.Tensor) -> torch.Tensor:
    tokens, heads = places(model.config.rope_extent), attn.heads
    query, key = standardised(attn.to_q(x)), standardised(attn.to_k(x))
    value = attn.to_v(x)
    query, key, value = (states.unflatten(-1, (heads, -1)) for states in (query, key, value))  # (B, N, H, D/H)
    images = []
    for image in range(len(x)):
        at = [(scale, (row, column, model.config.rope_theta)) for scale, row, column in tokens]
        queries = [turned(query[image, n], *place) for n, (_, place) in enumerate(at)]  # (H, D/H)
        keys = [turned(key[image, n], *place) for n, (_, place) in enumerate(at)]
        rows = []
        for n, (scale, _) in enumerate(at):
            seen = [m for m, (other, _) in enumerate(at) if sees(model.config.attention_pattern, scale, other)]
            own = [
                attend(queries[n][h], [keys[m][h] for m in seen], [value[image, m, h] for m in seen])
                for h in range(heads)
            ]
            rows.append(torch.cat(own))
        images.append(torch.stack(rows))
    return attn.to_out[0](torch.stack(images))


def plain_text_attention(attn, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    query, key, value = standardised(attn.to_q(x)), standardised(attn.to_k(text)), attn.to_v(text)
    images = []
    for image in range(len(x)):
        heads = [
            states[image].unflatten(-1, (attn.heads, -1)).unbind(1) for states in (query, key, value)
        ]  # H of (N, D/H)
        real = mask[image].nonzero().flatten().tolist()
        rows = [
            torch.cat([attend(q[n], [k[m] for m in real], [v[m] for m in real]) for q, k, v in zip(*heads)])
            for n in range(x.shape[1])
        ]
        images.append(torch.stack(rows))
    return attn.to_out[0](torch.stack(images))


def plain_logits(model, inputs: torch.Tensor, texts, sizes=((512, 512, 0, 0),) * 2) -> torch.Tensor:
    """Switti's training forward, in one piece."""
    text, mask, pooled = texts.values()
    condition = model.pooled_embed(pooled)  # (B, D)
    frequencies = model.size_embed.frequencies
    waves = [
        torch.cat([wave(2 * math.pi * number * frequencies) for number in image for wave in (torch.sin, torch.cos)])
        for image in sizes
    ]
    size = model.size_embed.proj(torch.stack(waves))
    x = torch.cat([condition[:, None] + model.start_pos_embed, model.proj_in(inputs[:, 1:])], dim=1)
    x = x + torch.stack([model.scale_embed.weight[scale] for scale, _, _ in places(1.0)])
    for block in model.blocks:
        told = condition + block.size_scales * size
        six = block.adaln(told * told.sigmoid()).view(len(x), 6, 1, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = (six[:, index] for index in range(6))
        branch = plain_self_attention(model, block.attn, rms(x, block.norm1) * (1 + scale1) + shift1)
        x = x + rms(branch, block.norm1_out) * gate1
        branch = plain_text_attention(block.attn2, rms(x, block.norm2), rms(text, block.norm_text), mask)
        x = x + rms(branch, block.norm2_out)
        wide, gate = block.ff.net[0].proj(rms(x, block.norm3) * (1 + scale2) + shift2).chunk(2, dim=-1)
        x = x + rms(block.ff.net[2](wide * gate * gate.sigmoid()), block.norm3_out) * gate2
    scale, shift = model.adaln_out(condition * condition.sigmoid())[:, None].chunk(2, dim=-1)
    return model.proj_out(standardised(x) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_those_of_a_plain_network(pattern):
    model, inputs, texts = make_transformer(pattern), random_inputs(), random_texts()
    logits = model(inputs, **texts).sample
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, plain_logits(model, inputs, texts), atol=1e-5, rtol=0)
    assert torch.equal(model(inputs, **texts, return_dict=False)[0], logits)
    # One call under a mask, and fused projections.
    model.set_attn_processor(MaskedScaleAttnProcessor())
    torch.testing.assert_close(model(inputs, **texts).sample, logits, atol=1e-5, rtol=0)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(inputs, **texts).sample, logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_other_sizes_crops_and_positions():
    model = make_transformer(rope_theta=100.0, rope_extent=3.0, mlp_ratio=1.5)
    inputs, texts = random_inputs(), random_texts()
    sizes = {"original_size": torch.tensor([[600, 512], [512, 900]]), "crop_coords": torch.tensor([[44, 0], [0, 194]])}
    logits = model(inputs, **texts, **sizes).sample
    expected = plain_logits(model, inputs, texts, sizes=((600, 512, 44, 0), (512, 900, 0, 194)))
    # Phases of some hundred turns, in float32.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    pair = model(inputs, **texts, original_size=(600, 512), crop_coords=[44, 0]).sample
    torch.testing.assert_close(pair[0], logits[0], atol=1e-5, rtol=0)
    assert not torch.allclose(pair[1], logits[1], atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_gradients_are_those_of_a_plain_network(pattern, checkpointing):
    model, texts = make_transformer(pattern).train(), random_texts()
    targets = torch.randint(CODEBOOK_SIZE, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = []
    for forward in (lambda x: model(x, **texts).sample, lambda x: plain_logits(model, x, texts)):
        model.zero_grad()
        F.cross_entropy(forward(random_inputs()).transpose(1, 2), targets).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
    assert "size_embed.frequencies" not in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer("causal").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(random_inputs(), **random_texts()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert not [name for name, gradient in gradients[0].items() if not torch.equal(gradients[1][name], gradient)]


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0, 1, 2, 3), (0, 2, 3)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scale_by_scale_with_caches_is_the_forward_over_all_scales(pattern, scales):
    model, texts = make_transformer(pattern), random_texts()
    inputs = [random_inputs()[:, TOKENS[scale]] for scale in scales]
    timesteps = [LAST - scale for scale in scales]
    expected = model(torch.cat(inputs, dim=1), timesteps, **texts).sample
    kv_cache = None if pattern in model.patterns_without_cache else ScaleKVCache()
    caches = {"kv_cache": kv_cache, "modulation_cache": ModulationCache()}
    logits = [model(x, timestep, **texts, **caches).sample for x, timestep in zip(inputs, timesteps)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_some_tokens_of_some_images_are_computed_as_all_of_them_are(pattern):
    model, inputs, texts = make_transformer(pattern), random_inputs(), random_texts()
    cache, stored = ScaleKVCache(), ModulationCache()
    logits = [
        model(inputs[:, TOKENS[k]], LAST - k, **texts, kv_cache=cache, modulation_cache=stored).sample
        for k in range(3)
    ]
    indices, image = torch.tensor([[4, 1, 2, 1]]), torch.tensor([1])
    selected = {
        "kv_cache": cache.select(image),
        "modulation_cache": stored.select(image),
        **{name: tensor[image] for name, tensor in texts.items()},
    }
    states = inputs[image, TOKENS[2]].take_along_dim(indices[..., None], dim=1)
    again = model(states, LAST - 2, **selected, token_indices=indices).sample
    torch.testing.assert_close(again, logits[2][image][:, indices[0]], atol=1e-5, rtol=0)
    # The coarsest scale starts from the text, whatever is stored.
    indices = torch.zeros(1, 1, dtype=torch.long)
    again = model(inputs[image, :1], LAST, **selected, token_indices=indices).sample
    torch.testing.assert_close(again, logits[0][image], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_follows_from_texts_is_computed_once_for_all_scales():
    model, inputs, texts = make_transformer(), random_inputs(), random_texts()
    cache, calls = ModulationCache(), []
    linears = [linear for block in model.blocks for linear in (block.adaln, block.attn2.to_k, block.attn2.to_v)]
    for linear in [*linears, model.size_embed, model.adaln_out]:
        linear.register_forward_hook(lambda *_: calls.append(1))
    expected = [model(inputs[:, TOKENS[k]], LAST - k, **texts).sample for k in range(LAST + 1)]
    calls.clear()
    logits = [model(inputs[:, TOKENS[k]], LAST - k, **texts, modulation_cache=cache).sample for k in range(LAST + 1)]
    assert len(calls) == len(linears) + 2
    assert all(torch.equal(*pair) for pair in zip(logits, expected))


@torch.no_grad()
@pytest.mark.parametrize("padding", [7.0, math.nan, math.inf])
def test_what_the_padding_holds_does_not_matter(padding):
    model, inputs, texts = make_transformer(), random_inputs(), random_texts()
    expected, mask = model(inputs, **texts).sample, texts["encoder_attention_mask"]
    other = texts["encoder_hidden_states"].masked_fill(~mask.unsqueeze(-1), padding)
    assert torch.equal(model(inputs, **{**texts, "encoder_hidden_states": other}).sample, expected)
    # Nor how long it is, nor where it stands.
    longer = {
        **texts,
        "encoder_hidden_states": F.pad(other, (0, 0, 2, 3), value=padding),
        "encoder_attention_mask": F.pad(mask, (2, 3)),
    }
    torch.testing.assert_close(model(inputs, **longer).sample, expected, atol=1e-5, rtol=0)
    # A text without any.
    short = {name: tensor[:1, :3] if tensor.shape[1] == 5 else tensor[:1] for name, tensor in texts.items()}
    del short["encoder_attention_mask"]
    torch.testing.assert_close(model(inputs[:1], **short).sample, expected[:1], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_image_does_not_depend_on_the_others_in_its_batch(pattern):
    model, inputs, texts = make_transformer(pattern), random_inputs(), random_texts()
    logits = model(inputs, **texts).sample
    for image in range(2):
        alone = {name: tensor[image : image + 1] for name, tensor in texts.items()}
        torch.testing.assert_close(
            model(inputs[image : image + 1], **alone).sample, logits[image : image + 1], atol=1e-5, rtol=0
        )
    assert not torch.allclose(model(inputs, **random_texts(seed=5)).sample, logits, atol=1e-2)


@torch.no_grad()
def test_halves_are_merged_before_the_last_layer_as_if_after_it():
    model, inputs, texts = make_transformer(), random_inputs(1).repeat(2, 1, 1), random_texts()
    conditional, unconditional = model(inputs, **texts).sample.chunk(2)
    for weight in (1.5, torch.tensor(1.5)):
        logits = model(inputs, **texts, guidance_weight=weight).sample
        torch.testing.assert_close(logits, 2.5 * conditional - 1.5 * unconditional, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rotary_positions_are_places_in_the_picture():
    cosines, sines = scale_rotary_embedding([[1, 3], [5, 1]], 8, 16.0, 2.0, torch.device("cpu"))
    assert cosines.shape == sines.shape == (1, 8, 1, 4)
    angles = torch.tensor([[0.0, 0, 0, 0], [1, 0.25, 0, 0], [2, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0.5, 0.125]])
    torch.testing.assert_close(cosines[0, :5, 0], angles.cos())
    torch.testing.assert_close(sines[0, :5, 0], angles.sin())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_frequencies_that_keep_theirs(dtype, tmp_path):
    model, inputs, texts = make_transformer("causal"), random_inputs(), random_texts()
    expected = model(inputs, **texts).sample
    model.save_pretrained(tmp_path)
    loaded = ScaleTextTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, make_transformer("causal").to(dtype)):
        dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
        assert torch.equal(half.size_embed.frequencies, model.size_embed.frequencies)
        assert {*dtypes.values()} == {dtype, torch.float32}
        assert [name for name, each in dtypes.items() if each == torch.float32] == ["size_embed.frequencies"]
        assert half.dtype == dtype
        logits = half(inputs, **texts).sample
        assert logits.dtype == dtype
        assert (logits - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15) * expected.std() * 4


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(tmp_path):
    model, inputs, texts = make_transformer("causal", rope_extent=9), random_inputs(), random_texts()
    model.save_pretrained(tmp_path)
    loaded = ScaleTextTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs, **texts).sample, model(inputs, **texts).sample)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


@torch.no_grad()
def test_lora_by_the_names_of_diffusers(tmp_path):
    model, inputs, texts = make_transformer(), random_inputs(), random_texts()
    expected = model(inputs, **texts).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = model(inputs, **texts).sample
    assert not torch.allclose(adapted, expected, atol=1e-3)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 2 * len(targets)
    model.save_lora_adapter(tmp_path)
    other = make_transformer()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(other(inputs, **texts).sample, adapted)
    model.disable_adapters()
    assert torch.equal(model(inputs, **texts).sample, expected)


@torch.no_grad()
def test_compiled_blocks_are_one_graph_for_all_scales():
    model, plain = make_transformer("causal"), make_transformer("causal")
    inputs, texts = random_inputs(), random_texts()
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    counts = []
    for _ in range(2):
        caches = [ScaleKVCache(NUM_TOKENS), ScaleKVCache(NUM_TOKENS)]
        stored = [ModulationCache(), ModulationCache()]
        for scale in range(1, LAST + 1):
            drawn = [
                each(inputs[:, TOKENS[scale]], LAST - scale, **texts, kv_cache=cache, modulation_cache=kept).sample
                for each, cache, kept in zip((model, plain), caches, stored)
            ]
            torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)
        counts.append(counters["stats"]["unique_graphs"])
    # Without and with what is stored.
    assert counts == [2, 2]
    assert not counters["graph_break"]


def test_initial_blocks_change_their_input_by_the_text_only():
    torch.manual_seed(0)
    model = ScaleTextTransformer2DModel(
        codebook_size=512, num_layers=4, num_attention_heads=4, attention_head_dim=16, scale_sizes=SCALE_SIZES,
        latent_channels=LATENT_CHANNELS, cross_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM,
    )  # fmt: skip
    std = math.sqrt(1 / (3 * 64))
    expected = {
        "proj_in.weight": std,
        "pooled_embed.weight": std,
        "start_pos_embed": std,
        "proj_out.weight": 0.02 * std,
        "blocks.0.attn2.to_k.weight": std,
        "blocks.3.attn.to_out.0.weight": std / math.sqrt(8),
        "blocks.3.attn2.to_out.0.weight": std / math.sqrt(8),
        "blocks.3.ff.net.2.weight": std / math.sqrt(8),
    }
    weights = dict(model.named_parameters())
    assert {name: weights[name].std().item() for name in expected} == pytest.approx(expected, rel=0.15)
    assert weights["blocks.1.adaln.weight"][: 2 * 64].std().item() == pytest.approx(1e-5 * std, rel=0.1)
    assert not weights["blocks.1.size_scales"].any()
    with torch.no_grad():
        logits = model(random_inputs(), **random_texts()).sample
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(512, (2 * NUM_TOKENS,)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_pattern": "full"}, "`attention_pattern` must be one of"),
        ({"scale_sizes": [2, 1]}, "`scale_sizes` must grow"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4, .*one of 8, got 6 and 2"),
        ({"attention_head_dim": 4, "num_attention_heads": 1}, "must be a multiple of 4, .*one of 8, got 4 and 1"),
        ({"cross_attention_dim": 0}, r"`cross_attention_dim` must be an integer in \[1, 65536\], got 0"),
        ({"rope_extent": 0}, "`rope_extent` must be a finite number .*got 0"),
        ({"rope_theta": "10000"}, "`rope_theta` must be a finite number .*got '10000'"),
        ({"num_layers": 256, "num_attention_heads": 1024}, "must give a model of at most 2e.10 parameters"),
    ],
)
def test_constructor_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**overrides)


NO_TEXTS = {
    "no text": ({"encoder_hidden_states": None}, "`encoder_hidden_states` must be a floating-point tensor"),
    "no pooled text": (
        {"pooled_projections": None},
        r"`pooled_projections` must be .* of shape \(2, 6\), got NoneType",
    ),
    "another width": (
        {"encoder_hidden_states": torch.zeros(2, 5, 11)},
        r"`encoder_hidden_states` must be .* of shape \(2, num_text_tokens, 12\), got .*\(2, 5, 11\)",
    ),
    "another width of the pooled": ({"pooled_projections": torch.zeros(2, 7)}, r"`pooled_projections` .*\(2, 7\)"),
    "no tokens": ({"encoder_hidden_states": torch.zeros(2, 0, 12)}, r"`encoder_hidden_states` .*\(2, 0, 12\)"),
    "another batch": ({"encoder_hidden_states": torch.zeros(1, 5, 12)}, r"`encoder_hidden_states` .*\(1, 5, 12\)"),
    "integers": ({"encoder_hidden_states": torch.zeros(2, 5, 12, dtype=torch.long)}, "floating-point .*int64"),
    "a mask of another length": (
        {"encoder_attention_mask": torch.ones(2, 4, dtype=torch.bool)},
        r"`encoder_attention_mask` must be a boolean tensor of shape \(2, 5\), got .*\(2, 4\)",
    ),
    "a mask of integers": ({"encoder_attention_mask": torch.ones(2, 5, dtype=torch.long)}, "boolean .*int64"),
    "a mask that is none": ({"encoder_attention_mask": "all"}, "`encoder_attention_mask` must be .*got str 'all'"),
    "sizes of another batch": (
        {"original_size": torch.ones(1, 2)},
        r"`original_size` must be two numbers or .*\(2, 2\)",
    ),
    "one size": ({"original_size": 512}, "`original_size` must be a list of 2 entries, got 512"),
    "a negative crop": ({"crop_coords": (0, -1)}, "`crop_coords` must be a finite number of at least 0, got -1"),
}


@pytest.mark.parametrize("case", NO_TEXTS)
def test_texts_that_do_not_fit_are_refused(case):
    wrong, message = NO_TEXTS[case]
    with pytest.raises(ValueError, match=message):
        make_transformer()(random_inputs(), **{**random_texts(), **wrong})


def test_other_arguments_are_checked_as_those_of_the_first_class_are():
    model, texts = make_transformer(), random_texts()
    with pytest.raises(ValueError, match=r"`timestep` must be falling integers in \[0, 3\], got \[4\]"):
        model(random_inputs(), 4, **texts)
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 25, 8\)"):
        model(random_inputs(num_tokens=24), **texts)
    with pytest.raises(ValueError, match="`guidance_weight` must be a finite number, got nan"):
        model(random_inputs(), **texts, guidance_weight=math.nan)
    with pytest.raises(ValueError, match="`kv_cache` must hold the timestep 2"):
        model(random_inputs(num_tokens=2), 2, **texts, token_indices=torch.tensor([[0, 1], [1, 0]]))
