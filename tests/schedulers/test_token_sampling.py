import math

import numpy as np
import pytest
import torch
from diffusers.utils import is_torch_version
from scipy.stats import chisquare

from srdd.schedulers.token_sampling import CPU_PART, candidate_probabilities, exponential_noise, sample_tokens


CODEBOOK_SIZE = 50


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def plain_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """VAR's rule for one position, in float64: two removals from sorted logits, then a softmax of what is left."""
    scores = logits.astype(np.float64) / temperature
    if top_k > 0:
        scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
    if top_p < 1:
        ascending = np.argsort(scores, kind="stable")
        removed = np.cumsum(plain_softmax(scores[ascending])) <= 1 - top_p
        removed[-1] = False
        scores[ascending[removed]] = -np.inf
    return plain_softmax(scores)


def distribution(logits: torch.Tensor, **arguments) -> torch.Tensor:
    """`candidate_probabilities`, normalised and put back in the order of the codebook."""
    probabilities, token_ids = candidate_probabilities(logits, **arguments)
    assert probabilities.dtype == torch.float32
    assert (probabilities.sum(dim=-1) <= 1 + 1e-5).all()
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if token_ids is None:
        return probabilities
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, token_ids, probabilities)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.96, 0.5, 0.05, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 7, CODEBOOK_SIZE - 1, CODEBOOK_SIZE, CODEBOOK_SIZE + 9])
def test_candidates_are_those_of_vars_rule(top_k, top_p, temperature):
    logits = random_logits(4, 5, CODEBOOK_SIZE)
    arguments = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = distribution(logits, **arguments).view(-1, CODEBOOK_SIZE)
    for row, position in zip(logits.view(-1, CODEBOOK_SIZE).numpy(), found.numpy()):
        expected = plain_distribution(row, **arguments)
        np.testing.assert_array_equal(position > 0, expected > 0)
        np.testing.assert_allclose(position, expected, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.6, 0.9])
def test_ties_keep_as_many_candidates_as_vars_rule(top_p):
    # Which of several equal tokens stay is up to the order of the sort.
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0]).log_softmax(dim=-1).view(1, 1, -1)
    found = distribution(logits, top_p=top_p).flatten()
    expected = plain_distribution(logits.flatten().numpy(), 1.0, 0, top_p)
    np.testing.assert_allclose(np.sort(found.numpy()), np.sort(expected), atol=1e-5)


def test_top_k_keeps_exactly_k_of_equal_tokens():
    assert (distribution(torch.zeros(2, 3, 10), top_k=4) > 0).sum(dim=-1).eq(4).all()


@pytest.mark.parametrize("top_p", [1e-30, 1e-3])
def test_the_best_candidate_always_stays(top_p):
    logits = random_logits(3, 4, CODEBOOK_SIZE)
    drawn = sample_tokens(logits, top_p=top_p, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, logits.argmax(dim=-1))


@pytest.mark.parametrize("arguments", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}])
@pytest.mark.parametrize("per_image", [False, True], ids=["one-generator", "generator-per-image"])
def test_tokens_are_drawn_as_often_as_their_probability_says(arguments, per_image):
    row, draws = random_logits(10, seed=3), 20_000
    batch = 4 if per_image else 1
    generator = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    logits = row.expand(batch, draws // batch, 10)
    drawn = sample_tokens(logits, temperature=1.5, generator=generator if per_image else generator[0], **arguments)
    expected = plain_distribution(row.numpy(), 1.5, arguments.get("top_k", 0), arguments.get("top_p", 1.0))
    counts = np.bincount(drawn.flatten().numpy(), minlength=10)
    assert not counts[expected == 0].any()
    assert chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-3


def test_temperature_zero_takes_the_most_probable_token():
    logits = random_logits(2, 5, CODEBOOK_SIZE)
    assert torch.equal(sample_tokens(logits, temperature=0.0, top_k=3, top_p=0.5), logits.argmax(dim=-1))


def test_low_temperature_approaches_the_most_probable_token():
    logits = random_logits(2, 5, CODEBOOK_SIZE)
    drawn = sample_tokens(logits, temperature=1e-3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, logits.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_treated_in_float32(dtype):
    logits = random_logits(2, 5, CODEBOOK_SIZE).to(dtype)
    drawn = [sample_tokens(x, 1.0, 9, 0.9, torch.Generator().manual_seed(0)) for x in (logits, logits.float())]
    assert torch.equal(*drawn)


def test_one_generator_gives_the_same_tokens_again():
    logits = random_logits(2, 5, CODEBOOK_SIZE)
    first, second, other = (sample_tokens(logits, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("arguments", [{}, {"top_k": 9}, {"top_k": 9, "top_p": 0.7}])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(arguments):
    logits = random_logits(3, 6, CODEBOOK_SIZE)
    together = sample_tokens(logits, generator=[torch.Generator().manual_seed(s) for s in (5, 6, 7)], **arguments)
    for index, seed in enumerate((5, 6, 7)):
        alone = [torch.Generator().manual_seed(seed)]
        assert torch.equal(sample_tokens(logits[index : index + 1], generator=alone, **arguments)[0], together[index])


def test_generators_of_images_that_are_not_wanted_stand_still():
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    states = [generator.get_state() for generator in generators]
    image_mask = torch.tensor([True, False, True])
    noise = exponential_noise((3, 4, 5), generators, torch.device("cpu"), image_mask)
    moved = [not torch.equal(generator.get_state(), state) for generator, state in zip(generators, states)]
    assert moved == image_mask.tolist()
    whole = exponential_noise(
        (3, 4, 5), [torch.Generator().manual_seed(seed) for seed in range(3)], torch.device("cpu")
    )
    assert torch.equal(noise[image_mask], whole[image_mask])


@pytest.mark.parametrize("own", [False, True])
def test_noise_on_a_cpu_is_what_torch_draws(own):
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(2 if own else 1)]

    shape = (2, 3, CPU_PART // 2 + 5)
    noise = exponential_noise(shape, generators() if own else generators()[0], torch.device("cpu"))
    wanted = shape[1:] if own else shape
    expected = [torch.rand(wanted, dtype=torch.float64, generator=each).neg().log1p().neg() for each in generators()]
    assert torch.equal(noise, torch.stack(expected).view(shape).float())
    if is_torch_version(">=", "2.8"):
        expected = [torch.empty(wanted).exponential_(generator=each) for each in generators()]
        assert torch.equal(noise, torch.stack(expected).view(shape))


def test_noise_is_exponential():
    noise = exponential_noise((1, 50_000), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert noise.min() > 0
    assert noise.mean().item() == pytest.approx(1.0, abs=4 / math.sqrt(50_000))
    assert (noise > 2).float().mean().item() == pytest.approx(math.exp(-2), abs=0.01)
