"""
Windows of attention, against a plain dense attention under an explicit mask of neighbourhoods.

Shape legend: N tokens.
"""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from no_host import RefuseTransfers
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, tiny_transformer
from torch._dynamo.utils import counters

from srdd import ScaleKVCache, ScaleTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.models.attention_scale import scale_segments
from srdd.models.neighbourhoods import NEIGHBOURHOOD_MASKS, Neighbourhood, neighbourhood_mask


SCALE_SIZES = [[1, 1], [2, 3], [3, 5], [5, 6]]
WINDOWS = [0, 1, 3, 5]
TOKENS = [slice(0, 1), slice(1, 7), slice(7, 22), slice(22, 52)]
NUM_TOKENS, LAST = 52, 3
CPU = torch.device("cpu")


def make_transformer(windows=WINDOWS, processor=ScaleAttnProcessor, backend="native", **overrides):
    overrides = {"scale_sizes": SCALE_SIZES, "attention_windows": windows, **overrides}
    model = tiny_transformer("markov", **overrides)
    model.set_attn_processor(processor())
    with attention_backend():
        model.set_attention_backend(backend)
    return model


def random_inputs(num_tokens=NUM_TOKENS, seed=0) -> torch.Tensor:
    return torch.randn(2, num_tokens, LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed))


