import copy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from tiny_models import ID2LABEL, LATENT_CHANNELS, tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae
from torch._dynamo.utils import counters

from srdd import SRDDPipeline, SRDDPipelineOutput


PATTERNS = ("causal", "markov", "banded")

# All ways to refine a scale; the threshold lies so that the tiny models redraw some tokens and keep others.
POLICIES = ("none", "simple", "masked", "remasked")

TOKENS = {2: slice(0, 1), 1: slice(1, 5), 0: slice(5, 21)}


def make_scheduler(policy: str, **overrides):
    settings = {"num_resampling_passes": 3, "resampling_threshold": 0.05}
    return tiny_scheduler(**{**settings, "resampling_policy": policy, **overrides})


def lively_pipeline(pattern: str = "markov", **settings):
    """A tiny pipeline whose most probable tokens differ from place to place."""
    pipe = tiny_pipeline(pattern, **settings)
    with torch.no_grad():
        pipe.vqvae.quantize.codebook.weight.mul_(5)
        pipe.transformer.pos_embed.mul_(5)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, class_labels, **arguments):
    output = pipe(class_labels, output_type="latent", **arguments)
    return output.images, output.token_ids


def forward_shapes(pipe, **arguments) -> list[tuple[int, int]]:
    """Batch size and number of tokens of every pass through the transformer during a run."""
    shapes = []
    handle = pipe.transformer.proj_in.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    pipe(output_type="latent", **arguments)
    handle.remove()
    return [tuple(shape[:2]) for shape in shapes]


def forward_batches(pipe, **arguments) -> list[int]:
    """Batch size of every pass through the transformer during a run."""
    return [batch_size for batch_size, _ in forward_shapes(pipe, **arguments)]


