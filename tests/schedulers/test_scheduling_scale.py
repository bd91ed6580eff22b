import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from tiny_models import CODEBOOK_SIZE, SCALE_SIZES, tiny_scheduler

from srdd import ScaleScheduler
from srdd.scales import Scale
from srdd.schedulers.token_sampling import exponential_noise


PAPER_SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]

NUM_TOKENS = 1 + 4 + 16

# Timestep -> where its scale lies in the pyramid over SCALE_SIZES.
TOKENS = {2: slice(0, 1), 1: slice(1, 5), 0: slice(5, 21)}


def random_logits(num_tokens: int, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch_size, num_tokens, CODEBOOK_SIZE, generator=generator)


def one_logit(value: float) -> torch.Tensor:
    """Logits of the second scale with this value among them."""
    logits = random_logits(4)
    logits[1, 2, 3] = value
    return logits


def random_token_ids(batch_size: int = 2, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(CODEBOOK_SIZE, (batch_size, num_tokens), generator=generator)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [2, 1, 0]),
        ({"resampling_policy": "simple", "num_resampling_passes": 2}, [2, 2, 2, 1, 1, 1, 0, 0, 0]),
        ({"resampling_policy": "masked", "num_resampling_passes": 1}, [2, 2, 1, 1, 0, 0]),
        ({"resampling_policy": "masked", "num_resampling_passes": 0}, [2, 1, 0]),
        ({"resampling_policy": "masked", "num_resampling_passes": [0, 3, 1]}, [2, 1, 1, 1, 1, 0, 0]),
        ({"resampling_policy": "remasked", "num_resampling_passes": [1, 0, 1]}, [2, 2, 1, 0, 0]),
        ({"resampling_policy": "none", "num_resampling_passes": 5}, [2, 1, 0]),
        ({"scales": [1, 4]}, [2, 0]),
        (
            {"scales": [1, 4], "resampling_policy": "simple", "num_resampling_passes": [2, 9, 1]},
            [2, 2, 2, 0, 0],
        ),
    ],
)
def test_a_further_pass_repeats_its_timestep(overrides, expected):
    scheduler = tiny_scheduler(**overrides)
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.timesteps.dtype == torch.long
    assert scheduler.num_inference_steps == len(set(expected))
    scheduler.set_timesteps(len(set(expected)))
    assert scheduler.timesteps.tolist() == expected


def test_timesteps_may_be_given():
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(timesteps=[2, 2, 1, 0, 0, 0])
    assert scheduler.timesteps.tolist() == [2, 2, 1, 0, 0, 0]
    assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize(
    "timesteps", [[], [2, 1], [0, 1, 2], [2, 1, 2, 0], [3, 2, 1, 0], [2, 1, 0, 1], [2.0, 1.0, 0.0], "210", 3, [None]]
)
def test_timesteps_that_miss_or_reorder_a_scale_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"`timesteps` must be \[2, 1, 0\], each once or repeated, got"):
        tiny_scheduler().set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("steps", [0, 2, 4, 50])
def test_another_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"`num_inference_steps` must be 3, .*\[1, 2, 4\], got {steps}"):
        tiny_scheduler().set_timesteps(steps)


def test_timesteps_of_the_distilled_scales():
    scheduler = ScaleScheduler(scales=[1, 3, 5, 8, 13, 16])
    assert scheduler.timesteps.tolist() == [9, 7, 5, 3, 1, 0]
    assert scheduler.num_tokens == 1 + 9 + 25 + 64 + 169 + 256
    assert scheduler.num_train_timesteps == len(scheduler) == 10
    assert scheduler.visit(5) is scheduler.visits[2]
    assert scheduler.visit(torch.tensor(5)) == Scale(5, (5, 5), slice(10, 35))
    assert [scale.num_tokens for scale in scheduler.visits] == [1, 9, 25, 64, 169, 256]
    with pytest.raises(ValueError, match=r"`timestep` must be one of \[9, 7, 5, 3, 1, 0\], got 8"):
        scheduler.visit(8)


def test_scales_of_equal_area_are_told_apart():
    scheduler = ScaleScheduler(scale_sizes=[[1, 1], [1, 4], [2, 4], [4, 4]], scales=[[1, 1], [2, 4], [4, 4]])
    assert [(scale.timestep, scale.size) for scale in scheduler.visits] == [(3, (1, 1)), (1, (2, 4)), (0, (4, 4))]


