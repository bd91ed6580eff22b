"""What training and distilling a transformer share, against the pipeline and plain loops."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import CODEBOOK_SIZE, ID2LABEL, tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae
from torch.utils.data import DataLoader

from srdd import ScaleKVCache
from srdd.data.token_cache import TokenDataset
from srdd.pipelines.scale_sampling import GuidedTransformer
from srdd.training.guided_distillation import guided_distribution
from srdd.training.optimizer import parameter_groups
from srdd.training.training_run import cross_entropy
from srdd.training.validation import draw, validate


SCHEDULES = {"all scales": {}, "fewer scales": {"scales": [1, 4]}, "constant": {"guidance_schedule": "constant"}}


def make_tokens(scheduler, count: int = 5, seed: int = 0) -> TokenDataset:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, CODEBOOK_SIZE, (count, scheduler.num_tokens), dtype=np.uint16)
    return TokenDataset(token_ids, rng.integers(0, len(ID2LABEL), count))


def make_batch(scheduler, count: int = 5) -> dict[str, torch.Tensor]:
    return next(iter(DataLoader(make_tokens(scheduler, count), batch_size=count)))


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["markov", "causal", "banded"])
@pytest.mark.parametrize("overrides", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 2.5])
def test_a_teachers_distribution_is_what_the_pipeline_draws_from(pattern, overrides, guidance_scale):
    vqvae, teacher, scheduler = tiny_vqvae(), tiny_transformer(pattern), tiny_scheduler(**overrides)
    batch, scale_sizes = make_batch(scheduler), scheduler.scales
    labels = batch["labels"].clone()
    labels[1] = len(ID2LABEL)  # the null class
    inputs = vqvae.teacher_forcing_inputs(batch["token_ids"], scale_sizes)
    found = guided_distribution(teacher, inputs, labels, scheduler, guidance_scale)
    assert found.shape == (5, scheduler.num_tokens, CODEBOOK_SIZE)
    assert found.dtype == torch.float32

    # As the pipeline does it: from the state so far, scale by scale, with its cache.
    kv_cache = ScaleKVCache() if teacher.needs_kv_cache else None
    guided = GuidedTransformer(teacher, labels)
    state = torch.zeros(5, vqvae.config.latent_channels, *vqvae.config.scale_sizes[-1])
    states = vqvae.latent_states(batch["token_ids"], scale_sizes)
    for index, timestep in enumerate(scheduler.scale_timesteps()):
        hidden_states = scheduler.scale_model_input(state, timestep)
        weight = scheduler.guidance_weight(timestep, guidance_scale)
        logits, _ = guided(hidden_states, timestep, weight, kv_cache, kv_cache is not None)
        torch.testing.assert_close(
            found[:, scheduler.token_slice(timestep)], logits.log_softmax(dim=-1), atol=1e-4, rtol=0
        )
        state = states[index]
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(5, scheduler.num_tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_guidance_grows_over_the_scales_and_spares_the_null_class():
    vqvae, teacher, scheduler = tiny_vqvae(), tiny_transformer(), tiny_scheduler()
    batch = make_batch(scheduler)
    inputs = vqvae.teacher_forcing_inputs(batch["token_ids"])
    labels = batch["labels"].clone()
    labels[0] = len(ID2LABEL)
    plain, guided = (guided_distribution(teacher, inputs, labels, scheduler, g) for g in (1.0, 4.0))
    coarsest, finest = scheduler.token_slice(2), scheduler.token_slice(0)
    torch.testing.assert_close(guided[:, coarsest], plain[:, coarsest], atol=1e-5, rtol=0)
    assert (guided[1:, finest] - plain[1:, finest]).abs().amax(dim=(1, 2)).min() > 0.1
    torch.testing.assert_close(guided[0], plain[0], atol=1e-5, rtol=0)


def arguments(**overrides) -> Namespace:
    values = {
        "label_smoothing": 0.0,
        "scale_loss_weights": None,
        "num_validation_images": 4,
        "validation_guidance_scale": 2.5,
        "seed": 0,
    }
    return Namespace(**{**values, **overrides})


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["markov", "causal", "banded"])
@pytest.mark.parametrize("overrides", [{}, {"scales": [1, 4]}], ids=["all scales", "fewer scales"])
def test_cross_entropy_is_the_probability_of_the_next_scale(pattern, overrides):
    vqvae, model, scheduler = tiny_vqvae(), tiny_transformer(pattern), tiny_scheduler(**overrides)
    batch = make_batch(scheduler)
    logits, result = cross_entropy(arguments(), vqvae, scheduler)(model, batch)
    log_probabilities = logits.log_softmax(dim=-1)
    total = 0.0
    for image in range(5):
        for token in range(scheduler.num_tokens):
            total -= log_probabilities[image, token, batch["token_ids"][image, token]].item()
    assert result.loss.item() == pytest.approx(total / (5 * scheduler.num_tokens), abs=1e-4)
    assert result.per_scale.shape == (len(scheduler.scales),)
    # What is read of the pyramid is the state before each scale: the finest tokens change no logits.
    changed = {**batch, "token_ids": batch["token_ids"].clone()}
    changed["token_ids"][:, scheduler.token_slice(0)] += 1
    changed["token_ids"] %= CODEBOOK_SIZE
    again, _ = cross_entropy(arguments(), vqvae, scheduler)(model, changed)
    assert torch.equal(again, logits)


@torch.no_grad()
def test_cross_entropy_takes_weights_and_smoothing_from_the_arguments():
    vqvae, model, scheduler = tiny_vqvae(), tiny_transformer(), tiny_scheduler()
    batch = make_batch(scheduler)
    args = arguments(label_smoothing=0.2, scale_loss_weights=[1.0, 0.0, 0.0])
    logits, result = cross_entropy(args, vqvae, scheduler)(model, batch)
    expected = F.cross_entropy(logits[:, 0], batch["token_ids"][:, 0], label_smoothing=0.2)
    torch.testing.assert_close(result.loss, expected, atol=1e-5, rtol=0)


def test_validation_is_the_loss_of_all_pyramids_whatever_the_batches():
    vqvae, model, scheduler = tiny_vqvae(), tiny_transformer(), tiny_scheduler()
    tokens = make_tokens(scheduler, 7)
    metrics = [validate(model, vqvae, DataLoader(tokens, batch_size=size), scheduler) for size in (7, 3)]
    assert metrics[0]["scales"] == metrics[1]["scales"] == [[1, 1], [2, 2], [4, 4]]
    with torch.no_grad():
        _, whole = cross_entropy(arguments(), vqvae, scheduler)(model, make_batch(scheduler, 7))
    for found in metrics:
        assert found["loss"] == pytest.approx(whole.loss.item(), abs=1e-5)
        assert found["per_scale"] == pytest.approx(whole.per_scale.tolist(), abs=1e-5)
        assert found["accuracy"] == pytest.approx(whole.accuracy.tolist(), abs=1e-5)


def test_only_matrices_of_linear_layers_decay():
    model = tiny_transformer(shared_adaln=False)
    decayed, others = parameter_groups(model, 0.25)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    other_names = {names[id(parameter)] for parameter in others["params"]}
    assert decayed_names | other_names == set(names.values())
    assert not decayed_names & other_names
    assert {"class_embed.weight", "scale_embed.weight", "pos_embed", "start_pos_embed"} <= other_names
    assert all(name.endswith("weight") for name in decayed_names)
    assert {"proj_in.weight", "proj_out.weight", "blocks.0.attn.to_q.weight", "blocks.1.adaln.weight"} < decayed_names
    assert all(parameter.ndim == 2 for parameter in decayed["params"])


def test_frozen_parameters_are_in_no_group():
    model = tiny_transformer().requires_grad_(False)
    model.class_embed.requires_grad_(True)
    [group] = parameter_groups(model, 0.25)
    assert [id(parameter) for parameter in group["params"]] == [id(model.class_embed.weight)]
    assert group["weight_decay"] == 0


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (4, [4]), (8, [8]), (16, [8, 8]), (11, [8])])
def test_pictures_come_in_equal_rows(count, rows):
    pipe = tiny_pipeline()
    drawn = draw(arguments(num_validation_images=count), pipe.transformer, pipe.vqvae, pipe.scheduler)
    assert [len(row) for row in drawn] == rows
    assert all(row.shape[1:] == (3, 8, 8) for row in drawn)
    assert max(row.abs().max() for row in drawn) <= 1


def test_pictures_are_those_of_the_pipeline_with_classes_spread_over_all():
    pipe = tiny_pipeline()
    [drawn] = draw(arguments(validation_guidance_scale=3.0), pipe.transformer, pipe.vqvae, pipe.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipe([0, 1, 2, 3], guidance_scale=3.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(drawn, expected * 2 - 1)
    [first] = draw(arguments(num_validation_images=1), pipe.transformer, pipe.vqvae, pipe.scheduler)
    generators = [torch.Generator().manual_seed(0)]
    torch.testing.assert_close(first, pipe(0, generator=generators, output_type="pt").images * 2 - 1)


def test_pictures_of_an_unconditional_model():
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0))
    [drawn] = draw(arguments(), pipe.transformer, pipe.vqvae, pipe.scheduler)
    assert drawn.shape == (4, 3, 8, 8)
    assert not torch.equal(drawn[0], drawn[1])


def test_pictures_of_a_guidance_distilled_model_have_no_guidance():
    pipe = tiny_pipeline(transformer=tiny_transformer(guidance_distilled=True))
    [drawn] = draw(arguments(validation_guidance_scale=5.0), pipe.transformer, pipe.vqvae, pipe.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipe([0, 1, 2, 3], guidance_scale=1.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(drawn, expected * 2 - 1)
