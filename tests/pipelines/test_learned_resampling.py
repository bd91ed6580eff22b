"""The resampling policy "learned" in the pipelines: what the critic reads and what becomes of its verdicts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LATENT_CHANNELS, tiny_critic, tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd import SRDDInpaintPipeline, SRDDPipeline, SRDDSuperResolutionPipeline, TokenCritic
from srdd.pipelines.scale_sampling import GuidedTransformer, check_components


PATTERNS = ("causal", "markov", "banded")
TOKENS = {2: slice(0, 1), 1: slice(1, 5), 0: slice(5, 21)}


def learned_scheduler(**overrides):
    settings = {"resampling_policy": "learned", "resampling_threshold": 0.5, "num_resampling_passes": 3}
    return tiny_scheduler(**{**settings, **overrides})


def constant_critic(logit: float) -> TokenCritic:
    """One that says the same of every token."""
    critic = tiny_critic()
    with torch.no_grad():
        critic.proj_out.weight.zero_()
        critic.proj_out.bias.fill_(logit)
    return critic


def lively(pipe):
    """Most probable tokens that differ from place to place, and a critic that is of several minds about them."""
    with torch.no_grad():
        pipe.vqvae.quantize.codebook.weight.mul_(5)
        pipe.transformer.pos_embed.mul_(5)
        if pipe.token_critic is not None:
            pipe.token_critic.proj_out.weight.mul_(3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lively_pipeline(pattern: str = "markov", critic: TokenCritic | None = None, **overrides) -> SRDDPipeline:
    scheduler = learned_scheduler(**overrides)
    return lively(tiny_pipeline(pattern, scheduler=scheduler, token_critic=critic or tiny_critic()))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tokens_of(pipe, class_labels, **arguments) -> torch.Tensor:
    return pipe(class_labels, output_type="latent", **arguments).token_ids


def watched(model: torch.nn.Module, function, *arguments, **options) -> tuple[Any, list[torch.Size]]:
    """What a function returns, and the shape of the first input of every forward of a model meanwhile."""
    shapes = []
    handle = model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    result = function(*arguments, **options)
    handle.remove()
    return result, shapes


@torch.no_grad()
def plain_sample(
    pipe, label: int, guidance_scale: float, generator: torch.Generator
) -> tuple[torch.Tensor, list[int]]:
    """
    The policy for one image, without cache, slices or shared code: every pass is a forward over all scales so far.
    Returns the pyramid, and how many tokens each further pass drew.
    """
    config, transformer, critic = pipe.scheduler.config, pipe.transformer, pipe.token_critic
    sizes, null = config.scale_sizes, pipe.transformer.config.num_classes
    state, inputs, maps, redrawn = torch.zeros(1, LATENT_CHANNELS, *sizes[-1]), [], [], []
    for k, size in enumerate(sizes):
        before, tokens = state, None
        inputs.append(F.adaptive_avg_pool2d(before, size))
        for number in range(1 + (config.num_resampling_passes if k > 0 else 0)):
            # The coarser scales are those of the first passes; this one is fed back.
            packed = [*inputs[:-1], F.adaptive_avg_pool2d(state, size)]
            packed = torch.cat([part.flatten(2) for part in packed], dim=2).transpose(1, 2)
            timesteps = list(range(len(sizes) - 1, len(sizes) - 2 - k, -1))
            cond, uncond = (
                transformer(packed, timesteps, torch.tensor([which]), return_hidden_states=True)
                for which in (label, null)
            )
            t = (guidance_scale - 1) * k / (len(sizes) - 1)
            logits = ((1 + t) * cond.sample - t * uncond.sample)[:, -size[0] * size[1] :]
            low = torch.ones(logits.shape[:2], dtype=torch.bool)
            if number > 0:
                seen = cond.hidden_states[:, -size[0] * size[1] :]
                judged = critic.proj_in(seen) + critic.token_embed.weight[tokens]
                verdict = F.gelu(judged) @ critic.proj_out.weight[0] + critic.proj_out.bias
                low = 1 / (1 + (-verdict).exp()) < config.resampling_threshold
                redrawn.append(int(low.sum()))
                if not low.any():
                    break
            noise = torch.empty(logits.shape[1:]).exponential_(generator=generator)
            drawn = (logits.softmax(-1) / noise).argmax(-1)
            tokens = torch.where(low, drawn, drawn if tokens is None else tokens)
            state = before + pipe.vqvae.residual_map(tokens.view(1, *size))
        maps.append(tokens)
    return torch.cat(maps, dim=1), redrawn


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_of_the_plain_algorithm(pattern, guidance_scale):
    pipe, counts = lively_pipeline(pattern), []
    for label, seed in ((1, 0), (4, 1), (0, 2)):
        token_ids = tokens_of(pipe, label, guidance_scale=guidance_scale, generator=generators(seed))
        expected, redrawn = plain_sample(pipe, label, guidance_scale, *generators(seed))
        assert torch.equal(token_ids, expected)
        counts += redrawn
    # There was something to judge: passes that drew a part of the tokens.
    assert any(0 < count < 16 for count in counts)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_equals_single_runs(pattern):
    pipe = lively_pipeline(pattern, top_k=12, top_p=0.95, resampling_threshold=0.2, num_resampling_passes=6)
    labels, seeds = [0, 3, "banana", 3], (10, 11, 12, 13)
    together = tokens_of(pipe, labels, generator=generators(*seeds))
    finished = []
    for index, (label, seed) in enumerate(zip(labels, seeds)):
        alone, looks = watched(pipe.token_critic, tokens_of, pipe, label, generator=generators(seed))
        assert torch.equal(together[index], alone[0])
        finished.append(len(looks))
    # Some images need more passes than others.
    assert len(set(finished)) > 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_critic_that_trusts_everything_changes_nothing(pattern):
    plain = lively(tiny_pipeline(pattern))
    trusting = lively_pipeline(pattern, constant_critic(10.0))
    drawn = [tokens_of(pipe, [1, 2, 4], generator=generators(0, 1, 2)) for pipe in (plain, trusting)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_critic_that_trusts_nothing_draws_all_tokens_again_but_those_of_the_coarsest_scale(pattern):
    settings = {"resampling_policy": "simple", "num_resampling_passes": [0, 3, 3]}
    simple = lively(tiny_pipeline(pattern, scheduler=tiny_scheduler(**settings)))
    distrusting = lively_pipeline(pattern, constant_critic(-10.0))
    drawn = [tokens_of(pipe, [1, 2, 4], generator=generators(0, 1, 2)) for pipe in (simple, distrusting)]
    assert torch.equal(*drawn)


def test_the_critic_reads_the_conditional_half_of_further_passes_and_the_transformer_runs_once_in_each():
    pipe = lively_pipeline(resampling_threshold=1.0, num_resampling_passes=2)
    _, looks = watched(pipe.token_critic, tokens_of, pipe, [1, 2], guidance_scale=2.0)
    assert looks == [(2, 4, 16)] * 2 + [(2, 16, 16)] * 2
    _, passes = watched(pipe.transformer, tokens_of, pipe, [1, 2], guidance_scale=2.0)
    assert [batch_size for batch_size, _, _ in passes] == [2] + [4] * 6


def test_a_run_stops_looking_where_the_critic_is_content():
    pipe = lively_pipeline(critic=constant_critic(10.0), num_resampling_passes=20)
    _, passes = watched(pipe.transformer, tokens_of, pipe, [1, 2], guidance_scale=1.0)
    # The coarsest scale is drawn, the others are drawn and looked at once.
    assert [shape[1] for shape in passes] == [1, 4, 4, 16, 16]


def test_a_critic_is_not_asked_by_other_policies():
    for policy in ("none", "simple", "masked"):
        pipe = lively_pipeline(resampling_policy=policy, resampling_threshold=0.05)
        without = lively(tiny_pipeline(scheduler=pipe.scheduler))
        drawn, looks = watched(pipe.token_critic, tokens_of, pipe, [1, 2], generator=generators(0, 1))
        assert not looks
        assert torch.equal(drawn, tokens_of(without, [1, 2], generator=generators(0, 1)))


def test_callbacks_see_every_pass_and_may_change_what_is_judged():
    pipe, calls = lively_pipeline(resampling_threshold=1.0, num_resampling_passes=2), []

    def watch(pipe, index, timestep, tensors):
        calls.append((index, timestep))
        return {}

    tokens_of(pipe, 1, callback_on_step_end=watch)
    assert calls == list(enumerate([2, 1, 1, 1, 0, 0, 0]))

    def heard(shift: float) -> torch.Tensor:
        verdicts = []
        handle = pipe.token_critic.register_forward_hook(lambda *args: verdicts.append(args[-1].logits))
        tokens_of(
            pipe,
            1,
            generator=generators(0),
            callback_on_step_end=lambda pipe, index, timestep, tensors: {"latents": tensors["latents"] + shift},
        )
        handle.remove()
        return verdicts[0]

    assert not torch.allclose(heard(0.0), heard(1.0), atol=1e-3)


def test_half_precision():
    pipe = lively_pipeline().to(torch.bfloat16)
    assert pipe.token_critic.dtype == torch.bfloat16
    output = pipe([1, 2], generator=generators(0, 1), output_type="pt")
    assert output.images.isfinite().all()
    # Each part may have a precision of its own.
    pipe.token_critic = tiny_critic()
    assert pipe([1, 2], generator=generators(0, 1), output_type="pt").images.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_guided_logits_come_with_the_hidden_states_of_the_conditional_half(weight):
    transformer, labels = tiny_transformer(), torch.tensor([1, 4])
    inputs = torch.randn(2, 21, LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
    guided = GuidedTransformer(transformer, labels)
    plain, _ = guided(inputs, [2, 1, 0], weight)
    logits, hidden_states = guided(inputs, [2, 1, 0], weight, keep_unconditional=True, return_hidden_states=True)
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)
    expected = transformer(inputs, class_labels=labels, return_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden_states, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_critic_gone_mad_stops_the_run():
    pipe = lively_pipeline(critic=constant_critic(float("nan")))
    with pytest.raises(ValueError, match=r"`confidence` must hold probabilities in \[0, 1\], got \[nan, nan\]"):
        pipe(1)


PICTURE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pipeline_class", "inputs"),
    [
        (SRDDPipeline, {}),
        (SRDDInpaintPipeline, {"image": PICTURE, "mask_image": torch.ones(1, 1, 8, 8)}),
        (SRDDSuperResolutionPipeline, {"image": PICTURE, "scale_factor": 2}),
    ],
)
def test_the_policy_needs_a_critic_before_anything_is_done(pipeline_class, inputs):
    pipe = pipeline_class(tiny_vqvae(), tiny_transformer(), learned_scheduler())
    done = []
    for model in (pipe.transformer, pipe.vqvae.encoder):
        model.register_forward_hook(lambda *args: done.append(args))
    with pytest.raises(ValueError, match="`token_critic` must be a TokenCritic with .* policy 'learned', got None"):
        pipe(**inputs, class_labels=1)
    assert not done
    if pipeline_class is SRDDInpaintPipeline:
        with pytest.raises(ValueError, match="`token_critic` must be a TokenCritic"):
            pipe.outpaint(PICTURE, 2)


def test_a_critic_of_another_transformer_is_refused():
    critic = tiny_critic(dim=24)
    message = "`token_critic` must read hidden states of the transformer's width, 16, got 24"
    with pytest.raises(ValueError, match=message):
        check_components(tiny_vqvae(), tiny_transformer(), tiny_scheduler(), critic)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(token_critic=critic)(1)
    with pytest.raises(ValueError, match="`token_critic` must know the transformer's 32 codes, got 33"):
        tiny_pipeline(token_critic=tiny_critic(codebook_size=33))(1)


def editing_pipeline(pipeline_class, pattern: str):
    scheduler = learned_scheduler(resampling_threshold=0.3)
    return lively(pipeline_class(tiny_vqvae(), tiny_transformer(pattern), scheduler, tiny_critic()))


def images_and_masks(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    return images, (torch.rand(count, 1, 8, 8, generator=generator) < 0.5).float()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_tokens_of_a_picture_stay(pattern):
    pipe = editing_pipeline(SRDDInpaintPipeline, pattern)
    images, masks = images_and_masks(3)
    known_by_scale, final = {}, None

    def watch(pipe, index, timestep, tensors):
        nonlocal final
        known = (1 - F.adaptive_max_pool2d(masks, pipe.scheduler.scale_size(timestep))).bool().flatten(1)
        values = tensors["token_ids"][:, TOKENS[timestep]][known]
        assert torch.equal(known_by_scale.setdefault(timestep, values), values)
        final = tensors["token_ids"]
        return {}

    _, looks = watched(
        pipe.token_critic,
        pipe,
        images,
        masks,
        [0, 1, 2],
        generator=generators(0, 1, 2),
        known_cells="all",
        output_type="pt",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["token_ids"],
    )
    assert len(looks) > 2
    assert known_by_scale[0].numel() > 5
    assert (final >= 0).all()


@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_an_inpainted_image_does_not_depend_on_its_batch(pattern):
    pipe = editing_pipeline(SRDDInpaintPipeline, pattern)
    images, masks = images_and_masks(3)
    masks[1] = 0  # nothing to draw
    together = pipe(images, masks, [0, 1, 2], generator=generators(0, 1, 2), output_type="pt")
    for index in range(3):
        one = slice(index, index + 1)
        alone = pipe(images[one], masks[one], index, generator=generators(index), output_type="pt")
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        torch.testing.assert_close(alone.images[0], together.images[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_forced_coarse_scales_of_an_enlarged_image_are_not_judged(pattern):
    pipe = editing_pipeline(SRDDSuperResolutionPipeline, pattern)
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"num_known_scales": 2, "generator": generators(0), "output_type": "pt"}
    _, looks = watched(pipe.token_critic, pipe, small, 2, 1, **options)
    assert {num_tokens for _, num_tokens, _ in looks} == {16}
