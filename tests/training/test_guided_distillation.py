"""What a student learns from, against the guided logits of one scale after the other."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    CODEBOOK_SIZE,
    ID2LABEL,
    tiny_history_transformer,
    tiny_scheduler,
    tiny_transformer,
    tiny_vqvae,
)

from srdd.models.guidance import guide
from srdd.training.guided_distillation import guided_distribution, guided_divergence


SCHEDULES = {"all scales": {}, "fewer scales": {"scales": [1, 4]}, "constant": {"guidance_schedule": "constant"}}


def make_batch(scheduler) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Five random pyramids and their labels, of which one is the null class."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(CODEBOOK_SIZE, (5, scheduler.num_tokens), generator=generator)
    labels = torch.randint(len(ID2LABEL), (5,), generator=generator)
    labels[1] = len(ID2LABEL)
    return token_ids, labels


@torch.no_grad()
@pytest.mark.parametrize("kind", ["markov", "causal", "banded", "history"])
@pytest.mark.parametrize("overrides", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 2.5])
def test_a_teachers_distribution_is_what_it_draws_from_scale_by_scale(kind, overrides, guidance_scale):
    vqvae, scheduler = tiny_vqvae(), tiny_scheduler(**overrides)
    teacher = tiny_history_transformer() if kind == "history" else tiny_transformer(kind)
    token_ids, labels = make_batch(scheduler)
    told = {"history_class_labels": labels} if kind == "history" else {}  # to both halves
    inputs = vqvae.teacher_forcing_inputs(token_ids, scheduler.scales)
    distribution = guided_distribution(teacher, inputs, labels, scheduler, guidance_scale)
    assert distribution.shape == (5, scheduler.num_tokens, CODEBOOK_SIZE)
    assert distribution.dtype == torch.float32

    first_state = torch.zeros(5, vqvae.config.latent_channels, *vqvae.config.scale_sizes[-1])
    states = [first_state, *vqvae.latent_states(token_ids, scheduler.scales)]
    hidden_states, timesteps = [], []
    for state, scale in zip(states, scheduler.visits):
        hidden_states.append(scheduler.scale_model_input(state, scale.timestep))
        timesteps.append(scale.timestep)
        conditional, unconditional = (
            teacher(torch.cat(hidden_states, dim=1), timesteps, classes, **told).sample[:, scale.tokens]
            for classes in (labels, None)
        )
        weight = scheduler.guidance_weight(scale.timestep, guidance_scale)
        expected = guide(conditional, unconditional, weight).log_softmax(dim=-1)
        torch.testing.assert_close(distribution[:, scale.tokens], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(distribution.exp().sum(dim=-1), torch.ones(5, scheduler.num_tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_guidance_grows_over_the_scales_and_spares_the_null_class():
    vqvae, teacher, scheduler = tiny_vqvae(), tiny_transformer(), tiny_scheduler()
    token_ids, labels = make_batch(scheduler)
    inputs = vqvae.teacher_forcing_inputs(token_ids)
    plain, guided = (guided_distribution(teacher, inputs, labels, scheduler, g) for g in (1.0, 4.0))
    coarsest, finest = scheduler.visits[0].tokens, scheduler.visits[-1].tokens
    torch.testing.assert_close(guided[:, coarsest], plain[:, coarsest], atol=1e-5, rtol=0)
    difference = (guided[:, finest] - plain[:, finest]).abs().amax(dim=(1, 2))
    assert difference[[0, 2, 3, 4]].min() > 0.1
    torch.testing.assert_close(guided[1], plain[1], atol=1e-5, rtol=0)


def test_the_divergence_is_that_of_the_teachers_distribution_and_trains_the_student_alone():
    vqvae, teacher, student, scheduler = tiny_vqvae(), tiny_transformer(), tiny_transformer(seed=7), tiny_scheduler()
    token_ids, labels = make_batch(scheduler)
    inputs = vqvae.teacher_forcing_inputs(token_ids).detach()
    logits = student(inputs, class_labels=labels).sample
    divergence = guided_divergence(logits, teacher, inputs, labels, scheduler, 3.0)
    with torch.no_grad():
        target = guided_distribution(teacher, inputs, labels, scheduler, 3.0)
        expected = (target.exp() * (target - F.log_softmax(logits, dim=-1))).sum(dim=-1).mean()
        own = guided_divergence(target, teacher, inputs, labels, scheduler, 3.0)
    torch.testing.assert_close(divergence.detach(), expected, atol=1e-5, rtol=0)
    assert own == pytest.approx(0, abs=1e-5)
    divergence.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.proj_out.weight.grad.abs().max() > 0