@pytest.mark.parametrize("timestep", [2, 1, 0])
def test_model_input_is_the_area_mean_of_the_state(timestep):
    scheduler, state = tiny_scheduler(), torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    height, width = scheduler.visit(timestep).size
    cells = state.view(2, 5, height, 4 // height, width, 4 // width).mean(dim=(3, 5))
    expected = torch.stack([cells[:, :, i, j] for i in range(height) for j in range(width)], dim=1)
    torch.testing.assert_close(scheduler.scale_model_input(state, timestep), expected, atol=1e-6, rtol=0)


def test_model_input_of_scales_that_do_not_divide_the_grid():
    scheduler, state = ScaleScheduler([1, 3, 5]), torch.randn(1, 2, 5, 5)
    expected = F.adaptive_avg_pool2d(state, (3, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(scheduler.scale_model_input(state, 1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.5, 2.5, 5.0])
def test_guidance_is_vars_cfg_plus_one_and_its_ramp(guidance_scale):
    scheduler, cfg = ScaleScheduler(PAPER_SCALES), guidance_scale - 1
    cond, uncond = torch.randn(2, 4, CODEBOOK_SIZE).unbind()
    for k in range(10):
        weight = scheduler.guidance_weight(9 - k, guidance_scale)
        t = cfg * k / 9
        assert weight == pytest.approx(t, abs=1e-6)
        ours = uncond + (1 + weight) * (cond - uncond)
        torch.testing.assert_close(ours, (1 + t) * cond - t * uncond, atol=1e-5, rtol=0)
    assert scheduler.guidance_weight(9, guidance_scale) == 0
    assert scheduler.guidance_weight(0, guidance_scale) == cfg


def test_constant_guidance_is_the_same_at_every_scale():
    scheduler = tiny_scheduler(guidance_schedule="constant")
    assert [scheduler.guidance_weight(t, 3.5) for t in (2, 1, 0)] == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("guidance_scale", [1.0, 0.3, 0.0, -2.0])
def test_guidance_of_one_and_below_is_off(schedule, guidance_scale):
    scheduler = tiny_scheduler(guidance_schedule=schedule)
    assert [scheduler.guidance_weight(t, guidance_scale) for t in (2, 1, 0)] == [0, 0, 0]


def test_the_ramp_belongs_to_the_scale_not_to_the_step():
    whole, part = ScaleScheduler(PAPER_SCALES), ScaleScheduler(PAPER_SCALES, scales=[1, 5, 8, 13, 16])
    for scale in part.visits:
        assert part.guidance_weight(scale.timestep, 4.0) == whole.guidance_weight(scale.timestep, 4.0)


@pytest.mark.parametrize(
    ("start", "stop", "guided"), [(0.0, 1.0, range(10)), (0.0, 0.8, range(8)), (0.3, 0.7, range(3, 7)), (0.5, 0.5, [])]
)
def test_guidance_may_start_late_and_stop_early(start, stop, guided):
    scheduler = ScaleScheduler(
        PAPER_SCALES, guidance_schedule="constant", guidance_start=start, guidance_stop=stop, scales=[1, 5, 13, 16]
    )
    whole = ScaleScheduler.from_config(scheduler.config, scales=None)
    assert [k for k in range(10) if whole.guidance_weight(9 - k, 3.0) == 2.0] == list(guided)
    expected = [2.0 if k in guided else 0.0 for k, size in enumerate((1, 2, 3, 4, 5)) for _ in range(size * size)]
    assert whole.guidance_weights(3.0)[:55].tolist() == expected
    # What is left out keeps its place.
    assert [scheduler.guidance_weight(t, 3.0) > 0 for t in (9, 5, 1, 0)] == [k in guided for k in (0, 4, 8, 9)]


def test_a_single_scale_is_guided_in_full():
    assert ScaleScheduler([4]).guidance_weight(0, 3.0) == 2.0


@pytest.mark.parametrize("timestep", [2, 1, 0])
def test_step_undoes_the_last_step_of_the_forward_process(timestep):
    scheduler, whole = tiny_scheduler(temperature=0.0), random_token_ids()
    noisy = scheduler.add_noise(whole, timesteps=timestep)
    logits = 9.0 * F.one_hot(whole[:, TOKENS[timestep]], CODEBOOK_SIZE)
    drawn = scheduler.step(logits, timestep, noisy).prev_sample
    expected = scheduler.add_noise(whole, timesteps=timestep - 1) if timestep > 0 else whole
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("timestep", [2, 1, 0])
def test_step_fills_exactly_its_scale(timestep):
    scheduler, sample = tiny_scheduler(), random_token_ids() + 1000
    before = sample.clone()
    tokens = TOKENS[timestep]
    logits = random_logits(tokens.stop - tokens.start)
    output = scheduler.step(logits, timestep, sample, generator=torch.Generator().manual_seed(0))
    changed = output.prev_sample != sample
    assert changed[:, tokens].all()
    assert changed.sum() == changed[:, tokens].numel()
    assert torch.equal(sample, before)
    assert output.prev_sample[:, tokens].max() < CODEBOOK_SIZE


def test_forward_process_forgets_from_the_finest_scale_on():
    scheduler, whole = tiny_scheduler(), random_token_ids()
    for timestep, tokens in TOKENS.items():
        noisy = scheduler.add_noise(whole, timesteps=timestep)
        assert torch.equal(noisy[:, : tokens.start], whole[:, : tokens.start])
        assert (noisy[:, tokens.start :] == -1).all()


def test_forward_process_is_idempotent_and_monotone():
    scheduler, whole = tiny_scheduler(), random_token_ids()
    for first in (0, 1, 2):
        noisy = scheduler.add_noise(whole, timesteps=first)
        assert torch.equal(scheduler.add_noise(noisy, timesteps=first), noisy)
        for second in (0, 1, 2):
            expected = scheduler.add_noise(whole, timesteps=max(first, second))
            assert torch.equal(scheduler.add_noise(noisy, timesteps=second), expected)


def test_forward_process_takes_one_timestep_for_each_image():
    scheduler, whole = tiny_scheduler(), random_token_ids(batch_size=3)
    noisy = scheduler.add_noise(whole, torch.randn(3), torch.tensor([1, 0, 2]))
    for image, timestep in enumerate((1, 0, 2)):
        assert torch.equal(noisy[image], scheduler.add_noise(whole, timesteps=timestep)[image])


def test_forward_process_over_a_part_of_the_scales():
    scheduler, whole = tiny_scheduler(scales=[1, 4]), random_token_ids(num_tokens=17)
    noisy = scheduler.add_noise(whole, timesteps=0)
    assert torch.equal(noisy[:, :1], whole[:, :1])
    assert (noisy[:, 1:] == -1).all()
    with pytest.raises(ValueError, match=r"`timestep` must be one of \[2, 0\], got 1"):
        scheduler.add_noise(whole, timesteps=1)


def test_token_probabilities_are_those_before_truncation():
    scheduler = tiny_scheduler(temperature=0.5, top_k=3, top_p=0.7)
    logits = random_logits(4)
    output = scheduler.step(logits, 1, random_token_ids(), generator=torch.Generator().manual_seed(0))
    chosen = output.prev_sample[:, TOKENS[1]]
    expected = logits.softmax(dim=-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(output.token_probabilities, expected, atol=1e-6, rtol=0)


def test_sampling_settings_reach_the_draw():
    logits, sample = random_logits(16), random_token_ids()
    best = logits.argmax(dim=-1)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        drawn = tiny_scheduler(**settings).step(logits, 0, sample).prev_sample
        assert torch.equal(drawn[:, TOKENS[0]], best)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("scales", [None, [1, 4]])
def test_a_list_of_temperatures_is_one_for_each_scale_of_the_model(scales, settings):
    temperatures = [0.5, 0.0, 2.0]
    scheduler = tiny_scheduler(temperature=temperatures, scales=scales, **settings)
    sample = random_token_ids(num_tokens=scheduler.num_tokens)
    for scale in scheduler.visits:
        own = tiny_scheduler(temperature=temperatures[-1 - scale.timestep], scales=scales, **settings)
        logits = random_logits(scale.num_tokens)
        drawn = [
            each.step(logits, scale.timestep, sample, generator=torch.Generator().manual_seed(0)).prev_sample
            for each in (scheduler, own)
        ]
        assert torch.equal(*drawn)
    assert scheduler.config.temperature == temperatures
    assert ScaleScheduler.from_config(scheduler.config).temperatures == scheduler.temperatures


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2, 1.0])
def test_masked_policy_wants_the_tokens_below_the_threshold(threshold):
    scheduler = tiny_scheduler(resampling_policy="masked", resampling_threshold=threshold)
    output = scheduler.step(random_logits(16), 0, random_token_ids(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.resample_mask, output.token_probabilities < threshold)


@pytest.mark.parametrize("policy", ["masked", "remasked"])
def test_masked_resampling_draws_only_wanted_tokens_of_its_scale(policy):
    scheduler = tiny_scheduler(resampling_policy=policy, resampling_threshold=0.05, num_resampling_passes=4)
    assert scheduler.keeps_accepted_tokens == (policy == "masked")
    sample, mask = random_token_ids(batch_size=4), None
    random = generators(0, 1, 2, 3)
    masks = []
    for number in range(4):
        logits = random_logits(16, batch_size=4, seed=number)
        output = scheduler.step(logits, 0, sample, resample_mask=mask, generator=random)
        changed = output.prev_sample != sample
        assert not changed[:, : TOKENS[0].start].any()
        if mask is not None:
            assert not changed[:, TOKENS[0]][~mask].any()
            assert changed[:, TOKENS[0]][mask].any()
        low = output.token_probabilities < 0.05
        may_be = mask if mask is not None and policy == "masked" else torch.ones_like(low)
        assert torch.equal(output.resample_mask, low & may_be)
        sample, mask = output.prev_sample, output.resample_mask
        masks.append(mask)
    assert all(mask.any() for mask in masks)
    assert not masks[0].all()


def test_simple_resampling_draws_all_tokens_of_its_scale_again():
    scheduler = tiny_scheduler(resampling_policy="simple", num_resampling_passes=1)
    logits, random = random_logits(16), torch.Generator().manual_seed(0)
    first = scheduler.step(logits, 0, random_token_ids(), generator=random)
    assert first.resample_mask.all()
    second = scheduler.step(logits, 0, first.prev_sample, resample_mask=first.resample_mask, generator=random)
    changed = first.prev_sample != second.prev_sample
    assert changed[:, TOKENS[0]].float().mean() > 0.3
    assert not changed[:, : TOKENS[0].start].any()


def test_an_image_that_is_finished_stays_finished():
    scheduler = tiny_scheduler(resampling_policy="remasked", resampling_threshold=0.5)
    logits = torch.zeros(2, 16, CODEBOOK_SIZE)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 3] = True
    sample, random = random_token_ids(), generators(0, 1)
    states = [generator.get_state() for generator in random]
    output = scheduler.step(logits, 0, sample, resample_mask=mask, generator=random)
    # Every token is improbable here, but the first image has nothing left to draw.
    assert not output.resample_mask[0].any()
    assert output.resample_mask[1].all()
    assert torch.equal(output.prev_sample[0], sample[0])
    assert torch.equal(random[0].get_state(), states[0])
    assert not torch.equal(random[1].get_state(), states[1])


def test_known_tokens_stay_in_every_pass():
    scheduler = tiny_scheduler(resampling_policy="simple", num_resampling_passes=1)
    sample, random = random_token_ids(3), generators(0, 1, 2)
    known = torch.rand(3, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    known[2] = True
    first = scheduler.step(random_logits(16, 3), 0, sample, known_mask=known, generator=random)
    known_image = torch.tensor([False, False, True])
    assert torch.equal(first.resample_mask, ~known & ~known_image[:, None])
    second = scheduler.step(
        random_logits(16, 3, seed=1), 0, first.prev_sample, first.resample_mask, known_mask=known, generator=random
    )
    for output in (first, second):
        assert torch.equal(output.prev_sample[:, TOKENS[0]][known], sample[:, TOKENS[0]][known])
        assert (output.prev_sample[:2, TOKENS[0]] != sample[:2, TOKENS[0]]).any()
    assert not torch.equal(first.prev_sample, second.prev_sample)


@pytest.mark.parametrize("policy", ["none", "simple", "masked"])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(policy):
    scheduler = tiny_scheduler(resampling_policy=policy, resampling_threshold=0.05, num_resampling_passes=2)
    logits, sample = random_logits(16, batch_size=3), random_token_ids(batch_size=3)
    together = scheduler.step(logits, 0, sample, generator=generators(5, 6, 7)).prev_sample
    for image, seed in enumerate((5, 6, 7)):
        one = slice(image, image + 1)
        alone = scheduler.step(logits[one], 0, sample[one], generator=generators(seed)).prev_sample
        assert torch.equal(alone[0], together[image])


def test_step_as_a_tuple():
    scheduler, logits, sample = tiny_scheduler(temperature=0.0), random_logits(4), random_token_ids()
    output = scheduler.step(logits, 1, sample)
    as_tuple = scheduler.step(logits, torch.tensor(1), sample, return_dict=False)
    assert len(as_tuple) == 4
    assert torch.equal(as_tuple[0], output.prev_sample)
    assert torch.equal(as_tuple[1], output.token_probabilities)
    assert torch.equal(as_tuple[2], output.resample_mask)
    assert as_tuple[3] == output.is_finite


def test_forbidden_tokens_may_have_logits_of_minus_infinity():
    logits = random_logits(16)
    logits[..., 5:] = -math.inf
    drawn = tiny_scheduler().step(logits, 0, random_token_ids(), generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample[:, TOKENS[0]].max() < 5


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"temperature": 0.0}, {"resampling_policy": "masked"}])
def test_logits_that_are_not_finite_are_told(settings):
    scheduler, sample = tiny_scheduler(**settings), random_token_ids()
    assert scheduler.step(random_logits(4), 1, sample).is_finite
    for logits in (one_logit(math.nan), one_logit(math.inf), torch.full((2, 4, 32), -math.inf)):
        output = scheduler.step(logits, 1, sample)
        assert not output.is_finite
        assert output.is_finite.shape == ()
        assert 0 <= output.prev_sample.min() <= output.prev_sample.max() < 32  # a codebook has them all the same


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.8}, {"top_p": 0.8, "temperature": 0.7}])
@pytest.mark.parametrize("per_image", [False, True])
def test_noise_that_was_drawn_before_draws_the_same(settings, per_image):
    scheduler, logits, sample = tiny_scheduler(**settings), random_logits(4), random_token_ids()
    drawn = scheduler.step(logits, 1, sample, generator=generators(3, 4) if per_image else generators(3)[0])
    noise = torch.empty(scheduler.noise_shape(scheduler.visit(1), 2, 32))
    exponential_noise(noise.shape, generators(3, 4) if per_image else generators(3)[0], noise.device, out=noise)
    assert torch.equal(scheduler.step(logits, 1, sample, noise=noise).prev_sample, drawn.prev_sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": torch.zeros(2, 20, dtype=torch.long)},
            r"`sample` must be ids of shape .* got .* \(2, 20\)",
        ),
        (
            {"model_output": torch.zeros(2, 5, 32)},
            r"`model_output` must have shape \(2, 4, codebook_size\) .* 1, got \(2, 5",
        ),
        (
            {"model_output": torch.zeros(3, 4, 32)},
            r"`model_output` must have shape \(2, 4, codebook_size\).*got \(3, 4",
        ),
        ({"model_output": torch.zeros(2, 4)}, r"`model_output` must have shape .*got \(2, 4\)"),
        ({"noise": torch.ones(2, 4, 9)}, r"`noise` must be floats of shape \(2, 4, 32\), got .*\(2, 4, 9\)"),
        ({"noise": [1.0]}, r"`noise` must be floats of shape \(2, 4, 32\), got list"),
        ({"generator": generators(0)}, r"`generator` must be a list of 2 generators, got 1"),
        ({"timestep": 3}, r"`timestep` must be one of \[2, 1, 0\], got 3"),
        ({"timestep": -1}, r"`timestep` must be one of \[2, 1, 0\], got -1"),
    ],
)
def test_step_refuses(change, message):
    arguments = {"model_output": random_logits(4), "timestep": 1, "sample": random_token_ids()}
    with pytest.raises(ValueError, match=message):
        tiny_scheduler().step(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_forward_process_refuses_what_is_no_ids(dtype):
    with pytest.raises(ValueError, match=rf"`original_samples` must be a torch.Tensor of ids, got .*{dtype}"):
        tiny_scheduler().add_noise(torch.ones(2, 21, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 20), (21,), (2, 21, 1)])