def plain_mask(scales=(0, 1, 2, 3), windows=WINDOWS) -> torch.Tensor:
    """`(N, N)`, true where attention is allowed, token by token: squares around a token, shifted inwards at edges."""
    grids = [(scale, *map(range, SCALE_SIZES[scale])) for scale in scales]
    places = [(scale, row, column) for scale, rows, columns in grids for row in rows for column in columns]

    def is_near(place: int, other: int, length: int, window: int) -> bool:
        start = min(max(place - window // 2, 0), length - window)
        return start <= other < start + window

    def sees(query, key):
        scale, row, column = query
        if scale != key[0] or windows[scale] == 0:
            return scale == key[0]
        (height, width), window = SCALE_SIZES[scale], windows[scale]
        return is_near(row, key[1], height, window) and is_near(column, key[2], width, window)

    return torch.tensor([[sees(query, key) for key in places] for query in places])


def plain_logits(model, inputs, labels, scales=(0, 1, 2, 3), windows=WINDOWS) -> torch.Tensor:
    """The network in one piece, with softmax over masked scores."""
    condition, mask = model.class_embed.weight[labels], plain_mask(scales, windows)
    x = model.proj_in(inputs)
    if scales[0] == 0:
        x = torch.cat([condition[:, None] + model.start_pos_embed, x[:, 1:]], dim=1)
    x = x + torch.cat([model.pos_embed[0, TOKENS[scale]] + model.scale_embed.weight[scale] for scale in scales])
    activated = F.silu(condition)
    for block in model.blocks:
        gate1, gate2, scale1, scale2, shift1, shift2 = block.adaln(activated).unflatten(-1, (6, 1, -1)).unbind(1)
        modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        query, key, value = (
            project(modulated).unflatten(-1, (2, -1)).transpose(1, 2)
            for project in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
        )
        query = F.normalize(query, dim=-1) * block.attn.query_scale.exp()[:, None]
        scores = (query @ F.normalize(key, dim=-1).transpose(-1, -2)).masked_fill(~mask, -torch.inf)
        x = x + gate1 * block.attn.to_out[0]((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        x = x + gate2 * block.ff(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)
    scale, shift = model.adaln_out(activated)[:, None].chunk(2, dim=-1)
    return model.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize(("size", "window"), [((5, 6), 3), ((5, 6), 5), ((1, 4), 1), ((7, 7), 7), ((13, 13), 7)])
def test_squares_are_shifted_inwards_at_the_edges(size, window):
    mask = neighbourhood_mask(Neighbourhood(size, window), CPU).view(*size, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            top, left = (min(max(i - window // 2, 0), n - window) for i, n in zip((row, column), size))
            expected = torch.zeros(size, dtype=torch.bool)
            expected[top : top + window, left : left + window] = True
            assert torch.equal(mask[row, column], expected)
    asked = Neighbourhood(size, window), CPU
    assert NEIGHBOURHOOD_MASKS[asked] is NEIGHBOURHOOD_MASKS[asked]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scales", [(0, 1, 2, 3), (0, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("way", ["per scale", "mask", "flex"])
def test_logits_are_those_of_dense_masked_attention(way, scales):
    processor = ScaleAttnProcessor if way == "per scale" else MaskedScaleAttnProcessor
    model = make_transformer(processor=processor, backend="flex" if way == "flex" else "native")
    inputs, labels = torch.cat([random_inputs()[:, TOKENS[scale]] for scale in scales], dim=1), torch.tensor([2, 5])
    logits = model(inputs, [LAST - scale for scale in scales], labels).sample
    torch.testing.assert_close(logits, plain_logits(model, inputs, labels, scales), atol=1e-5, rtol=0)
    whole = make_transformer([0, 0, 0, 0])(inputs, [LAST - scale for scale in scales], labels).sample
    assert (logits - whole).abs().max() > 1e-2


@pytest.mark.parametrize("scales", [(0, 1, 2, 3), (1, 3)])
def test_masks_for_one_call_allow_what_windows_do(scales):
    timesteps, processor = [LAST - scale for scale in scales], MaskedScaleAttnProcessor()
    counts = [TOKENS[scale].stop - TOKENS[scale].start for scale in scales]
    packed = map(tuple, (timesteps, counts, (), make_transformer().neighbourhoods(timesteps)))
    segments = scale_segments(1, *packed)
    expected, places = plain_mask(scales), torch.arange(sum(counts))
    assert torch.equal(processor.attention_mask(segments, None, CPU)[0, 0], expected)
    processor._attention_backend = AttentionBackendName.FLEX
    block_mask = processor.attention_mask(segments, None, CPU)
    assert torch.equal(block_mask.mask_mod(0, 0, places[:, None], places), expected)


@torch.no_grad()
def test_windows_of_none_and_of_zeros_are_no_windows():
    model, inputs = make_transformer(None), random_inputs()
    for windows in ([0, 0, 0, 0], [1, 0, 0, 0]):  # a scale of one token sees that one
        assert torch.equal(make_transformer(windows)(inputs).sample, model(inputs).sample)


@pytest.mark.parametrize("processor", [ScaleAttnProcessor, MaskedScaleAttnProcessor])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_dense_masked_attention(processor, checkpointing):
    model = make_transformer(processor=processor)
    if checkpointing:
        model.enable_gradient_checkpointing()
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
def test_a_mask_of_an_evaluation_serves_training():
    NEIGHBOURHOOD_MASKS.clear()
    model = make_transformer()
    with torch.inference_mode():
        model(random_inputs())
    with torch.enable_grad():
        model(random_inputs()).sample.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_some_tokens_of_a_scale_are_computed_as_all_of_them_are(scale):
    model, inputs, labels = make_transformer(), random_inputs()[:, TOKENS[scale]], torch.tensor([2, 5])
    cache = ScaleKVCache()
    expected = model(inputs, LAST - scale, labels, kv_cache=cache).sample
    assert torch.equal(expected, model(inputs, LAST - scale, labels).sample)
    num_tokens = inputs.shape[1]
    indices = torch.stack([torch.arange(num_tokens)[::2], torch.arange(num_tokens).flip(0)[::2]])
    states = inputs.take_along_dim(indices[..., None], dim=1)
    expected = expected.take_along_dim(indices[..., None], dim=1)
    logits = model(states, LAST - scale, labels, kv_cache=cache, token_indices=indices).sample
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    row = torch.tensor([1])
    arguments = {"kv_cache": cache.select(row), "token_indices": indices[row]}
    logits = model(states[row], LAST - scale, labels[row], **arguments).sample
    torch.testing.assert_close(logits, expected[row], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("processor", [ScaleAttnProcessor, MaskedScaleAttnProcessor])
def test_compiled_blocks_are_given_the_masks(processor):
    model, labels = make_transformer(processor=processor), torch.tensor([2, 5])
    expected = [model(random_inputs()[:, tokens], LAST - k, labels).sample for k, tokens in enumerate(TOKENS)]
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for _ in range(2):
        for scale, tokens in enumerate(TOKENS):
            logits = model(random_inputs()[:, tokens], LAST - scale, labels).sample
            torch.testing.assert_close(logits, expected[scale], atol=1e-5, rtol=0)
    # A scale of one token, one seen whole, and those with a window, of any size.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def test_masks_are_made_without_the_host():
    # On a device without numbers, to read one is an error.
    model = make_transformer().to("meta")
    NEIGHBOURHOOD_MASKS.clear()
    with torch.no_grad(), RefuseTransfers():
        for scale, tokens in enumerate(TOKENS):
            num_tokens = tokens.stop - tokens.start
            model(torch.zeros(2, num_tokens, LATENT_CHANNELS, device="meta"), LAST - scale)


def test_windows_are_saved(tmp_path):
    model, inputs = make_transformer(), random_inputs()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_windows"] == WINDOWS
    loaded = ScaleTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).sample, model(inputs).sample)
    loaded = ScaleTransformer2DModel.from_pretrained(tmp_path, attention_pattern="causal", attention_windows=None)
    assert loaded.config.attention_windows is None


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([0, 1, 3, 4], "`attention_windows[3]` must be 0 or an odd integer in [1, 5], got 4"),
        ([0, 1, 5, 3], "`attention_windows[2]` must be an integer in [0, 3], got 5"),
        ([0, -1, 3, 3], "`attention_windows[1]` must be an integer in [0, 2], got -1"),
        ([0, 0, 3], "`attention_windows` must be a list of 4 entries, got [0, 0, 3]"),
        (7, "`attention_windows` must be a list of 4 entries, got 7"),
    ],
)
def test_windows_that_do_not_fit_are_refused(windows, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_transformer(windows)


@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_windows_belong_to_one_pattern(pattern):
    message = f"`attention_windows` must be None with the attention pattern '{pattern}', .* got \\[0, 1, 3, 5\\]"
    with pytest.raises(ValueError, match=message):
        tiny_transformer(pattern, scale_sizes=SCALE_SIZES, attention_windows=WINDOWS)
    model = make_transformer()
    model.register_to_config(attention_pattern=pattern)
    with pytest.raises(ValueError, match=message):
        model(random_inputs())
    model.register_to_config(attention_windows=None)
    assert model(random_inputs()).sample.isfinite().all()
