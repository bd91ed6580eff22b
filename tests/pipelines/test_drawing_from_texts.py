"""Runs over the scales with the transformer that draws from texts: nothing but what it is told is another."""

import pytest
import torch
from no_host import RefuseTransfers
from tiny_models import random_texts, tiny_scheduler, tiny_text_transformer, tiny_vqvae
from tqdm.auto import tqdm

from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import Guidance
from srdd.pipelines.recorded_sampling import empty_noise
from srdd.pipelines.scale_sampling import SamplingInputs, SamplingOutput, sample_scales


PATTERNS = ("causal", "markov", "banded")
# A guidance that is off at both ends, and last scales that are sharpened.
INTERVAL = {"guidance_schedule": "constant", "guidance_start": 0.3, "guidance_stop": 0.6, "temperature": [1, 1, 0.1]}
SETTINGS = (
    {},
    INTERVAL,
    {"top_k": 7, "top_p": 0.9, "resampling_policy": "simple", "num_resampling_passes": 1},
)


def texts(batch_size: int = 3) -> Conditions:
    """Texts of several lengths, all with the same other text."""
    other = {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in random_texts([2], seed=7).items()}
    return Conditions(batch_size, random_texts([1 + index for index in range(batch_size)]), other)


def image_of(conditions: Conditions, index: int) -> Conditions:
    halves = [conditions.conditional, conditions.unconditional]
    return Conditions(1, *({name: tensor[index : index + 1] for name, tensor in half.items()} for half in halves))


@torch.no_grad()
def draw(pattern, conditions, seeds=(0, 1, 2), guidance_scale=3.0, **settings) -> SamplingOutput:
    scheduler = tiny_scheduler(**settings)
    latents = torch.zeros(conditions.batch_size, 8, 4, 4)
    inputs = SamplingInputs(conditions, Guidance.of(scheduler, guidance_scale), latents)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return sample_scales(
        tiny_vqvae(), tiny_text_transformer(pattern), scheduler, inputs, tqdm(disable=True), generators
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "settings"), [("causal", INTERVAL), ("markov", {}), ("banded", SETTINGS[2])], ids=str
)
def test_nothing_is_read_from_the_device_or_sent_to_it(pattern, settings):
    scheduler, device = tiny_scheduler(**settings), torch.device("meta")
    conditions = texts()
    halves = [
        {name: tensor.to(device) for name, tensor in half.items()}
        for half in (conditions.conditional, conditions.unconditional)
    ]
    models = tiny_vqvae().to(device), tiny_text_transformer(pattern).to(device)
    inputs = SamplingInputs(
        Conditions(3, *halves),
        Guidance.of(scheduler, 3.0, device),
        torch.zeros(3, 8, 4, 4, device=device),
        empty_noise(scheduler, 3, models[0].config.codebook_size, device),
    )
    sample_scales(*models, scheduler, inputs, tqdm(disable=True))
    with RefuseTransfers():
        output = sample_scales(*models, scheduler, inputs, tqdm(disable=True))
    assert output.token_ids.shape == (3, 21)


@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"resampling_policy": "masked", "resampling_threshold": 0.2}], ids=str
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_is_as_many_single_runs(pattern, settings):
    conditions = texts()
    whole = draw(pattern, conditions, **settings)
    assert whole.is_finite.all()
    for index in range(3):
        alone = draw(pattern, image_of(conditions, index), seeds=[index], **settings)
        assert torch.equal(alone.token_ids[0], whole.token_ids[index])
        torch.testing.assert_close(alone.latents[0], whole.latents[index], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_guidance_the_other_text_does_not_matter(pattern):
    conditions = texts()
    guided, without = draw(pattern, conditions), draw(pattern, conditions, guidance_scale=1.0)
    alone = draw(pattern, Conditions(3, conditions.conditional), guidance_scale=1.0)
    assert torch.equal(without.token_ids, alone.token_ids)
    assert not torch.equal(without.token_ids, guided.token_ids)