def plain_sample(pipe, label: int, guidance_scale: float, generator: torch.Generator) -> torch.Tensor:
    """
    The whole method for one image, without cache, slices or shared code: every pass is a forward over all scales so
    far. Returns the token pyramid. Where accepted tokens are kept this is right for a transformer of one block, where
    what others see of a token follows from its input.
    """
    config, transformer, vqvae = pipe.scheduler.config, pipe.transformer, pipe.vqvae
    sizes, last = config.scale_sizes, len(config.scale_sizes) - 1
    passes = 1 if config.resampling_policy == "none" else 1 + config.num_resampling_passes
    keeps = config.resampling_policy == "masked"
    null = transformer.config.num_classes
    state, inputs, maps = torch.zeros(1, LATENT_CHANNELS, *sizes[-1]), [], []
    for k, size in enumerate(sizes):
        before, tokens, low, last_input = state, None, None, None
        for number in range(passes):
            if number > 0 and not low.any():
                break
            x = F.adaptive_avg_pool2d(state, size)
            if number > 0 and keeps:
                x = torch.where(low.view(1, 1, *size), x, last_input)
            last_input = x
            packed = torch.cat([part.flatten(2) for part in [*inputs[:k], x]], dim=2).transpose(1, 2)
            timesteps = list(range(last, last - k - 1, -1))
            cond, uncond = (
                transformer(packed, timesteps, torch.tensor([which])).sample[:, -size[0] * size[1] :]
                for which in (label, null)
            )
            t = (guidance_scale - 1) * k / last
            logits = (1 + t) * cond - t * uncond
            noise = -torch.rand(logits.shape[1:], dtype=torch.float64, generator=generator).neg().log1p().float()
            drawn = (logits.softmax(-1) / noise).argmax(-1)
            tokens = drawn if number == 0 else torch.where(low, drawn, tokens)
            probabilities = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            was_low = torch.ones_like(tokens, dtype=torch.bool) if number == 0 else low
            low = torch.ones_like(tokens, dtype=torch.bool)
            if config.resampling_policy in ("masked", "remasked"):
                low = probabilities < config.resampling_threshold
            if keeps:
                low = low & was_low
            if number == 0:
                # Later scales look back at what the first pass saw.
                inputs = [*inputs, x]
            state = before + vqvae.residual_map(tokens.view(1, *size))
        maps.append(tokens.view(1, *size))
    return torch.cat([part.flatten(1) for part in maps], dim=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_of_the_plain_algorithm(pattern, policy):
    # Where accepted tokens are kept, the plain algorithm holds for one block.
    transformer = tiny_transformer(pattern, num_layers=1 if policy == "masked" else 2)
    pipe = lively_pipeline(transformer=transformer, scheduler=make_scheduler(policy))
    for label, seed in ((1, 0), (4, 1)):
        token_ids = latents_of(pipe, label, guidance_scale=3.0, generator=generators(seed))[1]
        with torch.no_grad():
            expected = plain_sample(pipe, label, 3.0, *generators(seed))
        assert token_ids.unique().numel() > 5
        assert torch.equal(token_ids, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_passes_compute_no_token_that_an_earlier_one_accepted(pattern):
    pipe = lively_pipeline(pattern, scheduler=make_scheduler("masked", num_resampling_passes=8))
    draw = {"class_labels": [1, 2, 3], "guidance_scale": 1.0, "generator": generators(0, 1, 2)}
    states = []

    def on_step_end(pipe, index, timestep, tensors):
        states.append((timestep, tensors["token_ids"]))
        return {}

    draw["callback_on_step_end"] = on_step_end
    shapes = forward_shapes(pipe, **draw, callback_on_step_end_tensor_inputs=["token_ids"])
    assert len(shapes) == len(states)
    previous, num_partial = None, 0
    for (batch_size, num_computed), (timestep, token_ids) in zip(shapes, states):
        tokens = TOKENS[timestep]
        if previous is None or previous[0] != timestep:
            assert (batch_size, num_computed) == (3, tokens.stop - tokens.start)
        else:
            changed = (previous[1] != token_ids)[:, tokens]
            assert changed.any(dim=1).sum() <= batch_size <= previous[2]
            assert changed.sum(dim=1).max() <= num_computed <= previous[3]
            num_partial += num_computed < tokens.stop - tokens.start
        previous = (timestep, token_ids, batch_size, num_computed)
    assert num_partial > 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_policies_agree_where_nothing_is_accepted(pattern):
    pyramids = []
    for name in ("simple", "masked", "remasked"):
        pipe = lively_pipeline(pattern, scheduler=make_scheduler(name, resampling_threshold=1.0))
        pyramids.append(latents_of(pipe, [1, 2], guidance_scale=3.0, generator=generators(0, 1))[1])
    assert torch.equal(pyramids[0], pyramids[1])
    assert torch.equal(pyramids[1], pyramids[2])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_guidance_that_comes_and_goes(pattern):
    def on_step_end(pipe, index, timestep, tensors):
        pipe._guidance_scale = 3.0 if index % 2 else 1.0
        return {}

    scheduler = make_scheduler("masked", guidance_schedule="constant")
    pipe = lively_pipeline(pattern, scheduler=scheduler)
    draw = {"guidance_scale": 3.0, "callback_on_step_end": on_step_end}
    batch = latents_of(pipe, [1, 2], generator=generators(0, 1), **draw)[1]
    alone = [latents_of(pipe, label, generator=generators(label - 1), **draw)[1] for label in (1, 2)]
    assert torch.equal(batch, torch.cat(alone))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_resampling_changes_greedy_tokens(policy):
    settings = {"temperature": 0.0, "resampling_threshold": 0.5}
    pipes = [lively_pipeline(scheduler=make_scheduler(name, **settings)) for name in (policy, "none")]
    refined, plain = (latents_of(pipe, list(ID2LABEL), guidance_scale=3.0)[1] for pipe in pipes)
    assert not torch.equal(refined, plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_latents_are_the_state_of_the_tokens(policy):
    pipe = tiny_pipeline(scheduler=make_scheduler(policy))
    latents, token_ids = latents_of(pipe, [1, 2, 3], generator=torch.Generator().manual_seed(0))
    expected = pipe.vqvae.latent_states(token_ids)[-1]
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_finished_scales_stay(pattern, policy):
    pipe = tiny_pipeline(pattern, scheduler=make_scheduler(policy))
    finished = {}

    def compare(pipe, index, timestep, tensors):
        for earlier in range(2, timestep, -1):
            assert torch.equal(tensors["token_ids"][:, TOKENS[earlier]], finished[earlier])
        finished[timestep] = tensors["token_ids"][:, TOKENS[timestep]].clone()
        return tensors

    pipe(
        [0, 1, 2],
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=compare,
        callback_on_step_end_tensor_inputs=["latents", "token_ids"],
    )
    assert list(finished) == [2, 1, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_seeds_reproduce_images(policy):
    pipe = tiny_pipeline(scheduler=make_scheduler(policy))
    for make in (lambda seed: torch.Generator().manual_seed(seed), lambda seed: generators(seed, seed + 100)):
        runs = [latents_of(pipe, [1, 2], generator=make(seed)) for seed in (0, 0, 1)]
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])
        assert not torch.equal(runs[0][1], runs[2][1])


def test_the_global_random_state_is_left_alone():
    pipe = tiny_pipeline(scheduler=make_scheduler("remasked"))
    state = torch.get_rng_state()
    pipe([1, 2], generator=torch.Generator().manual_seed(0), output_type="latent")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("guidance_scale", [1.0, 0.5])
def test_guidance_off_computes_no_second_half(pattern, guidance_scale):
    pipe = tiny_pipeline(pattern)
    assert forward_batches(pipe, class_labels=[1, 2], guidance_scale=guidance_scale) == [2, 2, 2]


@pytest.mark.parametrize(
    ("pattern", "schedule", "expected"),
    [
        ("markov", "linear", [2, 4, 4]),
        ("markov", "constant", [4, 4, 4]),
        # Later scales look back at the unconditional half of the first.
        ("causal", "linear", [4, 4, 4]),
        ("banded", "linear", [4, 4, 4]),
    ],
)
def test_the_second_half_is_computed_where_it_is_needed(pattern, schedule, expected):
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(guidance_schedule=schedule))
    assert forward_batches(pipe, class_labels=[1, 2], guidance_scale=2.0) == expected


@pytest.mark.parametrize(
    ("pattern", "interval", "expected"),
    [
        ("markov", {"guidance_stop": 2 / 3}, [4, 4, 2]),
        ("markov", {"guidance_start": 0.5}, [2, 2, 4]),
        ("markov", {"guidance_start": 0.3, "guidance_stop": 0.5}, [2, 4, 2]),
        ("causal", {"guidance_stop": 2 / 3}, [4, 4, 2]),
        ("banded", {"guidance_start": 0.5}, [4, 4, 4]),
    ],
)
def test_scales_without_guidance_are_drawn_at_half_the_cost(pattern, interval, expected):
    scheduler = tiny_scheduler(guidance_schedule="constant", temperature=0.0, **interval)
    pipe = tiny_pipeline(pattern, scheduler=scheduler)
    assert forward_batches(pipe, class_labels=[1, 2], guidance_scale=4.0) == expected
    # As if guidance had been switched on and off by hand.
    token_ids = latents_of(pipe, [1, 2], guidance_scale=4.0)[1]
    for timestep in (2, 1, 0):
        tokens = scheduler.visit(timestep).tokens
        inputs = pipe.vqvae.teacher_forcing_inputs(token_ids, scheduler.scales)[:, : tokens.stop]
        shown = list(range(2, timestep - 1, -1))
        with torch.no_grad():
            cond, uncond = (
                pipe.transformer(inputs, shown, labels).sample[:, tokens] for labels in (torch.tensor([1, 2]), None)
            )
        guided = scheduler.guidance_weight(timestep, 4.0)
        assert guided == (3.0 if expected[2 - timestep] == 4 and not (pattern == "banded" and timestep) else 0.0)
        assert torch.equal((cond + guided * (cond - uncond)).argmax(dim=-1), token_ids[:, tokens])


def many_scales(pattern: str, num_scales: int = 10, **overrides):
    sizes = list(range(1, num_scales + 1))
    models = (
        tiny_vqvae(scale_sizes=sizes, sample_size=2 * num_scales),
        tiny_transformer(pattern, scale_sizes=sizes, **overrides),
    )
    pipe = SRDDPipeline(*models, make_scheduler("none", scale_sizes=sizes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start_counting():
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("markov", torch.float32),
        ("markov", torch.float16),
        ("causal", torch.bfloat16),
        ("banded", torch.float32),
    ],
)
def test_compiled_blocks_serve_all_scales(pattern, dtype):
    pipe = many_scales(pattern).to(dtype)
    expected = [latents_of(pipe, [1, 2], generator=generators(seed, seed + 1))[1] for seed in (0, 1, 2)]
    start_counting()
    # The backend "eager" runs what was traced as it is: what is tested is how often something is traced.
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    found, counts = [], []
    for seed in (0, 1, 2):
        found.append(latents_of(pipe, [1, 2], generator=generators(seed, seed + 1))[1])
        counts.append(counters["stats"]["unique_graphs"])
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    assert 0 < counts[0] == counts[1] == counts[2] <= 3  # of sizes of 1, and of a run's first forward
    other = many_scales(pattern, num_scales=7).to(dtype)  # of another resolution
    other.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    latents_of(other, [1, 2], generator=generators(0, 1))
    assert counters["stats"]["unique_graphs"] <= counts[0] + 1


@pytest.mark.slow
def test_blocks_compiled_for_any_shape_serve_all_batches():
    pipe = many_scales("markov", num_layers=1)
    draws = [([1, 2], 4.0), ([3], 4.0), ([1, 2], 1.0), ([1], 1.0), ([1, 2, 3], 4.0)]
    expected = [
        latents_of(pipe, labels, guidance_scale=scale, generator=generators(*labels)) for labels, scale in draws
    ]
    start_counting()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    for (labels, scale), (_, token_ids) in zip(draws, expected):
        found = latents_of(pipe, labels, guidance_scale=scale, generator=generators(*labels))[1]
        assert torch.equal(found, token_ids)
    # Far from the 8 after which torch refuses to trace again: batches and scales of 1 are cases of their own.
    assert counters["stats"]["unique_graphs"] <= 5


@pytest.mark.parametrize("policy", ["masked", "remasked"])
def test_compiled_blocks_refine(policy):
    pipe = lively_pipeline(scheduler=make_scheduler(policy))
    draw = {"class_labels": [1, 2], "guidance_scale": 3.0}
    expected = latents_of(pipe, **draw, generator=generators(0, 1))[1]
    torch.compiler.reset()
    # Accepted tokens are looked up in a cache, outside of the graph.
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=not pipe.scheduler.keeps_accepted_tokens)
    assert torch.equal(latents_of(pipe, **draw, generator=generators(0, 1))[1], expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or shutil.which("g++") is None, reason="compiles C++")
