"""Whole draws without the host: nothing is read from the device or sent to it, and a seed means the same picture."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_dispatch import attention_backend
from no_host import RefuseTransfers
from peft import LoraConfig
from stand_ins import FrozenGraph, TracedGraph
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae
from tqdm.auto import tqdm

from srdd import ScaleScheduler, SRDDInpaintPipeline, SRDDPipeline
from srdd.acceleration import CudaGraphs
from srdd.models import MaskedScaleAttnProcessor
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import Guidance
from srdd.pipelines.recorded_sampling import empty_noise
from srdd.pipelines.scale_sampling import SamplingInputs, sample_scales


PATTERNS = ("causal", "markov", "banded")
FIXED = ({}, {"resampling_policy": "simple", "num_resampling_passes": 2}, {"top_k": 7, "top_p": 0.9})


def imagined_draw(pattern="markov", dtype=torch.float32, noise_before=True, **settings):
    """A run with its decoder on a device without numbers, after a first one."""
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(**settings)).to("meta", dtype)
    vqvae, transformer, scheduler = pipe.components.values()
    labels, device = torch.zeros(3, dtype=torch.long, device="meta"), torch.device("meta")
    conditions = Conditions(3, {"class_labels": labels}, {"class_labels": labels})
    noise = empty_noise(scheduler, 3, vqvae.config.codebook_size, device) if noise_before else {}
    latents = torch.zeros(3, 8, 4, 4, device=device)
    inputs = SamplingInputs(conditions, Guidance.of(scheduler, 3.0, device), latents, noise)

    @torch.no_grad()
    def draw():
        output = sample_scales(vqvae, transformer, scheduler, inputs, tqdm(disable=True))
        return pipe.decode_pixels(output.latents), output

    draw()
    return draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", FIXED, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_is_read_from_the_device_or_sent_to_it(pattern, settings, dtype):
    draw = imagined_draw(pattern, dtype, **settings)
    with RefuseTransfers():
        pixels, output = draw()
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels.device.type == output.token_ids.device.type == "meta"


def test_nor_without_a_graph():
    draw = imagined_draw(noise_before=False)
    with RefuseTransfers():
        draw()


def test_what_reads_or_sends_is_found():
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        imagined_draw(resampling_policy="masked")
    with pytest.raises(AssertionError, match="tensor sends numbers"), RefuseTransfers():
        torch.tensor([1.0], device="meta")
    with pytest.raises(AssertionError, match="works on"), RefuseTransfers():
        torch.zeros(2, device="cpu").to("meta")


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def recording_pipeline(record=FrozenGraph, pattern="markov", **settings) -> SRDDPipeline:
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(**settings))
    pipe._cuda_graphs = CudaGraphs(record, "cpu")
    return pipe


def replays(pipe: SRDDPipeline) -> list[int]:
    return [recording.graph.num_replays for recording in pipe._cuda_graphs._recordings.values()]


def assert_same_draw(pipe: SRDDPipeline, *args, **kwargs) -> None:
    """A draw gives what it gives without graphs, for which the generators are copied."""
    other = SRDDPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    other.disable_cuda_graphs()
    generator = kwargs.pop("generator")
    kept = [each.get_state() for each in (generator if isinstance(generator, list) else [generator])]
    drawn = pipe(*args, generator=generator, output_type="pt", **kwargs)
    for each, state in zip(generator if isinstance(generator, list) else [generator], kept):
        each.set_state(state)
    expected = other(*args, generator=generator, output_type="pt", **kwargs)
    assert torch.equal(drawn.token_ids, expected.token_ids)
    assert torch.equal(drawn.images, expected.images)


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("markov", {"top_k": 7, "top_p": 0.9}),
        ("causal", {"guidance_schedule": "constant"}),
        ("banded", {"resampling_policy": "simple", "num_resampling_passes": [0, 1, 1]}),
    ],
)
def test_labels_guidance_latents_and_generators_are_inputs_of_a_graph(pattern, settings):
    pipe = recording_pipeline(TracedGraph, pattern, **settings)
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(9))
    for count, (labels, options) in enumerate(
        [
            ([1, 2], {"generator": seeds(0, 1)}),
            ([1, 2], {"generator": seeds(0, 1)}),
            ([4, 0], {"generator": seeds(3, 2)}),
            (["apple", 3], {"generator": seeds(3)[0], "guidance_scale": 4.5}),
            ([2, 2], {"generator": seeds(8, 8), "guidance_scale": 1.7, "latents": latents}),
        ]
    ):
        assert_same_draw(pipe, labels, **options)
        assert replays(pipe) == ([count] if count else [])


def test_what_needs_another_graph_gets_one():
    pipe = recording_pipeline()
    changes = [
        {},
        {"guidance_scale": 1.0},
        {"class_labels": [1, 2, 3], "generator": seeds(0, 1, 2)},
        {"output_type": "latent"},
    ]
    for options in changes:
        options = {"class_labels": [1, 2], "generator": seeds(0, 1), "output_type": "pt", **options}
        states = [generator.get_state() for generator in options["generator"]]
        results = []
        for _ in range(2):
            for generator, state in zip(options["generator"], states):
                generator.set_state(state)
            results.append(pipe(**options))
        assert torch.equal(results[0].images, results[1].images)
    assert replays(pipe) == [1, 1, 1, 1]


SCHEDULES = {
    "fewer scales": {"scales": [1, 4]},
    "another temperature": {"temperature": 0.5},
    "the most probable tokens": {"temperature": 0.0},
    "a temperature for each scale": {"temperature": [1.0, 0.0, 0.5]},
    "another top-k": {"top_k": 3},
    "another ramp": {"guidance_schedule": "constant"},
    "further passes": {"resampling_policy": "simple", "num_resampling_passes": 1},
}


@pytest.mark.parametrize("change", SCHEDULES)
def test_another_schedule_never_replays(change):
    pipe = recording_pipeline()
    original = pipe.scheduler
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    pipe.scheduler = ScaleScheduler.from_config(original.config, **SCHEDULES[change])
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    pipe.scheduler = ScaleScheduler.from_config(original.config)
    assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    assert replays(pipe) == [2, 3]  # a schedule is known by what it says


def test_other_timesteps_never_replay():
    pipe = recording_pipeline()
    for timesteps in ([2, 1, 0], [2, 1, 1, 0]):
        pipe.scheduler.set_timesteps(timesteps=timesteps)
        for _ in range(2):
            assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    assert replays(pipe) == [1, 1]


def set_backend(pipe):
    with attention_backend():
        pipe.transformer.set_attention_backend("_native_math")


def add_adapter(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "ff.net.2"]))


def load_weights(pipe):
    pipe.transformer.load_state_dict(tiny_transformer(seed=7).state_dict(), assign=True)


CHANGES = {
    "dtype": lambda pipe: pipe.to(torch.bfloat16),
    "a component's dtype": lambda pipe: pipe.transformer.to(torch.bfloat16),
    "another transformer": lambda pipe: setattr(pipe, "transformer", tiny_transformer(seed=7)),
    "another tokenizer": lambda pipe: setattr(pipe, "vqvae", tiny_vqvae(seed=7)),
    "new weights": load_weights,
    "LoRA": add_adapter,
    "processor": lambda pipe: pipe.transformer.set_attn_processor(MaskedScaleAttnProcessor()),
    "attention backend": set_backend,
    "pattern": lambda pipe: pipe.transformer.register_to_config(attention_pattern="causal"),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "compiled blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
    "compiled decoder": lambda pipe: pipe.vqvae.decoder.compile(backend="eager"),
    "diffusers' decoding": lambda pipe: pipe.vqvae.disable_fast_decoding(),
    "slices": lambda pipe: pipe.vqvae.enable_slicing(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_draw_makes_its_graph_useless(change):
    pipe = recording_pipeline()
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    CHANGES[change](pipe)
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    assert len(pipe._cuda_graphs) == 1  # and it gets a new one


def test_adapters_that_are_weighted_and_merged_make_graphs_useless():
    pipe = recording_pipeline()
    add_adapter(pipe)
    transformer, pictures = pipe.transformer, []
    for change in (
        lambda: None,
        lambda: transformer.set_adapters(["default"], [0.3]),
        lambda: transformer.disable_lora(),
        lambda: transformer.enable_lora(),
        lambda: transformer.fuse_lora(),
        lambda: transformer.unfuse_lora(),
    ):
        change()
        for _ in range(2):
            assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
        pictures.append(pipe([1, 2], generator=seeds(0, 1), output_type="pt").images)
    assert not torch.equal(pictures[0], pictures[1])


WATCHED = {
    "offloading": lambda pipe: add_hook_to_module(pipe.transformer, ModelHook()),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "a hook": lambda pipe: pipe.transformer.blocks[0].register_forward_hook(lambda *_: None),
    "graphs of torch.compile": lambda pipe: pipe.transformer.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", WATCHED)
def test_models_that_are_moved_or_watched_draw_without_graphs(change):
    pipe = recording_pipeline()
    for _ in range(2):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    WATCHED[change](pipe)
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    assert len(pipe._cuda_graphs) == 0


def test_draws_that_look_at_the_device_go_without_graphs():
    pipe = recording_pipeline()
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    for _ in range(3):
        pipe(1, callback_on_step_end=callback)
    for policy in ("masked", "remasked"):
        pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, resampling_policy=policy)
        for _ in range(3):
            assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    inpaint = SRDDInpaintPipeline.from_pipe(pipe)
    for _ in range(3):
        inpaint(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8), 1)
    assert len(seen) == 9
    assert len(pipe._cuda_graphs) == len(inpaint._cuda_graphs) == 0


def test_policies_that_make_no_further_pass_have_fixed_shapes():
    pipe = recording_pipeline(resampling_policy="masked", num_resampling_passes=0)
    for _ in range(3):
        assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
    assert replays(pipe) == [2]


def test_graphs_can_be_switched_off_and_on():
    pipe = recording_pipeline()
    for switch, expected in ((None, [1]), (pipe.disable_cuda_graphs, []), (pipe.enable_cuda_graphs, [1])):
        if switch is not None:
            switch()
        for _ in range(2):
            assert_same_draw(pipe, [1, 2], generator=seeds(0, 1))
        assert replays(pipe) == expected


def test_pipelines_of_the_same_components_and_copies_have_graphs_of_their_own():
    pipe = recording_pipeline()
    for _ in range(2):
        pipe(1, generator=seeds(0))
    for other in (SRDDPipeline.from_pipe(pipe), copy.deepcopy(pipe)):
        assert len(other._cuda_graphs) == 0
        assert other._cuda_graphs.is_enabled
    assert replays(pipe) == [1]
    pipe.disable_cuda_graphs()
    for other in (SRDDPipeline.from_pipe(pipe), copy.deepcopy(pipe)):
        assert not other._cuda_graphs.is_enabled


@torch.no_grad()
def test_logits_that_are_not_finite_raise_after_a_replay():
    pipe = recording_pipeline(TracedGraph)
    for _ in range(2):
        pipe(1)
    pipe.transformer.proj_out.bias[3] = float("nan")
    with pytest.raises(ValueError, match="`transformer` must give finite logits .* at timestep 2"):
        pipe(1)
    assert replays(pipe) == [2]


def test_on_a_cpu_nothing_is_recorded():
    pipe = tiny_pipeline()
    for _ in range(3):
        pipe(1)
    assert len(pipe._cuda_graphs) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", FIXED, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_on_a_gpu_pictures_are_the_same(pattern, settings, dtype):
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(**settings)).to("cuda", dtype)
    latents = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.float32)
    for device in ("cpu", "cuda"):
        for labels, options in (
            ([1, 2], {}),
            ([1, 2], {}),
            ([4, 0], {"guidance_scale": 4.5}),
            ([0, 1], {"latents": latents}),
            ([0, 1], {"guidance_scale": 1.0}),
            ([2, 1], {"guidance_scale": 1.0}),
        ):
            generator = [torch.Generator(device).manual_seed(seed) for seed in (0, 1)]
            assert_same_draw(pipe, labels, generator=generator, **options)
            assert_same_draw(pipe, labels, generator=generator[0], **options)
    assert len(pipe._cuda_graphs) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("change", [*CHANGES, *WATCHED])
def test_on_a_gpu_no_graph_is_out_of_date(change):
    pipe = tiny_pipeline().to("cuda")
    for changed in (lambda pipe: None, {**CHANGES, **WATCHED}[change]):
        changed(pipe)
        pipe.vqvae.to("cuda"), pipe.transformer.to("cuda")
        for seed in range(4):
            assert_same_draw(pipe, [1, 2], generator=torch.Generator("cuda").manual_seed(seed))
