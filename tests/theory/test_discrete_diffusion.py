import itertools
import math

import pytest
import torch
from tiny_models import tiny_transformer, tiny_vqvae

from srdd import ScaleScheduler
from srdd.models.quantizer_multiscale import MultiScaleQuantizer
from srdd.theory.__main__ import main
from srdd.theory.discrete_diffusion import (
    diffusion_bound,
    diffusion_log_joint,
    forward_entropy,
    forward_kernels,
    forward_marginals,
    reverse_kernels,
    verify_proposition_1,
)
from srdd.theory.pyramid_space import draw_weights, enumerate_pyramids, example_models, log_conditionals
from srdd.training.token_loss import token_loss


EXACT = 1e-10
SCALE_SIZES = [[1, 1], [1, 2], [2, 2]]
PATTERNS = ("causal", "markov", "banded")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def models(pattern: str = "markov", histories_meet: bool = True, seed: int = 0):
    """Example models with random weights, the transformer in float64."""
    vqvae, transformer = example_models(pattern, histories_meet, generator(seed))
    draw_weights(transformer, generator(seed + 1))
    return vqvae, transformer.double()


def random_data(num_pyramids: int = 128, seed: int = 0) -> torch.Tensor:
    weights = torch.empty(num_pyramids, dtype=torch.float64).exponential_(generator=generator(seed))
    return weights / weights.sum()


def data_without_meetings(space) -> torch.Tensor:
    """Random data on pyramids of which no two share a state unless they share all coarser ones."""
    predecessors, kept = {}, []
    for index, path in enumerate(space.state_ids.tolist()):
        steps = {(k, path[k]): tuple(path[:k]) for k in range(1, len(path))}
        if all(predecessors.get(state, coarser) == coarser for state, coarser in steps.items()):
            predecessors.update(steps)
            kept.append(index)
    data = torch.zeros(len(space.token_ids), dtype=torch.float64)
    data[kept] = random_data(len(kept))
    return data


def verify(pattern: str, histories_meet: bool = True, states: str = "latents", data: torch.Tensor | None = None):
    vqvae, transformer = example_models(pattern, histories_meet, generator())
    return verify_proposition_1(vqvae, transformer, data, states, num_models=4, generator=generator(1))


@pytest.mark.parametrize("histories_meet", [True, False])
def test_proposition_holds_for_the_markov_pattern(histories_meet):
    check = verify("markov", histories_meet)
    assert check.num_paths == check.num_pyramids == 128
    assert check.joint_difference < EXACT
    assert check.network_difference < EXACT
    assert check.gap_spread < EXACT
    assert check.gaps[0] == pytest.approx(-check.forward_entropy, abs=EXACT)
    assert (check.forward_entropy > 0.1) == histories_meet
    assert max(check.losses) - min(check.losses) > 0.1  # the models do differ


@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_proposition_fails_for_patterns_that_see_the_history_where_histories_meet(pattern):
    check = verify(pattern)
    assert check.joint_difference > 0.1
    assert check.network_difference > 0.1
    assert check.gap_spread > 0.01


@pytest.mark.parametrize(("histories_meet", "states"), [(False, "latents"), (True, "tokens")])
@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_proposition_holds_for_all_patterns_where_states_remember_the_history(pattern, histories_meet, states):
    check = verify(pattern, histories_meet, states)
    assert check.num_states == [1, 2, 8, 128]
    assert check.joint_difference < EXACT
    assert check.gap_spread < EXACT
    assert check.gaps[0] == pytest.approx(0, abs=EXACT)
    assert check.network_difference > 0.1  # though the network does not find the kernel in the state


