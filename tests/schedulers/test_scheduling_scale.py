import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CODEBOOK_SIZE, SCALE_SIZES, tiny_scheduler

from srdd import ScaleScheduler


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
        ({"resampling_policy": "masked", "num_resampling_passes": 5, "resampling_feedback": "redraw"}, [2, 1, 0]),
        ({"resampling_policy": "none", "num_resampling_passes": 5}, [2, 1, 0]),
        ({"resampling_policy": "learned", "num_resampling_passes": 2}, [2, 1, 1, 1, 0, 0, 0]),
        ({"resampling_policy": "learned", "num_resampling_passes": [4, 0, 1]}, [2, 1, 0, 0]),
        ({"resampling_policy": "learned", "num_resampling_passes": 1, "scales": [1, 4]}, [2, 0, 0]),
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


@pytest.mark.parametrize("timesteps", [[], [2, 1], [0, 1, 2], [2, 1, 2, 0], [3, 2, 1, 0], [2, 1, 0, 1]])
def test_timesteps_that_miss_or_reorder_a_scale_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"`timesteps` must be \[2, 1, 0\], each once or repeated, got \["):
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
    assert scheduler.scale_size(5) == (5, 5)
    assert scheduler.token_slice(5) == slice(10, 35)
    assert scheduler.coarser_scales(5) == [[1, 1], [3, 3]]
    with pytest.raises(ValueError, match=r"`timestep` must be one of \[9, 7, 5, 3, 1, 0\], got 8"):
        scheduler.token_slice(8)


def test_scales_of_equal_area_are_told_apart():
    scheduler = ScaleScheduler(scale_sizes=[[1, 1], [1, 4], [2, 4], [4, 4]], scales=[[1, 1], [2, 4], [4, 4]])
    assert scheduler.scale_timesteps() == [3, 1, 0]
    assert scheduler.scale_size(torch.tensor(1)) == (2, 4)


@pytest.mark.parametrize("timestep", [2, 1, 0])
def test_model_input_is_the_area_mean_of_the_state(timestep):
    scheduler, state = tiny_scheduler(), torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    height, width = scheduler.scale_size(timestep)
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
    for timestep in part.scale_timesteps():
        assert part.guidance_weight(timestep, 4.0) == whole.guidance_weight(timestep, 4.0)


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
    assert not output.resample_mask.any()
    assert output.feedback_mask is None


def test_sampling_settings_reach_the_draw():
    logits, sample = random_logits(16), random_token_ids()
    best = logits.argmax(dim=-1)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        drawn = tiny_scheduler(**settings).step(logits, 0, sample).prev_sample
        assert torch.equal(drawn[:, TOKENS[0]], best)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2, 1.0])