def test_compiled_code_draws_the_same_tokens():
    pipe = many_scales("markov")

    def draw(*seeds):
        class_labels = [1, 2][: len(seeds)]
        return latents_of(pipe, class_labels, guidance_scale=4.0, generator=generators(*seeds))[1]

    expected = [draw(*seeds) for seeds in ((0, 1), (2, 3), (4,), (5,))]
    start_counting()
    # On a CPU this mode goes without CUDA graphs.
    pipe.transformer.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True, dynamic=True)
    found, counts = [], []
    for seeds in ((0, 1), (2, 3), (4,), (5,)):
        found.append(draw(*seeds))
        counts.append(counters["stats"]["unique_graphs"])
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_images_that_are_finished_at_a_scale_are_not_computed_again(pattern):
    scheduler = make_scheduler("remasked", resampling_threshold=0.02, num_resampling_passes=8)
    pipe = tiny_pipeline(pattern, scheduler=scheduler)
    draw = {"class_labels": [1, 2, 3, 4], "guidance_scale": 1.0, "generator": generators(0, 1, 2, 3)}
    passes = forward_batches(pipe, **draw)
    alone = [
        forward_batches(pipe, class_labels=label, guidance_scale=1.0, generator=generators(label - 1))
        for label in (1, 2, 3, 4)
    ]
    assert sum(passes) == sum(len(each) for each in alone)
    assert len(set(passes)) > 2


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_unconditional_draws_are_not_guided(guidance_scale):
    pipe = tiny_pipeline(scheduler=tiny_scheduler(guidance_schedule="constant"))
    assert forward_batches(pipe, guidance_scale=guidance_scale) == [1, 1, 1]
    assert pipe.guidance_scale == 1.0