def test_forward_process_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"`original_samples` must have shape \(batch, 21\), got \("):
        tiny_scheduler().add_noise(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale_sizes": []}, "`scale_sizes` must list at least one scale"),
        ({"scale_sizes": [2, 1]}, "`scale_sizes` must grow"),
        ({"scales": [4, 1]}, "`scales` must grow"),
        ({"scales": []}, "`scales` must list at least one scale"),
        ({"scales": [1, 3, 4]}, r"`scales` must be a part of `scale_sizes` .*got \[1, 3, 4\] for \[1, 2, 4\]"),
        ({"scales": [1, 2]}, r"`scales` must be a part .* keeps its first and its last, got \[1, 2\]"),
        ({"scales": [2, 4]}, r"`scales` must be a part .* keeps its first and its last, got \[2, 4\]"),
        ({"scales": [1, [2, 1], 4]}, r"`scales` must be a part .*got \[1, \(2, 1\), 4\]"),
        (
            {"guidance_schedule": "cosine"},
            r"`guidance_schedule` must be one of \('linear', 'constant'\), got 'cosine'",
        ),
        ({"guidance_start": -0.1}, r"`guidance_start` must be a finite number in \[0, 1\], got -0.1"),
        (
            {"guidance_start": 0.5, "guidance_stop": 0.4},
            r"`guidance_stop` must be .* in \[0.5, 1\], got 0.4",
        ),
        ({"guidance_scale": math.nan}, "`guidance_scale` must be a finite number, got nan"),
        ({"guidance_scale": "4"}, "`guidance_scale` must be a finite number, got '4'"),
        ({"guidance_stop": 1.1}, r"`guidance_stop` must be a finite number in \[0.0, 1\], got 1.1"),
        ({"resampling_policy": "MR"}, r"`resampling_policy` must be one of \('none', .*'remasked'\), got 'MR'"),
        ({"num_resampling_passes": -1}, "`num_resampling_passes` must be an integer in .*got -1"),
        ({"num_resampling_passes": [1, 2]}, r"`num_resampling_passes` must be .* list of 3 of them, got \[1, 2\]"),
        ({"num_resampling_passes": [1, 2, -3]}, r"`num_resampling_passes` must be .*got -3"),
        ({"num_resampling_passes": [1, 2, 0.5]}, r"`num_resampling_passes` must be .*got 0.5"),
        ({"temperature": -0.1}, "`temperature` must be a finite number of at least 0, got -0.1"),
        ({"temperature": math.inf}, "`temperature` must be a finite number of at least 0, got inf"),
        ({"temperature": math.nan}, "`temperature` must be a finite number of at least 0, got nan"),
        ({"top_k": -1}, "`top_k` must be an integer of at least 0, got -1"),
        ({"top_k": 2.5}, "`top_k` must be an integer of at least 0, got 2.5"),
        ({"top_p": 0.0}, r"`top_p` must be a finite number .*got 0.0"),
        ({"top_p": 1.1}, r"`top_p` must be a finite number .*got 1.1"),
        ({"resampling_threshold": -0.01}, r"`resampling_threshold` must be a finite number in \[0, 1\], got -0.01"),
        (
            {"num_resampling_passes": 10**9},
            r"`num_resampling_passes` must be .* in \[0, 1000\], got 1000000000",
        ),
        ({"num_resampling_passes": True}, "`num_resampling_passes` must be an integer in .*got True"),
        ({"num_resampling_passes": "5"}, "`num_resampling_passes` must be an integer in .*got '5'"),
        ({"temperature": "1"}, "`temperature` must be a finite number .*got '1'"),
        ({"temperature": [1.0, 0.5]}, r"`temperature` must be a number or a list of 3 of them, got \[1.0, 0.5\]"),
        ({"temperature": [1.0, -1, 0.5]}, "`temperature` must be a finite number of at least 0, got -1"),
        ({"temperature": []}, r"`temperature` must be a number or a list of 3 of them, got \[\]"),
        ({"top_p": None}, "`top_p` must be a finite number .*got None"),
        ({"guidance_schedule": None}, "`guidance_schedule` must be one of .*got None"),
        ({"resampling_threshold": 2}, r"`resampling_threshold` must be a finite number in \[0, 1\], got 2"),
    ],
)
def test_constructor_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        ScaleScheduler(**{"scale_sizes": SCALE_SIZES, **overrides})