def test_without_meetings_in_the_data_the_chain_is_deterministic_and_bound_and_loss_are_equal():
    space = enumerate_pyramids(models()[0])
    data = data_without_meetings(space)
    assert 30 < (data > 0).sum() < 128
    for kernel in forward_kernels(space, data):
        assert ((kernel == 0) | ((kernel - 1).abs() < EXACT)).all()
    check = verify("markov", data=data)
    assert check.num_states[2] == 7  # histories of the model do meet
    assert check.forward_entropy < EXACT
    assert check.gaps == pytest.approx([0] * 4, abs=EXACT)
    # The model's histories matter, not only the data's.
    assert verify("causal", data=data).gap_spread > 0.01


def test_equal_codes_break_the_bound_even_for_the_markov_pattern():
    vqvae, transformer = example_models("markov", True, generator())
    with torch.no_grad():
        vqvae.quantize.codebook.weight[1] = vqvae.quantize.codebook.weight[0]
    check = verify_proposition_1(vqvae, transformer, num_models=4, generator=generator(1))
    assert check.num_paths == 1
    assert check.joint_difference < EXACT
    assert check.gap_spread > 0.1


def test_pyramids_are_all_there_is_and_states_are_those_of_the_tokenizer():
    vqvae, _ = models()
    space = enumerate_pyramids(vqvae)
    assert space.scale_sizes == SCALE_SIZES
    assert space.token_ids.tolist() == [list(ids) for ids in itertools.product(range(2), repeat=7)]
    torch.testing.assert_close(space.inputs, vqvae.teacher_forcing_inputs(space.token_ids), atol=1e-5, rtol=0)
    assert not space.state_ids[:, 0].any()
    for column, latents in enumerate(vqvae.latent_states(space.token_ids), start=1):
        distances = (latents[:, None] - latents).abs().amax(dim=(2, 3, 4))
        same = space.state_ids[:, column, None] == space.state_ids[:, column]
        assert distances[same].max() < 1e-5
        if column < 3:  # the finest states may also differ by rounding alone
            assert distances[~same].min() > 1e-3
    # "code 0, then 1 everywhere" and "code 1, then 0 everywhere"
    one, other = [0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]
    rows = [space.token_ids.tolist().index(ids) for ids in (one, other)]
    assert space.state_ids[rows[0], 2] == space.state_ids[rows[1], 2]
    assert space.state_ids[rows[0], 1] != space.state_ids[rows[1], 1]


def test_histories_meet_in_the_tokenizer_of_var():
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    quantizer = MultiScaleQuantizer(5, 3, [[side, side] for side in sides])
    draw_weights(quantizer, generator())
    token_ids = torch.tensor([[2, 4, 4, 4, 4], [4, 2, 2, 2, 2], [4, 2, 2, 2, 4]])
    states = quantizer.latent_states(token_ids, [[1, 1], [2, 2]], (16, 16))
    torch.testing.assert_close(states[1][0], states[1][1], atol=1e-5, rtol=0)
    assert (states[0][0] - states[0][1]).abs().max() > 0.1
    assert (states[1][0] - states[1][2]).abs().max() > 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_conditionals_are_a_distribution_and_sum_to_the_training_loss(pattern):
    vqvae, transformer = models(pattern)
    space = enumerate_pyramids(vqvae)
    conditionals = log_conditionals(transformer, space)
    assert conditionals.dtype == torch.float64
    assert conditionals.sum(dim=1).exp().sum().item() == pytest.approx(1, abs=EXACT)
    # Given the coarse scales, a scale's token maps sum to 1.
    assert conditionals[:, 2].exp().view(8, 16).sum(dim=1).tolist() == pytest.approx([1] * 8, abs=EXACT)
    loss = token_loss(transformer(space.inputs.double()).sample, space.token_ids, SCALE_SIZES).loss
    assert -conditionals.sum(dim=1).mean().item() / 7 == pytest.approx(loss.item(), abs=1e-5)


