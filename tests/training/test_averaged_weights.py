import copy

import pytest
import torch
from diffusers.training_utils import EMAModel

from srdd.training.averaged_weights import AveragedWeights, whole


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    return model


def change(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_averages_are_those_of_diffusers_bit_for_bit():
    model = make_model()
    ours = AveragedWeights(model.parameters(), decay=0.5)
    theirs = EMAModel(model.parameters(), decay=0.5, foreach=True)
    for step in range(12):
        change(model, step)
        ours.step(model.parameters())
        theirs.step(model.parameters())
        for left, right in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            assert torch.equal(left, right)
    assert ours.cur_decay_value == theirs.cur_decay_value == 0.5
    copies = make_model(1), make_model(1)
    ours.copy_to(copies[0].parameters())
    theirs.copy_to(copies[1].parameters())
    for left, right in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_averages_follow_the_formula():
    model = make_model()
    averages = AveragedWeights(model.parameters(), decay=0.4)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(1, 10):
        change(model, step)
        averages.step(model.parameters())
        decay = min(0.4, step / (9 + step)) if step > 1 else 0.0
        for mean, parameter in zip(expected, model.parameters()):
            kept = decay if parameter.requires_grad else 0.0  # what is not trained is not averaged either
            mean.mul_(kept).add_((1 - kept) * parameter.detach())
    for mean, shadow in zip(expected, averages.shadow_params):
        torch.testing.assert_close(shadow, mean, atol=1e-5, rtol=0)


def test_a_checkpoint_goes_on_exactly(tmp_path):
    model = make_model()
    averages = AveragedWeights(model.parameters(), decay=0.9)
    for step in range(3):
        change(model, step)
        averages.step(model.parameters())
    torch.save(averages.state_dict(), tmp_path / "averages.pt")
    again = AveragedWeights(make_model(1).parameters(), decay=0.1)
    before = again.shadow_params
    again.load_state_dict(torch.load(tmp_path / "averages.pt", weights_only=True))
    assert again.shadow_params is before  # other parts of a run hold on to these tensors
    assert again.decay == 0.9
    for _ in range(3):
        change(model, 7)
        averages.step(model.parameters())
        again.step(model.parameters())
        for left, right in zip(averages.shadow_params, again.shadow_params, strict=True):
            assert torch.equal(left, right)
    assert again.optimization_step == averages.optimization_step == 6


def test_frozen_parameters_are_their_own_averages(tmp_path):
    model, loaded = make_model(), make_model(1)
    averages, again = (AveragedWeights(each.parameters(), decay=0.9) for each in (model, loaded))
    for step in range(2):
        change(model, step)
        averages.step(model.parameters())
    torch.save(averages.state_dict(), tmp_path / "averages.pt")
    again.load_state_dict(torch.load(tmp_path / "averages.pt", weights_only=True))
    for each, shadows in ((model, averages.shadow_params), (loaded, again.shadow_params)):
        for parameter, shadow in zip(each.parameters(), shadows, strict=True):
            assert (shadow.data_ptr() == parameter.data_ptr()) is not parameter.requires_grad
    assert torch.equal(loaded[0].bias, model[0].bias)
    assert not torch.equal(loaded[0].weight, averages.shadow_params[0])
    before = model[0].bias.clone()
    change(loaded, 2)
    assert torch.equal(model[0].bias, before)


def test_a_loaded_state_is_a_copy():
    averages, again = (AveragedWeights(make_model(seed).parameters(), decay=0.9) for seed in range(2))
    again.load_state_dict(averages.state_dict())
    again.shadow_params[0].zero_()
    assert averages.shadow_params[0].abs().sum() > 0


def test_a_state_of_another_model_is_refused():
    averages = AveragedWeights(make_model().parameters(), decay=0.9)
    state = averages.state_dict()
    state["shadow_params"] = state["shadow_params"][:-1]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        averages.load_state_dict(state)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        AveragedWeights(make_model().parameters(), decay=0.9).copy_to([*make_model().parameters()][:-1])


def test_a_copy_has_the_averages_and_leaves_the_model_alone():
    model = make_model()
    averages = AveragedWeights(model.parameters(), decay=0.9)
    change(model, 0)
    trained = copy.deepcopy(model)
    target = make_model(3).requires_grad_(False)
    averages.copy_to(target.parameters())
    for parameter, shadow in zip(target.parameters(), averages.shadow_params):
        assert torch.equal(parameter, shadow)
        assert parameter is not shadow
    for left, right in zip(model.parameters(), trained.parameters()):
        assert torch.equal(left, right)


def test_a_tensor_that_is_not_sharded_is_whole():
    tensor = torch.randn(3)
    assert whole(tensor) is tensor