def test_from_config_swaps_the_scales():
    scheduler = tiny_scheduler(top_k=5, resampling_policy="masked")
    fewer = ScaleScheduler.from_config(scheduler.config, scales=[1, 4])
    assert fewer.timesteps.tolist() == [2] * 6 + [0] * 6
    assert fewer.config.top_k == 5
    again = ScaleScheduler.from_config(fewer.config)
    assert again.config.scales == [[1, 1], [4, 4]]
    assert again.config.scale_sizes == [[1, 1], [2, 2], [4, 4]]


# What version 0.1 wrote: two options that are gone, with the values that they had by default.
OLD_CONFIG = {
    "_class_name": "ScaleScheduler",
    "_diffusers_version": "0.42.1",
    "guidance_schedule": "linear",
    "keep_accepted_tokens": True,
    "num_resampling_passes": 5,
    "resampling_feedback": None,
    "resampling_policy": "masked",
    "resampling_threshold": 0.02,
    "scale_sizes": [[1, 1], [2, 2], [4, 4]],
    "scales": None,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


@pytest.mark.parametrize("values", [{}, {"resampling_feedback": "full"}, {"resampling_policy": "simple"}])
def test_a_config_of_version_0_1_is_read_without_a_word(values, tmp_path, caplog):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**OLD_CONFIG, **values}))
    loggers = [logging.get_logger(f"diffusers.{name}") for name in ("configuration_utils", "schedulers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    scheduler = ScaleScheduler.from_pretrained(tmp_path)
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert scheduler.config.resampling_policy == values.get("resampling_policy", "masked")
    assert scheduler.config.resampling_threshold == 0.02
    assert not {"resampling_feedback", "keep_accepted_tokens"} & {*scheduler.config}
    scheduler.save_pretrained(tmp_path / "again")
    assert "keep_accepted_tokens" not in (tmp_path / "again" / "scheduler_config.json").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_accepted_tokens": False}, '`keep_accepted_tokens` is gone .* got False.*"remasked"'),
        ({"resampling_feedback": "kept"}, "`resampling_feedback` is gone .* got 'kept'"),
        ({"resampling_feedback": "time_travel"}, "`resampling_feedback` is gone .* got 'time_travel'"),
        ({"resampling_feedback": "redraw"}, "`resampling_feedback` is gone .* got 'redraw'"),
        ({"resampling_policy": "learned"}, "`resampling_policy` 'learned' is gone .*'masked'"),
    ],
)
@pytest.mark.parametrize("way", ["file", "argument"])
def test_what_version_0_1_could_and_this_one_cannot_is_an_error(values, message, way, tmp_path):
    if way == "argument":
        with pytest.raises(ValueError, match=message):
            ScaleScheduler.from_config(OLD_CONFIG, **values)
        return
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**OLD_CONFIG, **values}))
    with pytest.raises(ValueError, match=message):
        ScaleScheduler.from_pretrained(tmp_path)