def test_reverse_kernels_are_what_the_markov_network_predicts_in_a_state():
    vqvae, transformer = models()
    space = enumerate_pyramids(vqvae)
    kernels = reverse_kernels(space, log_conditionals(transformer, space).sum(dim=1).exp())
    scheduler = ScaleScheduler(scale_sizes=SCALE_SIZES)
    for kernel in kernels:
        assert kernel.sum(dim=1).tolist() == pytest.approx([1] * len(kernel), abs=EXACT)
    for row in (5, 77, 120):
        latents = [torch.zeros(1, 2, 2, 2), *vqvae.latent_states(space.token_ids[[row]])]
        for k, timestep in enumerate((2, 1, 0)):
            x = scheduler.scale_model_input(latents[k], timestep).double()
            log_probabilities = transformer(x, timestep).sample.log_softmax(dim=-1)
            tokens = space.token_ids[[row], scheduler.visit(timestep).tokens]
            expected = log_probabilities.gather(-1, tokens.unsqueeze(-1)).sum().exp().item()
            coarse, fine = space.state_ids[row, k : k + 2]
            # The network is fed what the tokenizer makes of the tokens in float32.
            assert kernels[timestep][coarse, fine].item() == pytest.approx(expected, rel=1e-4)


def test_bound_is_the_expected_log_ratio_of_forward_and_reverse_chain():
    """`L_v = E_q[log q(x_1 ... x_T | x_0) - log p(x_0 ... x_T)]`, summed over all paths of the chains."""
    vqvae, transformer = models("causal")
    space, data = enumerate_pyramids(vqvae), random_data()
    reverse = reverse_kernels(space, log_conditionals(transformer, space).sum(dim=1).exp())
    forward = [kernel.tolist() for kernel in forward_kernels(space, data)]
    expected = 0.0
    for x0, probability in enumerate(forward_marginals(space, data)[0].tolist()):
        for x1, x2 in itertools.product(range(7), range(2)):
            chain = forward[0][x0][x1] * forward[1][x1][x2] * forward[2][x2][0]
            if chain > 0:
                model = reverse[2][0, x2] * reverse[1][x2, x1] * reverse[0][x1, x0]
                expected += probability * chain * (math.log(chain) - model.log().item())
    bound = diffusion_bound(space, data, reverse)
    assert bound.total == pytest.approx(expected, abs=EXACT)
    assert len(bound.steps) == 2
    assert bound.prior == pytest.approx(0, abs=EXACT)
    # It bounds the likelihood of the final latents.
    weights = log_conditionals(transformer, space).sum(dim=1).exp()
    final = torch.zeros(space.num_states[-1], dtype=torch.float64).index_add(0, space.state_ids[:, -1], weights)
    assert bound.total > -(data * final[space.state_ids[:, -1]].log()).sum()


def test_joint_of_the_diffusion_is_that_of_its_paths():
    vqvae, transformer = models("causal")
    space = enumerate_pyramids(vqvae)
    kernels = reverse_kernels(space, log_conditionals(transformer, space).sum(dim=1).exp())
    joint = diffusion_log_joint(space, kernels)
    assert joint.exp().sum().item() == pytest.approx(1, abs=EXACT)
    start, coarse, middle, fine = space.state_ids[93]
    expected = kernels[2][start, coarse] * kernels[1][coarse, middle] * kernels[0][middle, fine]
    assert joint[93].item() == pytest.approx(expected.log().item(), abs=EXACT)