def test_unconditional_draws_are_those_of_the_null_class():
    scheduler = tiny_scheduler(temperature=0.0)
    conditional = tiny_pipeline(scheduler=scheduler)
    unconditional = tiny_pipeline(transformer=tiny_transformer(num_classes=0), scheduler=scheduler)
    state = conditional.transformer.state_dict()
    state["class_embed.weight"] = state["class_embed.weight"][-1:]
    unconditional.transformer.load_state_dict(state)
    drawn = [latents_of(pipe, None, num_images_per_prompt=2)[1] for pipe in (conditional, unconditional)]
    assert drawn[0].shape == (2, 21)
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, got 0"):
        unconditional(0)


def test_number_of_passes():
    off = {"class_labels": 1, "guidance_scale": 1.0}
    every = {"resampling_threshold": 1.0}
    assert forward_batches(tiny_pipeline(scheduler=make_scheduler("simple")), **off) == [1] * 12
    assert forward_batches(tiny_pipeline(scheduler=make_scheduler("remasked", **every)), **off) == [1] * 12
    assert forward_batches(tiny_pipeline(scheduler=make_scheduler("masked", **every)), **off) == [1] * 12
    per_scale = make_scheduler("simple", num_resampling_passes=[0, 2, 1])
    assert forward_batches(tiny_pipeline(scheduler=per_scale), **off) == [1] * 6


@pytest.mark.parametrize("policy", ["masked", "remasked"])
def test_resampling_stops_when_no_token_is_low(policy):
    scheduler = make_scheduler(policy, resampling_threshold=0.0, num_resampling_passes=20)
    pipe = tiny_pipeline(scheduler=scheduler)
    assert forward_batches(pipe, class_labels=1, guidance_scale=1.0) == [1, 1, 1]
    scheduler = make_scheduler(policy, resampling_threshold=0.02, num_resampling_passes=40)
    generator = torch.Generator().manual_seed(0)
    passes = forward_batches(
        tiny_pipeline(scheduler=scheduler), class_labels=1, guidance_scale=1.0, generator=generator
    )
    assert 3 < len(passes) < 3 * 41