def test_masked_policy_wants_the_tokens_below_the_threshold(threshold):
    scheduler = tiny_scheduler(resampling_policy="masked", resampling_threshold=threshold)
    output = scheduler.step(random_logits(16), 0, random_token_ids(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.resample_mask, output.token_probabilities < threshold)


@pytest.mark.parametrize(
    ("policy", "keeps", "given", "used"),
    [
        ("masked", True, None, "full"),
        ("masked", False, None, "kept"),
        ("masked", False, "full", "full"),
        ("masked", True, "kept", "kept"),
        ("simple", True, None, "full"),
        ("simple", False, None, "full"),
        ("learned", True, None, "full"),
        ("simple", True, "time_travel", "time_travel"),
    ],
)
def test_the_policy_chooses_the_feedback_unless_told(policy, keeps, given, used):
    scheduler = tiny_scheduler(resampling_policy=policy, resampling_feedback=given, keep_accepted_tokens=keeps)
    assert scheduler.has_partial_passes == (policy == "masked" and keeps)
    assert scheduler.resampling_feedback == used
    output = scheduler.step(random_logits(16), 0, random_token_ids(), generator=torch.Generator().manual_seed(0))
    assert (output.feedback_mask is not None) == (used == "kept")
    # What was not asked for is not written down: another policy chooses anew.
    assert scheduler.config.resampling_feedback == given
    assert ScaleScheduler.from_config(scheduler.config, resampling_policy="none").resampling_feedback == (
        given or "full"
    )


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("feedback", ["full", "kept", "time_travel"])
def test_masked_resampling_draws_only_wanted_tokens_of_its_scale(feedback, keeps):
    scheduler = tiny_scheduler(
        resampling_policy="masked",
        resampling_threshold=0.05,
        resampling_feedback=feedback,
        num_resampling_passes=4,
        keep_accepted_tokens=keeps,
    )
    assert scheduler.has_partial_passes == (keeps and feedback != "time_travel")
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
        may_be = mask if mask is not None and scheduler.has_partial_passes else torch.ones_like(low)
        assert torch.equal(output.resample_mask, low & may_be)
        if feedback == "kept":
            assert torch.equal(output.feedback_mask, ~output.resample_mask)
        else:
            assert output.feedback_mask is None
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
    scheduler = tiny_scheduler(resampling_policy="masked", resampling_threshold=0.5, keep_accepted_tokens=False)
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


def plain_redraw(scheduler, logits, image, generator, threshold, passes):
    """Up to `passes` further draws of the low tokens of one image, from one distribution."""
    probabilities = logits[image].softmax(dim=-1)
    places = torch.arange(16)
    tokens = (probabilities / torch.empty(16, CODEBOOK_SIZE).exponential_(generator=generator)).argmax(dim=-1)
    for _ in range(passes):
        low = probabilities[places, tokens] < threshold
        if not low.any():
            break
        again = (probabilities / torch.empty(16, CODEBOOK_SIZE).exponential_(generator=generator)).argmax(dim=-1)
        tokens = torch.where(low, again, tokens)
    return tokens, probabilities[places, tokens] < threshold


@pytest.mark.parametrize("passes", [0, 1, 3, 30])
def test_redraw_feedback_is_a_loop_over_the_same_logits(passes):
    scheduler = tiny_scheduler(
        resampling_policy="masked",
        resampling_threshold=0.05,
        resampling_feedback="redraw",
        num_resampling_passes=passes,
    )
    logits = random_logits(16, batch_size=3)
    output = scheduler.step(logits, 0, random_token_ids(3), generator=generators(0, 1, 2))
    for image in range(3):
        expected, low = plain_redraw(scheduler, logits, image, *generators(image), 0.05, passes)
        assert torch.equal(output.prev_sample[image, TOKENS[0]], expected)
        assert torch.equal(output.resample_mask[image], low)
    assert output.resample_mask.any() == (passes < 3)


def learned_scheduler(**overrides) -> ScaleScheduler:
    return tiny_scheduler(**{"resampling_policy": "learned", "resampling_threshold": 0.3, **overrides})


def random_confidence(batch_size: int = 2, num_tokens: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, num_tokens, generator=torch.Generator().manual_seed(seed))


def test_learned_policy_draws_all_tokens_first_and_may_draw_each_again():
    logits, sample = random_logits(16), random_token_ids()
    plain = tiny_scheduler().step(logits, 0, sample, generator=generators(0, 1))
    output = learned_scheduler().step(logits, 0, sample, generator=generators(0, 1))
    assert torch.equal(output.prev_sample, plain.prev_sample)
    assert torch.equal(output.token_probabilities, plain.token_probabilities)
    assert output.resample_mask.all()
    assert output.feedback_mask is None


def test_learned_policy_draws_the_distrusted_tokens_from_the_new_logits():
    scheduler, sample, confidence = learned_scheduler(), random_token_ids(), random_confidence()
    confidence[0, :2] = torch.tensor([0.2999, 0.3])
    logits, mask = random_logits(16, seed=1), torch.ones(2, 16, dtype=torch.bool)
    output = scheduler.step(logits, 0, sample, resample_mask=mask, confidence=confidence, generator=generators(5, 6))
    drawn = tiny_scheduler().step(logits, 0, sample, generator=generators(5, 6)).prev_sample
    low = confidence < 0.3
    assert low[0, 0]
    assert not low[0, 1]
    expected = torch.where(low, drawn[:, TOKENS[0]], sample[:, TOKENS[0]])
    assert torch.equal(output.prev_sample[:, TOKENS[0]], expected)
    assert torch.equal(output.prev_sample[:, : TOKENS[0].start], sample[:, : TOKENS[0].start])
    chosen = logits.softmax(dim=-1).gather(-1, expected.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(output.token_probabilities, chosen, atol=1e-6, rtol=0)
    # A token that is trusted now may be distrusted next to the new ones.
    assert output.resample_mask.all()


def test_learned_policy_is_done_with_an_image_whose_tokens_are_all_trusted():
    scheduler, sample, random = learned_scheduler(), random_token_ids(), generators(0, 1)
    confidence = random_confidence()
    confidence[0] = 0.3
    states = [generator.get_state() for generator in random]
    mask = torch.ones(2, 16, dtype=torch.bool)
    output = scheduler.step(random_logits(16), 0, sample, resample_mask=mask, confidence=confidence, generator=random)
    assert torch.equal(output.prev_sample[0], sample[0])
    assert not torch.equal(output.prev_sample[1], sample[1])
    assert output.resample_mask.any(dim=1).tolist() == [False, True]
    assert torch.equal(random[0].get_state(), states[0])
    assert not torch.equal(random[1].get_state(), states[1])
    # It stays done, whatever a later pass would say.
    again = scheduler.step(
        random_logits(16, seed=1),
        0,
        output.prev_sample,
        resample_mask=output.resample_mask,
        confidence=torch.zeros(2, 16),
        generator=random,
    )
    assert torch.equal(again.prev_sample[0], sample[0])
    assert again.resample_mask.any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_learned_policy_at_the_ends_of_its_threshold(threshold):
    scheduler, sample = learned_scheduler(resampling_threshold=threshold), random_token_ids()
    mask = torch.ones(2, 16, dtype=torch.bool)
    output = scheduler.step(
        random_logits(16), 0, sample, resample_mask=mask, confidence=random_confidence(), generator=generators(0, 1)
    )
    assert output.resample_mask.all() == (threshold == 1)
    assert output.resample_mask.any() == (threshold == 1)
    assert torch.equal(output.prev_sample, sample) == (threshold == 0)


def test_learned_policy_leaves_known_tokens_alone():
    scheduler, sample, random = learned_scheduler(), random_token_ids(3), generators(0, 1, 2)
    known = torch.rand(3, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    known[2] = True
    first = scheduler.step(random_logits(16, 3), 0, sample, known_mask=known, generator=random)
    assert torch.equal(first.resample_mask, ~known)
    second = scheduler.step(
        random_logits(16, 3, seed=1),
        0,
        first.prev_sample,
        resample_mask=first.resample_mask,
        known_mask=known,
        confidence=torch.where(known, 0.0, random_confidence(3)),
        generator=random,
    )
    for output in (first, second):
        assert torch.equal(output.prev_sample[:, TOKENS[0]][known], sample[:, TOKENS[0]][known])
    low = ~known & (random_confidence(3) < 0.3)
    changed = first.prev_sample[:, TOKENS[0]] != second.prev_sample[:, TOKENS[0]]
    assert changed.any()
    assert not changed[~low].any()
    assert torch.equal(second.resample_mask, ~known & low.any(dim=1, keepdim=True))
    assert not second.resample_mask[2].any()


@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (None, r"`confidence` must have shape \(2, 4\) in further passes of the policy 'learned', got None"),
        (torch.zeros(2, 5), r"`confidence` must have shape \(2, 4\) .* got \(2, 5\)"),
        (torch.zeros(1, 4), r"`confidence` must have shape \(2, 4\) .* got \(1, 4\)"),
        (
            torch.tensor([[-0.5] * 4, [0.5] * 4]),
            r"`confidence` must hold probabilities in \[0, 1\], got \[-0.5, 0.5\]",
        ),
        (torch.full((2, 4), 1.5), r"`confidence` must hold probabilities in \[0, 1\], got \[1.5, 1.5\]"),
        (torch.full((2, 4), math.nan), r"`confidence` must hold probabilities in \[0, 1\], got \[nan, nan\]"),
    ],
)
def test_learned_policy_refuses_what_is_no_confidence(confidence, message):
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        learned_scheduler().step(random_logits(4), 1, random_token_ids(), resample_mask=mask, confidence=confidence)


@pytest.mark.parametrize("policy", ["none", "simple", "masked"])
def test_other_policies_read_no_confidence(policy):
    scheduler = tiny_scheduler(resampling_policy=policy, resampling_threshold=0.05)
    logits, sample, mask = random_logits(16), random_token_ids(), torch.ones(2, 16, dtype=torch.bool)
    with_and_without = [
        scheduler.step(logits, 0, sample, resample_mask=mask, generator=generators(0, 1), confidence=confidence)
        for confidence in (None, torch.ones(2, 16))
    ]
    assert torch.equal(with_and_without[0].prev_sample, with_and_without[1].prev_sample)
    assert torch.equal(with_and_without[0].resample_mask, with_and_without[1].resample_mask)


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
    assert as_tuple[3] is None


def test_forbidden_tokens_may_have_logits_of_minus_infinity():
    logits = random_logits(16)
    logits[..., 5:] = -math.inf
    drawn = tiny_scheduler().step(logits, 0, random_token_ids(), generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample[:, TOKENS[0]].max() < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 20, dtype=torch.long)}, r"`sample` must have shape \(batch, 21\), got \(2, 20\)"),
        (
            {"model_output": torch.zeros(2, 5, 32)},
            r"`model_output` must have shape \(2, 4, codebook_size\) .* 1, got \(2, 5",
        ),
        (
            {"model_output": torch.zeros(3, 4, 32)},
            r"`model_output` must have shape \(2, 4, codebook_size\).*got \(3, 4",
        ),
        ({"model_output": torch.zeros(2, 4)}, r"`model_output` must have shape .*got \(2, 4\)"),
        ({"model_output": one_logit(math.nan)}, "`model_output` must be finite .* got NaN or .* at timestep 1"),
        ({"model_output": one_logit(math.inf)}, "`model_output` must be finite .* got NaN or .* at timestep 1"),
        ({"model_output": torch.full((2, 4, 32), -math.inf)}, "`model_output` must be finite"),
        ({"generator": generators(0)}, r"`generator` must be a list of 2 generators, got 1"),
        ({"timestep": 3}, r"`timestep` must be one of \[2, 1, 0\], got 3"),
        ({"timestep": -1}, r"`timestep` must be one of \[2, 1, 0\], got -1"),
    ],
)
def test_step_refuses(change, message):
    arguments = {"model_output": random_logits(4), "timestep": 1, "sample": random_token_ids()}
    with pytest.raises(ValueError, match=message):
        tiny_scheduler().step(**{**arguments, **change})


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
        ({"guidance_start": -0.1}, r"`guidance_start` must be in \[0, 1\], got -0.1"),
        ({"guidance_start": 0.5, "guidance_stop": 0.4}, r"`guidance_stop` must be in \[guidance_start, 1\], got 0.4"),
        ({"guidance_stop": 1.1}, r"`guidance_stop` must be in \[guidance_start, 1\], got 1.1"),
        ({"resampling_policy": "MR"}, r"`resampling_policy` must be one of \('none', .*'learned'\), got 'MR'"),
        ({"resampling_feedback": "all"}, r"`resampling_feedback` must be one of \('full', .*None\), got 'all'"),
        (
            {"resampling_policy": "simple", "resampling_feedback": "kept"},
            "`resampling_feedback` must be 'full' or 'time_travel' with the policy 'simple'.*got 'kept'",
        ),
        (
            {"resampling_policy": "simple", "resampling_feedback": "redraw"},
            "`resampling_feedback` must be 'full' or 'time_travel' with the policy 'simple'.*got 'redraw'",
        ),
        (
            {"resampling_policy": "learned", "resampling_feedback": "kept"},
            "`resampling_feedback` must be 'full' with the policy 'learned'.*got 'kept'",
        ),
        (
            {"resampling_policy": "learned", "resampling_feedback": "time_travel"},
            "`resampling_feedback` must be 'full' with the policy 'learned'.*got 'time_travel'",
        ),
        (
            {"resampling_policy": "learned", "resampling_feedback": "redraw"},
            "`resampling_feedback` must be 'full' with the policy 'learned'.*got 'redraw'",
        ),
        ({"num_resampling_passes": -1}, "`num_resampling_passes` must be a non-negative integer.*got -1"),
        ({"num_resampling_passes": [1, 2]}, r"`num_resampling_passes` must be .* list of 3 of them, got \[1, 2\]"),
        ({"num_resampling_passes": [1, 2, -3]}, r"`num_resampling_passes` must be .*got \[1, 2, -3\]"),
        ({"num_resampling_passes": [1, 2, 0.5]}, r"`num_resampling_passes` must be .*got \[1, 2, 0.5\]"),
        ({"temperature": -0.1}, "`temperature` must be at least 0, got -0.1"),
        ({"temperature": math.inf}, "`temperature` must be at least 0, got inf"),
        ({"temperature": math.nan}, "`temperature` must be at least 0, got nan"),
        ({"top_k": -1}, "`top_k` must be a non-negative integer, got -1"),
        ({"top_k": 2.5}, "`top_k` must be a non-negative integer, got 2.5"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"`top_p` must be in \(0, 1\], got 1.1"),
        ({"resampling_threshold": -0.01}, r"`resampling_threshold` must be in \[0, 1\], got -0.01"),
        ({"resampling_threshold": 2}, r"`resampling_threshold` must be in \[0, 1\], got 2"),
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