@pytest.mark.parametrize("meetings", [True, False])
def test_forward_marginals_are_those_of_add_noise(meetings):
    vqvae, _ = models()
    space = enumerate_pyramids(vqvae)
    data = random_data() if meetings else data_without_meetings(space)
    scheduler = ScaleScheduler(scale_sizes=SCALE_SIZES)
    marginals, kernels = forward_marginals(space, data), forward_kernels(space, data)
    latents = [torch.zeros(128, 2, 2, 2), *vqvae.latent_states(space.token_ids)]
    reached = data > 0
    given = torch.eye(space.num_states[-1], dtype=torch.float64)  # q(x_t | x_0)
    for timestep, kernel in enumerate(kernels):
        given = given @ kernel
        forgotten = scheduler.add_noise(space.token_ids, timesteps=timestep)
        kept = scheduler.scales[: 2 - timestep]
        expected, column = latents[0], space.state_ids[:, 2 - timestep]
        if kept:
            expected = vqvae.latent_states(forgotten[:, (forgotten >= 0).all(dim=0)], kept, (2, 2))[-1]
        # The state x_{t+1} is the one that the tokens left by add_noise lead to.
        state_of = dict(zip(column.tolist(), latents[2 - timestep]))
        for row, latent in zip(column.tolist(), expected):
            torch.testing.assert_close(state_of[row], latent, atol=1e-5, rtol=0)
        # q(x_{t+1}) is the data pushed through add_noise, q(x_{t+1} | x_0) allows what it leaves of each pyramid.
        pushed = torch.zeros_like(marginals[timestep + 1]).index_add(0, column, data)
        torch.testing.assert_close(marginals[timestep + 1], pushed, atol=EXACT, rtol=0)
        allowed = given[space.state_ids[:, -1], column][reached]
        assert allowed.min() > 0
        assert meetings or allowed.min() > 1 - EXACT
        torch.testing.assert_close(marginals[0] @ given, pushed, atol=EXACT, rtol=0)


def test_forward_entropy_is_that_of_the_path_given_its_end():
    space, data = enumerate_pyramids(models()[0]), random_data()
    states, expected = space.state_ids, 0.0
    for fine in (3, 2, 1):
        for state in states[:, fine].unique().tolist():
            here = states[:, fine] == state
            for coarse in states[here, fine - 1].unique().tolist():
                pair = data[here & (states[:, fine - 1] == coarse)].sum().item()
                expected -= pair * math.log(pair / data[here].sum().item())
    assert forward_entropy(space, data) == pytest.approx(expected, abs=EXACT)
    assert expected > 0.1


def test_check_leaves_the_transformer_and_the_global_generator_alone():
    vqvae, transformer = example_models(generator=generator())
    before, state = transformer.proj_in.weight.clone(), torch.random.get_rng_state()
    checks = [verify_proposition_1(vqvae, transformer, num_models=2, generator=generator(3)) for _ in range(2)]
    assert checks[0] == checks[1]
    assert torch.equal(transformer.proj_in.weight, before)
    assert transformer.dtype == vqvae.dtype == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)


def test_errors():
    vqvae, transformer = example_models(generator=generator())
    with pytest.raises(ValueError, match=r"`vqvae` must have at most 4096 pyramids, got 32\*\*21"):
        enumerate_pyramids(tiny_vqvae())
    with pytest.raises(ValueError, match="`states` must be one of .*'latents', 'tokens'.*, got 'pixels'"):
        verify_proposition_1(vqvae, transformer, states="pixels")
    with pytest.raises(ValueError, match="`num_models` must be at least 1, got 0"):
        verify_proposition_1(vqvae, transformer, num_models=0)
    with pytest.raises(ValueError, match="must have the same latent grid"):
        verify_proposition_1(vqvae, tiny_transformer())
    negative = torch.full((128,), 2 / 128)
    negative[:64] = 0
    negative[0], negative[1] = 1, -1
    for data in (torch.ones(128), torch.full((64,), 1 / 64), negative, torch.full((128,), math.nan)):
        with pytest.raises(ValueError, match="`data` must be 128 numbers, none negative, that sum to 1, got shape"):
            verify_proposition_1(vqvae, transformer, data)


def test_report_has_a_row_for_every_pattern_and_chain(capsys):
    main(["--num-models", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, rows = rows[0], rows[1:]
    assert [row[0].strip("| ") for row in rows] == list(PATTERNS) * 3
    joints = [float(row[header.index("joints")]) for row in rows]
    assert [difference < EXACT for difference in joints] == [False, True, False] + [True] * 6
    assert [row[header.index("histories that meet")] for row in rows] == ["1"] * 3 + ["0"] * 6
    with pytest.raises(SystemExit):
        main(["--num-models", "0"])
