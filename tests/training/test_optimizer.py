"""What is trained, how fast and how much of it decays."""

import pytest
import torch
from tiny_models import tiny_transformer

from srdd.training.optimizer import is_fused, learning_rate, make_optimizer, parameter_groups, place_step_counts
from srdd.training.settings import LR_SCHEDULERS, OptimizationSettings


@pytest.mark.parametrize(
    ("options", "num_processes", "expected"),
    [
        ({}, 1, 2e-4),
        ({}, 8, 2e-4),
        ({"scale_lr": True, "train_batch_size": 256}, 1, 2e-4),
        ({"scale_lr": True, "train_batch_size": 64, "gradient_accumulation_steps": 3}, 8, 12e-4),
        ({"scale_lr": True, "train_batch_size": 32}, 1, 0.25e-4),
    ],
)
def test_the_learning_rate_follows_the_images_of_a_step_if_asked_to(options, num_processes, expected):
    settings = OptimizationSettings(learning_rate=2e-4, lr_scheduler="constant", lr_warmup_steps=0, **options)
    assert learning_rate(settings, num_processes) == pytest.approx(expected)
    optimizer, _ = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))], num_processes)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_optimizer_and_schedule_follow_the_settings():
    settings = OptimizationSettings(
        adam_beta1=0.5,
        adam_beta2=0.6,
        adam_weight_decay=0.7,
        adam_epsilon=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=2,
        max_train_steps=6,
        learning_rate=1.0,
    )
    optimizer, schedule = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))])
    [group] = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.7, 1e-3)
    rates = []
    for _ in range(7):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_schedule_needs_the_settings_alone(name):
    settings = OptimizationSettings(lr_scheduler=name, lr_warmup_steps=1, max_train_steps=4)
    optimizer, schedule = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))])
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert 0 <= schedule.get_last_lr()[0] <= settings.learning_rate


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


def test_adamw_is_fused_on_cuda_alone():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for device, fused in (("cuda", True), ("cuda:1", True), ("cpu", None), ("mps", None)):
        assert is_fused(torch.device(device)) is fused
        optimizer, _ = make_optimizer(OptimizationSettings(), parameters, device=torch.device(device))
        assert optimizer.defaults["fused"] is fused


@pytest.mark.parametrize(("fused", "there"), [(True, "meta"), (None, "cpu")])
def test_step_counts_are_where_the_optimizer_wants_them(fused, there):
    # As if "meta" was a GPU, and the state from a checkpoint of a version that did not fuse.
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    [parameter] = optimizer.param_groups[0]["params"]
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    optimizer.param_groups[0]["fused"] = fused
    place_step_counts(optimizer)
    assert optimizer.state[parameter]["step"].device.type == there
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


@pytest.mark.cuda
def test_fused_steps_on_cuda_are_those_of_the_cpu():
    weights = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(5, 3).to(device))]
        settings = OptimizationSettings(lr_warmup_steps=0)
        optimizer, _ = make_optimizer(settings, parameters, device=torch.device(device))
        for _ in range(3):
            parameters[0].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(parameters[0].detach().cpu())
    torch.testing.assert_close(*weights)