def test_timesteps_may_be_given_as_a_tensor_and_are_bounded():
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(timesteps=torch.tensor([2, 1, 1, 0]))
    assert scheduler.timesteps.tolist() == [2, 1, 1, 0]
    with pytest.raises(ValueError, match="`timesteps` must repeat none more than 1000 times, got 4003"):
        scheduler.set_timesteps(timesteps=[2] * 4001 + [1, 0])


def test_numbers_of_numpy_are_numbers():
    scheduler = tiny_scheduler(
        top_k=np.int64(3), top_p=np.float32(0.5), num_resampling_passes=np.array([1, 0, 2]).tolist()
    )
    assert json.loads(scheduler.to_json_string())["top_k"] == 3
    assert scheduler.config.top_p == 0.5


def test_an_unknown_option_is_said(caplog):
    logger = logging.get_logger("srdd.schedulers.scheduling_scale")
    logger.addHandler(caplog.handler)
    assert ScaleScheduler.from_config(tiny_scheduler().config, topk=600).config.top_k == 0
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {
        "ScaleScheduler has no options ['topk']: they are ignored."
    }


@pytest.mark.parametrize("name", ["resample_mask", "known_mask"])
@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
)
def test_step_refuses_other_masks(name, mask):
    with pytest.raises(ValueError, match=rf"`{name}` must be a torch.BoolTensor of shape \(2, 4\), got "):
        tiny_scheduler().step(random_logits(4), 1, random_token_ids(), **{name: mask})


@pytest.mark.parametrize(
    "timesteps", [torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0]), torch.zeros(2, 1, dtype=torch.long)]
)
def test_forward_process_refuses_other_timesteps(timesteps):
    with pytest.raises(ValueError, match="`timestep"):
        tiny_scheduler().add_noise(random_token_ids(), timesteps=timesteps)
