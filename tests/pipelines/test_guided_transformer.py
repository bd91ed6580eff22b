import pytest
import torch
from tiny_models import ID2LABEL, LATENT_CHANNELS, tiny_scheduler, tiny_transformer

from srdd.pipelines.conditions import class_conditions
from srdd.pipelines.guided_transformer import Guidance, GuidedTransformer


def guided_transformer(
    pattern: str, guidance_scale: float = 3.0, class_labels=(1, 4), **scheduler
) -> GuidedTransformer:
    conditions, schedule = class_conditions(class_labels, len(ID2LABEL), ID2LABEL), tiny_scheduler(**scheduler)
    guidance = Guidance.of(schedule, guidance_scale)
    return GuidedTransformer(tiny_transformer(pattern), conditions, guidance, schedule.num_tokens)


def weighing(weight: float) -> Guidance:
    """The same weight at all scales."""
    return Guidance(dict.fromkeys((2, 1, 0), weight > 0), torch.full((3,), weight))


def scale_of(timestep: int):
    return tiny_scheduler().visit(timestep)


def random_inputs(num_tokens: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.7, 4.0])
@pytest.mark.parametrize("pattern", ["causal", "markov", "banded"])
def test_guidance_is_one_plus_w_times_cond_minus_w_times_uncond(pattern, weight):
    guided, labels = guided_transformer(pattern), torch.tensor([1, 4])
    scale, inputs = scale_of(0), random_inputs(16)
    cond, uncond = (guided.transformer(inputs, 0, which).sample for which in (labels, None))
    guided.guidance = weighing(weight)
    logits = guided(inputs, scale)
    torch.testing.assert_close(logits, (1 + weight) * cond - weight * uncond, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance_scale", "settings", "computed"),
    [
        (3.0, {}, [4, 4, 4]),
        (1.0, {}, [2, 2, 2]),
        (3.0, {"guidance_schedule": "constant", "guidance_stop": 0.5}, [4, 4, 2]),
        (3.0, {"guidance_stop": 0.0}, [2, 2, 2]),
    ],
)
def test_the_unconditional_half_is_computed_where_guided_scales_look_back_at_it(guidance_scale, settings, computed):
    guided, scheduler, batches = (
        guided_transformer("causal", guidance_scale, **settings),
        tiny_scheduler(**settings),
        [],
    )
    guided.transformer.proj_in.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    for scale in scheduler.visits:
        guided(random_inputs(scale.num_tokens), scale)
    assert batches == computed
    # The buffers are those of the first scale: all later ones find their places there.
    assert len(guided.kv_cache.get(0, [2, 1, 0])[0]) == computed[0]


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "markov", "banded"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_some_images_are_told_what_they_are_told_in_the_batch(pattern, weight):
    guided = guided_transformer(pattern, class_labels=(1, 4, 2, 0))
    guided.guidance = weighing(weight)
    inputs, image_indices = random_inputs(4, batch_size=4), torch.tensor([0, 3])
    for timestep in (2, 1):
        scale = scale_of(timestep)
        whole = guided(inputs[:, : scale.num_tokens], scale)
    cache = guided.kv_cache.read_only() if guided.kv_cache is not None else None
    some = guided(inputs, scale_of(1), cache, image_indices)
    torch.testing.assert_close(some, whole[image_indices], atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_condition_there_is_one_half_whatever_the_weight():
    guided = guided_transformer("markov", class_labels=None)
    inputs, logits = random_inputs(4, batch_size=1), []
    for weight in (5.0, 0.0):
        guided.guidance = weighing(weight)
        logits.append(guided(inputs, scale_of(1)))
    assert torch.equal(*logits)


def test_guidance_cannot_begin_after_a_run_that_looks_back():
    guided = guided_transformer("causal", guidance_scale=1.0)
    guided.guidance = weighing(2.0)
    with pytest.raises(
        ValueError, match="`guidance_scale` must be above 1 from the start .*'causal'.* 2.0 at timestep 1"
    ):
        guided(random_inputs(4), scale_of(1))
