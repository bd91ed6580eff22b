"""Pipelines of the transformer with a history, against packed forwards over all scales."""

import json

import pytest
import torch
from no_host import RefuseTransfers
from stand_ins import TracedGraph
from tiny_models import tiny_history_transformer, tiny_pipeline, tiny_scheduler
from tqdm.auto import tqdm

from srdd import SRDDInpaintPipeline, SRDDPipeline, SRDDSuperResolutionPipeline, SRDDTextPipeline
from srdd.acceleration import CudaGraphs
from srdd.evaluation.likelihood import log_likelihood
from srdd.models.guidance import guide
from srdd.pipelines.guided_transformer import Guidance, GuidedTransformer
from srdd.pipelines.recorded_sampling import empty_noise
from srdd.pipelines.scale_sampling import SamplingInputs, sample_scales


PATTERNS = ("causal", "markov", "banded")
POLICIES = ("none", "simple", "masked", "remasked")
SCHEDULES = {
    "all scales": {},
    "fewer scales": {"scales": [1, 4]},
    "guided at the end": {"guidance_schedule": "constant", "guidance_start": 0.5},
    "guided at the start": {"guidance_schedule": "constant", "guidance_stop": 0.6},
    "further passes": {"resampling_policy": "simple", "num_resampling_passes": 2},
}
NULL = 5
# Runs that start from no picture draw few tokens but one.
START = torch.randn(10, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 3


def history_pipeline(pattern="markov", **scheduler) -> SRDDPipeline:
    settings = {"resampling_threshold": 0.1, "num_resampling_passes": 2, **scheduler}
    # Two scales of three have inputs: with a window of two the history reaches to the first of them.
    transformer = tiny_history_transformer(pattern, history_window=2)
    return tiny_pipeline(transformer=transformer, scheduler=tiny_scheduler(**settings))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def plain_draw(pipe: SRDDPipeline, labels: list[int], guidance_scale: float) -> torch.Tensor:
    """The most probable tokens, pass after pass, each from a forward over all scales up to its own."""
    model, scheduler, labels = pipe.transformer, pipe.scheduler, torch.tensor(labels)
    latents, drawn, first_inputs, timesteps = START[: len(labels)], [], [], []
    for scale, passes in scheduler.passes:
        before, timesteps = latents, [*timesteps, scale.timestep]
        for index in passes:
            inputs = scheduler.scale_model_input(latents, scale.timestep)
            packed = torch.cat([*first_inputs, inputs], dim=1)
            cond = model(packed, timesteps, labels).sample[:, scale.tokens]
            null = torch.full_like(labels, NULL)
            uncond = model(packed, timesteps, null, history_class_labels=labels).sample[:, scale.tokens]
            logits = guide(cond, uncond, scheduler.guidance_weight(scale.timestep, guidance_scale))
            token_ids = logits.argmax(dim=-1)
            if index == passes.start:
                first = inputs
            latents = before + pipe.vqvae.residual_map(token_ids.unflatten(1, scale.size))
        first_inputs.append(first)
        drawn.append(token_ids)
    return torch.cat(drawn, dim=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_both_halves_are_told_the_images_class_in_their_history(schedule, guidance_scale):
    pipe, labels = history_pipeline(**SCHEDULES[schedule], temperature=0.0), list(range(NULL)) * 2
    drawn = pipe(labels, guidance_scale=guidance_scale, latents=START, output_type="latent").token_ids
    assert torch.equal(drawn, plain_draw(pipe, labels, guidance_scale))
    assert len(drawn.unique()) > 8


@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_patterns_that_look_back_have_a_history_as_well(pattern):
    pipe, labels = history_pipeline(pattern, temperature=0.0), list(range(NULL)) * 2
    drawn = pipe(labels, guidance_scale=3.0, latents=START, output_type="latent").token_ids
    assert torch.equal(drawn, plain_draw(pipe, labels, 3.0))


@torch.no_grad()
def test_what_halves_are_told():
    pipe = history_pipeline()
    conditions = pipe.encode_class_labels(["apple", 3])
    told = {name: tensor.tolist() for name, tensor in conditions.conditional.items()}
    assert told == {"class_labels": [0, 3], "history_class_labels": [0, 3]}
    told = {name: tensor.tolist() for name, tensor in conditions.unconditional.items()}
    assert told == {"class_labels": [NULL, NULL], "history_class_labels": [0, 3]}
    assert pipe.encode_class_labels(None).unconditional is None
    # Without a class all is told the null class.
    pipe.scheduler = tiny_scheduler(temperature=0.0)
    drawn = pipe(None, num_images_per_prompt=2, latents=START[:2], output_type="latent").token_ids
    assert torch.equal(drawn, plain_draw(pipe, [NULL, NULL], 1.0))


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layers"), [("markov", {2}), ("causal", {0, 1, 2})])
def test_a_run_keeps_what_later_scales_see(pattern, layers):
    pipe = history_pipeline(pattern)
    guidance, num_tokens = Guidance.of(pipe.scheduler, 3.0), pipe.scheduler.num_tokens
    guided = GuidedTransformer(pipe.transformer, pipe.encode_class_labels([1, 2]), guidance, num_tokens)
    for scale in pipe.scheduler.visits:
        guided(torch.randn(2, scale.num_tokens, 8), scale)
    assert guided.kv_cache.buffers.keys() == layers
    # Of both halves, as guided scales look back at them.
    assert {len(states) for pair in guided.kv_cache.buffers.values() for states in pair} == {4}


def test_guidance_cannot_begin_after_the_run_has():
    pipe = history_pipeline()

    def raise_guidance(pipe, index, timestep, kwargs):
        pipe._guidance_scale = 3.0
        return kwargs

    with pytest.raises(ValueError, match="`guidance_scale` must be above 1 from the start .*'markov'"):
        pipe([1, 2], guidance_scale=1.0, callback_on_step_end=raise_guidance)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_equals_single_runs(pattern, policy):
    pipe = history_pipeline(pattern, resampling_policy=policy)
    labels, seeds = [0, 3, "banana", 3], (10, 11, 12, 13)
    together = pipe(labels, generator=generators(*seeds), output_type="latent")
    for index, (label, seed) in enumerate(zip(labels, seeds)):
        alone = pipe(label, generator=generators(seed), output_type="latent")
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        torch.testing.assert_close(alone.images[0], together.images[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_further_passes_compute_what_they_draw_as_the_whole_scale(pattern):
    # The threshold 1 redraws every token: all of a scale, as "simple" does, but by their places.
    draws = [
        history_pipeline(pattern, resampling_policy=policy, resampling_threshold=1.0)
        for policy in ("masked", "simple")
    ]
    ids = [pipe([1, 2], generator=generators(0, 1), output_type="latent").token_ids for pipe in draws]
    assert torch.equal(*ids)


@pytest.mark.parametrize("policy", POLICIES)
def test_known_pixels_stay(policy):
    pipe = SRDDInpaintPipeline.from_pipe(history_pipeline(resampling_policy=policy))
    image = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:7, 3:] = 1
    output = pipe(image, mask, 1, generator=generators(0)[0], output_type="pt")
    shown = mask.expand_as(image) == 0
    torch.testing.assert_close(output.images[shown], image[shown], atol=1e-6, rtol=0)
    finer = SRDDSuperResolutionPipeline.from_pipe(pipe)
    enlarged = finer(image[..., ::2, ::2], scale_factor=2, class_labels=1, output_type="pt").images
    assert enlarged.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("pattern", "policy"), [("markov", "none"), ("markov", "simple"), ("causal", "none")])
def test_a_draw_does_without_the_host(pattern, policy):
    pipe, device = history_pipeline(pattern, resampling_policy=policy).to("meta"), torch.device("meta")
    components = pipe.vqvae, pipe.transformer, pipe.scheduler
    conditions = tiny_pipeline(transformer=tiny_history_transformer()).encode_class_labels([1, 2, 3])
    for half in (conditions.conditional, conditions.unconditional):
        half.update({name: tensor.to(device) for name, tensor in half.items()})
    noise = empty_noise(pipe.scheduler, 3, pipe.vqvae.config.codebook_size, device)
    guidance = Guidance.of(pipe.scheduler, 3.0, device)
    inputs = SamplingInputs(conditions, guidance, torch.zeros(3, 8, 4, 4, device=device), noise)
    with torch.no_grad():
        sample_scales(*components, inputs, tqdm(disable=True))
        with RefuseTransfers():
            output = sample_scales(*components, inputs, tqdm(disable=True))
    assert output.token_ids.shape == (3, 21)


def test_a_recorded_draw_takes_other_classes():
    pipe, other = history_pipeline(), history_pipeline()
    pipe._cuda_graphs = CudaGraphs(TracedGraph, "cpu")
    for labels, seeds, guidance_scale in (([1, 2], (0, 1), 3.0), ([1, 2], (0, 1), 3.0), ([4, 0], (5, 7), 2.0)):
        drawn, expected = (
            each(labels, guidance_scale, generator=generators(*seeds), output_type="pt") for each in (pipe, other)
        )
        assert torch.equal(drawn.token_ids, expected.token_ids)
    assert [recording.graph.num_replays for recording in pipe._cuda_graphs._recordings.values()] == [2]


def test_the_likelihood_of_pyramids_is_that_of_their_guided_logits():
    pipe = history_pipeline()
    token_ids = pipe([1, 2], generator=generators(0, 1), output_type="latent").token_ids
    inputs, labels = pipe.vqvae.teacher_forcing_inputs(token_ids), torch.tensor([1, 2])
    with torch.no_grad():
        found = log_likelihood(pipe, token_ids=token_ids, class_labels=[1, 2], guidance_scale=3.0)
        cond = pipe.transformer(inputs, class_labels=labels).sample
        uncond = pipe.transformer(inputs, history_class_labels=labels).sample
    logits = guide(cond, uncond, pipe.scheduler.guidance_weights(3.0)[:, None])
    expected = logits.log_softmax(dim=-1).gather(-1, token_ids[..., None])[..., 0]
    torch.testing.assert_close(found.token_log_likelihoods, expected, atol=1e-5, rtol=0)


def test_a_saved_pipeline_draws_the_same(tmp_path):
    pipe = history_pipeline()
    drawn = pipe([1, 2], generator=generators(0, 1), output_type="pt")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["srdd", "ScaleHistoryTransformer2DModel"]
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded([1, 2], generator=generators(0, 1), output_type="pt").images, drawn.images)


def test_a_pipeline_of_texts_refuses_it():
    pipe = history_pipeline()
    texts = SRDDTextPipeline(pipe.vqvae, pipe.transformer, pipe.scheduler)
    with pytest.raises(ValueError, match="`transformer` must draw from texts, got a ScaleHistoryTransformer2DModel"):
        texts(prompt_embeds=torch.zeros(1, 2, 3), pooled_prompt_embeds=torch.zeros(1, 3))