@pytest.mark.parametrize("scales", [[1, 4], [1, 2, 4]])
@pytest.mark.parametrize("policy", ["none", "simple", "masked"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_part_of_the_scales(pattern, policy, scales):
    pipe = tiny_pipeline(pattern, scheduler=make_scheduler(policy, scales=scales))
    output = pipe([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt")
    assert output.token_ids.shape == (2, sum(side * side for side in scales))
    assert output.token_ids.min() >= 0
    decoded = pipe.vqvae.decode_tokens(output.token_ids, scales).sample
    torch.testing.assert_close(output.images, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_labels_by_id_and_name_draw_the_same():
    pipe = tiny_pipeline(scheduler=tiny_scheduler(temperature=0.0))
    expected = latents_of(pipe, [0, 4, 4, 1])[1]
    for labels in (["apple", "tomato", "love apple", 1], torch.tensor([0, 4, 4, 1]), ("apple", 4, 4, "banana")):
        assert torch.equal(latents_of(pipe, labels)[1], expected)
    assert torch.equal(latents_of(pipe, "tomato")[1], expected[1:2])
    assert pipe.get_label_ids(["tomato", 0]) == [4, 0]
    assert pipe.id2label == ID2LABEL


def test_images_per_prompt_follow_their_label():
    pipe = tiny_pipeline(scheduler=tiny_scheduler(temperature=0.0))
    both, each = latents_of(pipe, [1, 4])[1], latents_of(pipe, [1, 4], num_images_per_prompt=3)[1]
    assert not torch.equal(both[0], both[1])
    assert torch.equal(each, both.repeat_interleave(3, dim=0))


def test_output_types_show_the_same_images():
    pipe = tiny_pipeline()
    run = {kind: pipe([1, 2], generator=generators(0, 1), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert all(isinstance(output, SRDDPipelineOutput) for output in run.values())
    assert all(torch.equal(output.token_ids, run["pt"].token_ids) for output in run.values())
    pixels = run["pt"].images
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert run["np"].images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(run["np"].images, pixels.permute(0, 2, 3, 1).numpy())
    for picture, array in zip(run["pil"].images, run["np"].images):
        assert (picture.mode, picture.size) == ("RGB", (8, 8))
        np.testing.assert_array_equal(np.asarray(picture), (array * 255).round().astype(np.uint8))
    latents = run["latent"].images
    assert latents.shape == (2, LATENT_CHANNELS, 4, 4)
    assert not latents.requires_grad
    with torch.no_grad():
        assert torch.equal(pipe.decode_latents(latents, "pt"), pixels)
    # Where gradients may be asked for, the decoder takes another way.
    torch.testing.assert_close(pipe.decode_latents(latents, "pt").detach(), pixels, atol=1e-5, rtol=0)


def test_the_default_is_pictures():
    images = tiny_pipeline()(1).images
    assert [picture.size for picture in images] == [(8, 8)]


def test_return_dict_false():
    pipe = tiny_pipeline(scheduler=tiny_scheduler(temperature=0.0))
    images, token_ids = pipe([1, 2], output_type="latent", return_dict=False)
    expected = latents_of(pipe, [1, 2])
    assert torch.equal(images, expected[0])
    assert torch.equal(token_ids, expected[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_given_latents_are_what_the_scales_are_added_to(pattern):
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(temperature=0.0))
    start = torch.randn(2, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    latents, token_ids = latents_of(pipe, [1, 2], latents=start)
    added = pipe.vqvae.latent_states(token_ids)[-1]
    torch.testing.assert_close(latents, start + added, atol=1e-5, rtol=0)
    from_zero = latents_of(pipe, [1, 2])
    assert not torch.equal(token_ids, from_zero[1])
    assert torch.equal(latents_of(pipe, [1, 2], latents=torch.zeros_like(start))[0], from_zero[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_callback_sees_every_pass(policy):
    pipe, calls = tiny_pipeline(scheduler=make_scheduler(policy)), []

    def watch(pipeline, index, timestep, tensors):
        assert pipeline is pipe
        assert list(tensors) == ["latents", "token_ids"]
        drawn = tensors["token_ids"]
        assert (drawn[:, : TOKENS[timestep].stop] >= 0).all()
        assert (drawn[:, TOKENS[timestep].stop :] == -1).all()
        state = pipe.vqvae.latent_states(
            drawn[:, : TOKENS[timestep].stop], pipe.scheduler.scales[: 3 - timestep], (4, 4)
        )[-1]
        torch.testing.assert_close(tensors["latents"], state, atol=1e-5, rtol=0)
        calls.append((index, timestep))
        return {}

    sizes = forward_batches(
        pipe,
        class_labels=[1, 2],
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "token_ids"],
    )
    assert len(calls) == len(sizes)
    assert [timestep for _, timestep in calls] == [pipe.scheduler.timesteps[index].item() for index, _ in calls]
    if policy in ("none", "simple"):
        assert [index for index, _ in calls] == list(range(pipe.num_timesteps))
    else:
        assert 3 < len(calls)


def test_callback_holds_the_latents_by_default():
    names = []
    tiny_pipeline()(1, callback_on_step_end=lambda pipe, index, timestep, tensors: names.append(list(tensors)) or {})
    assert names == [["latents"]] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_callback_may_change_the_latents(policy):
    pipe = lively_pipeline(scheduler=make_scheduler(policy, temperature=0.0))
    untouched = latents_of(pipe, [1, 2])
    shift = torch.randn(2, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))

    def move(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] + shift} if timestep == 1 else {}

    def replace(pipe, index, timestep, tensors):
        return {"latents": shift}

    moved = latents_of(pipe, [1, 2], callback_on_step_end=move)
    assert torch.equal(moved[1][:, TOKENS[2]], untouched[1][:, TOKENS[2]])
    assert not torch.equal(moved[1][:, TOKENS[0]], untouched[1][:, TOKENS[0]])
    assert torch.equal(latents_of(pipe, [1, 2], callback_on_step_end=replace)[0], shift)


def test_callback_may_change_the_tokens():
    pipe = tiny_pipeline()
    tokens = latents_of(
        pipe,
        1,
        callback_on_step_end=lambda pipe, index, timestep, tensors: {"token_ids": tensors["token_ids"].clamp(max=3)},
        callback_on_step_end_tensor_inputs=["token_ids"],
    )[1]
    assert tokens.max() <= 3


def test_half_precision_pipeline():
    pipe = tiny_pipeline(scheduler=make_scheduler("remasked")).to(torch.bfloat16)
    output = pipe([1, 2], generator=generators(0, 1), output_type="pt")
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()
    assert latents_of(pipe, 1)[0].dtype == torch.float32


@torch.no_grad()
def test_nan_logits_stop_the_run():
    pipe = tiny_pipeline()
    pipe.transformer.proj_out.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="`transformer` must give finite logits .* got NaN or infinite ones at timestep 2"
    ):
        pipe(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 5}, r"`class_labels` must lie in \[0, 4\], got 5"),
        ({"class_labels": "plum"}, "`class_labels` must be names of classes .*got 'plum'"),
        ({"class_labels": []}, "`class_labels` must hold at least one label"),
        ({"generator": 0}, "`generator` must be a torch.Generator, a list of them or None, got 0"),
        ({"generator": [torch.Generator(), 1]}, "`generator` must be a torch.Generator, a list of them or None, got"),
        ({"generator": []}, "`generator` must be a list of 2 generators, got 0"),
        ({"guidance_scale": "2.5"}, "`guidance_scale` must be a finite number or None, got '2.5'"),
        ({"guidance_scale": torch.tensor(2.5)}, "`guidance_scale` must be a finite number or None, got tensor"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number or None, got nan"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number or None, got inf"),
        ({"guidance_scale": 10**400}, "`guidance_scale` must be a finite number or None, got 1000"),
        ({"guidance_scale": True}, "`guidance_scale` must be a finite number or None, got True"),
        ({"return_dict": "no"}, "`return_dict` must be True or False, got 'no'"),
        ({"return_dict": None}, "`return_dict` must be True or False, got None"),
        ({"output_type": None}, "`output_type` must be one of .*, got None"),
        ({"output_type": ["pil"]}, r"`output_type` must be one of .*, got \['pil'\]"),
        ({"latents": [0.0]}, r"`latents` must be a torch.Tensor of floats, got \[0.0\]"),
        ({"latents": torch.zeros(2, 8, 4, 4, dtype=torch.long)}, "`latents` must be a torch.Tensor of floats, got"),
        ({"latents": torch.full((2, 8, 4, 4), float("nan"))}, "`latents` must be finite, got NaN or infinite values"),
        (
            {"num_images_per_prompt": 10**9},
            r"`num_images_per_prompt` must be .* in \[1, 10000\], got 100000000",
        ),
        ({"num_images_per_prompt": True}, r"`num_images_per_prompt` must be an integer in \[1, 10000\], got True"),
        ({"callback_on_step_end": "print"}, "`callback_on_step_end` must be callable as .*, got 'print'"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "inputs` must be a list of .*, got 'latents'"),
        ({"callback_on_step_end_tensor_inputs": [3]}, r"inputs` must be a list of .*, got \[3\]"),
        ({"generator": generators(0, 1, 2)}, "`generator` must be a list of 2 generators, got 3"),
        ({"generator": generators(0)}, "`generator` must be a list of 2 generators, got 1"),
        ({"latents": torch.zeros(2, 8, 4, 5)}, r"`latents` must have shape \(2, 8, 4, 4\), got \(2, 8, 4, 5\)"),
        ({"latents": torch.zeros(1, 8, 4, 4)}, r"`latents` must have shape \(2, 8, 4, 4\), got \(1, 8, 4, 4\)"),
        ({"output_type": "jpg"}, r"`output_type` must be one of \('pil', 'np', 'pt', 'latent'\), got 'jpg'"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer in .* got 0"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be an integer in .* got 1.5"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "logits"]},
            r"`callback_on_step_end_tensor_inputs` must be a list of .* got \['latents', 'logits'\]",
        ),
    ],
)
def test_call_refuses_before_any_pass(arguments, message):
    pipe, passes = tiny_pipeline(), []
    pipe.transformer.register_forward_hook(lambda *args: passes.append(args))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1, 2], **arguments})
    assert not passes


def test_scheduler_of_another_kind_is_refused():
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="`scheduler` must be a ScaleScheduler, got DDIMScheduler"):
        pipe(1)


@pytest.mark.parametrize("scale_sizes", [[1, 4], [1, 2, 3, 4], [1, 2, 5]])
def test_scheduler_with_scales_that_the_weights_cannot_serve_is_refused(scale_sizes):
    pipe = tiny_pipeline()
    pipe.scheduler = tiny_scheduler(scale_sizes=scale_sizes)
    with pytest.raises(ValueError, match="must be the scales of the transformer, .* got"):
        pipe(1)


def turn_guidance(scale):
    def callback(pipe, index, timestep, callback_kwargs):
        pipe._guidance_scale = scale
        return callback_kwargs

    return callback


def test_a_callback_changes_guidance_from_the_next_scale_on():
    pipe = tiny_pipeline()

    def draw(guidance_scale, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe(1, guidance_scale=guidance_scale, generator=generator, output_type="latent", **arguments).token_ids

    # The linear ramp is 0 at the first scale, so guidance that ends after it never was.
    assert torch.equal(draw(8.0, callback_on_step_end=turn_guidance(1.0)), draw(1.0))
    assert torch.equal(draw(1.0, callback_on_step_end=turn_guidance(8.0)), draw(8.0))
    assert not torch.equal(draw(8.0), draw(1.0))


def test_guidance_cannot_begin_late_with_a_pattern_that_looks_back():
    with pytest.raises(
        ValueError,
        match="`guidance_scale` must be above 1 from the start .*'causal'.* 3.5 at timestep 1",
    ):
        tiny_pipeline("causal")(1, guidance_scale=1.0, callback_on_step_end=turn_guidance(8.0))


@pytest.mark.parametrize("policy", POLICIES)
def test_timesteps_of_ones_own_are_kept(policy):
    pipe = tiny_pipeline(scheduler=make_scheduler(policy, resampling_threshold=1.0))
    pipe.scheduler.set_timesteps(timesteps=[2, 1, 1, 1, 0])
    for _ in range(2):
        assert forward_batches(pipe, class_labels=1, guidance_scale=1.0) == [1] * 5
        assert pipe.num_timesteps == 5
        assert pipe.scheduler.timesteps.tolist() == [2, 1, 1, 1, 0]
    pipe.scheduler.set_timesteps()
    assert len(forward_batches(pipe, class_labels=1, guidance_scale=1.0)) == (3 if policy == "none" else 12)


def test_a_call_changes_nothing_on_the_pipeline_and_its_scheduler():
    pipe = tiny_pipeline(scheduler=make_scheduler("masked"))
    before = [{**vars(each)} for each in (pipe, pipe.scheduler)]
    pipe([1, 2], guidance_scale=4.0, callback_on_step_end=turn_guidance(6.0))
    for was, each in zip(before, (pipe, pipe.scheduler)):
        assert vars(each).keys() == was.keys()
        assert all(vars(each)[name] is value for name, value in was.items())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("with_callback", [False, True])
def test_threads_draw_with_one_pipeline_what_each_draws_alone(pattern, with_callback):
    pipe = lively_pipeline(pattern, scheduler=make_scheduler("masked"))
    seen = {}

    def draw(scale):
        def watch(pipe, index, timestep, tensors):
            seen.setdefault(scale, set()).add(pipe.guidance_scale)
            return tensors

        options = {"callback_on_step_end": watch} if with_callback else {}
        labels, random = [1, int(scale)], generators(0, 1)
        return pipe(labels, guidance_scale=scale, generator=random, output_type="pt", **options)

    scales = (1.0, 2.0, 3.0, 4.0)
    alone = {scale: draw(scale) for scale in scales}
    for _ in range(5):
        with ThreadPoolExecutor(len(scales)) as pool:
            together = dict(zip(scales, pool.map(draw, scales)))
        for scale in scales:
            assert torch.equal(together[scale].token_ids, alone[scale].token_ids)
            assert torch.equal(together[scale].images, alone[scale].images)
    assert seen == ({scale: {scale} for scale in scales} if with_callback else {})


def test_guidance_of_a_call_can_be_read_after_it():
    pipe = tiny_pipeline()
    assert pipe.guidance_scale is None
    pipe(1, guidance_scale=4.0)
    assert pipe.guidance_scale == 4.0
    pipe(1)
    assert pipe.guidance_scale == pipe.default_guidance_scale == 2.5
    assert copy.deepcopy(pipe).guidance_scale is None


def test_the_scheduler_may_say_what_guidance_is_the_default():
    pipe = tiny_pipeline(scheduler=tiny_scheduler(guidance_scale=4.0))
    plain = tiny_pipeline()
    for labels in (1, None):
        drawn = pipe(labels, generator=generators(0)[0]).token_ids
        assert pipe.guidance_scale == (1.0 if labels is None else 4.0)
        assert torch.equal(drawn, plain(labels, guidance_scale=4.0, generator=generators(0)[0]).token_ids)
    assert pipe.scheduler.from_config(pipe.scheduler.config, top_k=3).config.guidance_scale == 4.0
    pipe.transformer.register_to_config(guidance_distilled=True)
    assert pipe.default_guidance_scale == 1.0


def test_arguments_of_numpy_and_tuples_of_generators_are_what_they_say():
    pipe = tiny_pipeline()
    plain = latents_of(pipe, [1, 2], guidance_scale=3, num_images_per_prompt=2, generator=generators(0, 1, 2, 3))[1]
    options = {"guidance_scale": np.float32(3), "num_images_per_prompt": np.int64(2)}
    again = latents_of(pipe, np.array([1, 2]), generator=tuple(generators(0, 1, 2, 3)), **options)[1]
    assert torch.equal(plain, again)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_callback_may_end_the_run(pattern):
    pipe = tiny_pipeline(pattern, scheduler=make_scheduler("masked", resampling_threshold=1.0))
    seen = []

    def stop(pipe, index, timestep, tensors):
        seen.append((index, timestep))
        pipe._interrupt = timestep == 1
        return tensors

    latents, token_ids = latents_of(pipe, [1, 2], callback_on_step_end=stop)
    assert seen == [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1)]
    assert (token_ids[:, :5] >= 0).all()
    assert (token_ids[:, 5:] == -1).all()
    torch.testing.assert_close(latents, pipe.vqvae.latent_states(token_ids[:, :5], [1, 2], (4, 4))[-1])
    # The next call is another.
    assert (latents_of(pipe, [1, 2])[1] >= 0).all()
    assert not pipe.interrupt


class Watch(PipelineCallback):
    tensor_inputs = ["token_ids"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen = [*getattr(self, "seen", []), (step_index, list(callback_kwargs))]
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
        return callback_kwargs


def test_callbacks_of_diffusers_get_what_they_ask_for():
    pipe, watch = tiny_pipeline(), Watch(cutoff_step_ratio=0.5)
    pipe(1, guidance_scale=4.0, callback_on_step_end=watch)
    assert watch.seen == [(0, ["token_ids"]), (1, ["token_ids"]), (2, ["token_ids"])]
    assert pipe.guidance_scale == 0.0
    both = MultiPipelineCallbacks([Watch(cutoff_step_ratio=1.0), Watch(cutoff_step_ratio=1.0)])
    pipe(1, callback_on_step_end=both)
    assert [each.seen for each in both.callbacks] == [watch.seen] * 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return a dictionary .* got None"),
        ([], r"must return a dictionary .* got \[\]"),
        ({"logits": torch.zeros(1)}, r"must return a dictionary with some of .* got \['logits'\]"),
        ({"latents": None}, "must return 'latents' that are finite floats, .* got None"),
        ({"latents": torch.zeros(2, 8, 4, 5)}, r"must return 'latents' .* got torch.float32 of shape \(2, 8, 4, 5\)"),
        ({"latents": torch.full((2, 8, 4, 4), float("nan"))}, "must return 'latents' that are finite floats"),
        ({"latents": torch.zeros(2, 8, 4, 4, dtype=torch.long)}, "must return 'latents' .* got torch.int64"),
        (
            {"token_ids": torch.full((2, 21), 32)},
            r"must return 'token_ids' that are ids in \[0, 31\]",
        ),
        (
            {"token_ids": torch.full((2, 21), 3)},
            r"must return 'token_ids' that are ids in \[0, 31\]",
        ),
        ({"token_ids": torch.full((2, 21), -1)}, "must return 'token_ids' that are ids"),
        ({"token_ids": torch.zeros(2, 21)}, "must return 'token_ids' .* got torch.float32"),
        ({"token_ids": torch.zeros(2, 20, dtype=torch.long)}, r"must return 'token_ids' .* of shape \(2, 20\)"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, message):
    with pytest.raises(ValueError, match=f"`callback_on_step_end` {message}"):
        tiny_pipeline()([1, 2], callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize("guidance_scale", ["4", None, float("nan"), torch.tensor(2.0)])
def test_guidance_that_a_callback_sets_is_checked(guidance_scale):
    with pytest.raises(ValueError, match="`_guidance_scale`, which a callback set, must be a finite number, got"):
        tiny_pipeline()(1, callback_on_step_end=turn_guidance(guidance_scale))


@pytest.mark.parametrize("guidance_scale", [np.float32(3.0), np.int64(3)])
def test_numbers_of_numpy_guide_as_others_do_with_a_callback(guidance_scale):
    expected = latents_of(lively_pipeline(), 1, guidance_scale=3.0, generator=generators(0))
    seen = latents_of(
        lively_pipeline(),
        1,
        guidance_scale=guidance_scale,
        generator=generators(0),
        callback_on_step_end=lambda *_: {},
    )
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_in_training_mode_draws_what_it_draws_else(pattern):
    transformer = tiny_transformer(pattern, drop_path_rate=0.5, class_dropout_prob=0.5)
    pipe = lively_pipeline(transformer=transformer)
    expected = latents_of(pipe, [1, 2, 3], guidance_scale=3.0, generator=generators(0, 1, 2))
    transformer.train()
    pipe.vqvae.train()
    for _ in range(3):
        drawn = latents_of(pipe, [1, 2, 3], guidance_scale=3.0, generator=generators(0, 1, 2))
        assert torch.equal(drawn[1], expected[1])
    assert transformer.training
    assert pipe.vqvae.training
