"""Which attention a transformer is trained with, and that all give the same gradients. GPUs are only spoken of."""

import copy

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_transformer
from torch._dynamo.utils import counters

from srdd import ScaleTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.training import attention_choice
from srdd.training.attention_choice import (
    check_attention,
    compile_blocks,
    default_attention,
    has_compiler,
    set_attention,
)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_compiler():
    """Nothing compiled is left, and no limit raised."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1, optimize_ddp=True, fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device_type", "can_compile", "head_dim", "expected"),
    [
        ("cpu", False, 64, "per_scale"),
        ("cpu", True, 64, "per_scale"),
        ("cuda", True, 64, "flex"),
        ("cuda", True, 16, "flex"),
        ("cuda", True, 8, "mask"),
        ("cuda", False, 64, "mask"),
        ("mps", False, 64, "mask"),
    ],
)
def test_the_default_follows_the_device(device_type, can_compile, head_dim, expected):
    assert default_attention(device_type, can_compile, head_dim) == expected


@pytest.mark.parametrize(
    ("missing", "expected"), [(None, True), ("triton", False), ("gcc", False), ("Ampere", False), ("CC", True)]
)
def test_a_compiler_is_triton_with_a_c_compiler_for_a_gpu_that_is_not_too_old(monkeypatch, missing, expected):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    if missing == "CC":  # by another name
        monkeypatch.setenv("CC", "/usr/bin/tcc")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing == "triton" else name)
    monkeypatch.setattr("shutil.which", lambda name: None if name == "clang" or missing in ("gcc", "CC") else name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5) if missing == "Ampere" else (9, 0))
    assert has_compiler(GPU) is expected
    assert has_compiler(CPU) is False


@pytest.mark.parametrize("backend", [None, "mask", "per_scale", "native", "_native_flash"])
def test_what_can_be_trained_with(backend):
    check_attention(backend, CPU)


def test_what_cannot_be_trained_with_is_refused():
    check_attention("flex", GPU)
    with pytest.raises(ValueError, match="`--attention_backend` must be one that has gradients on a CPU, got 'flex'"):
        check_attention("flex", CPU)
    with pytest.raises(ValueError, match=r"must be one of \['flex', .*of diffusers' \[.*'native'.*got 'fast'"):
        check_attention("fast", GPU)


@pytest.mark.parametrize(
    ("backend", "device", "can_compile", "says"),
    [
        (None, CPU, True, "one call per scale (the default on cpu)"),
        (None, GPU, True, "FlexAttention, one call for all scales in compiled blocks (the default on cuda)"),
        (None, GPU, False, "one call for all scales under a dense mask (the default on cuda)"),
        ("mask", CPU, False, "one call for all scales under a dense mask (as `--attention_backend` says)"),
        ("per_scale", GPU, True, "one call per scale (as `--attention_backend` says)"),
        ("native", GPU, True, "native, one call per scale (as `--attention_backend` says)"),
    ],
)
def test_all_models_attend_as_is_said_in_one_line(monkeypatch, capsys, backend, device, can_compile, says):
    monkeypatch.setattr(attention_choice, "has_compiler", lambda _: can_compile)
    models = [tiny_transformer(attention_head_dim=16) for _ in range(2)]
    chosen = set_attention(models, backend, device)
    assert [line for line in capsys.readouterr().err.splitlines() if "Attention in" in line] == [
        f"Attention in training: {says}."
    ]
    for block in [block for model in models for block in model.blocks]:
        processor = MaskedScaleAttnProcessor if chosen in ("flex", "mask") else ScaleAttnProcessor
        assert type(block.attn.processor) is processor
        assert block.attn.processor._attention_backend == (chosen if chosen in ("flex", "native") else None)
        assert (block._compiled_call_impl is not None) is (chosen == "flex")
    # Other models keep their attention: that of flex has no gradients here.
    tiny_transformer()(torch.zeros(1, 21, 8)).sample.sum().backward()


def test_compiled_blocks_are_saved_as_others_and_not_copied():
    model = tiny_transformer()
    names = list(model.state_dict())
    compile_blocks([model], backend="eager")
    assert list(model.state_dict()) == names
    assert all(block._compiled_call_impl is None for block in copy.deepcopy(model).blocks)


def training_model(with_adapter: bool = False, **overrides) -> ScaleTransformer2DModel:
    torch.manual_seed(0)
    model = tiny_transformer(**overrides).train()
    if with_adapter:
        model.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        model.class_embed.requires_grad_(True)
    return model


def gradients(model: ScaleTransformer2DModel) -> dict[str, torch.Tensor]:
    """Of all that is trained, by a batch with dropped labels."""
    torch.manual_seed(1)
    inputs, labels = torch.randn(3, 21, 8).to(model.device), torch.tensor([0, 3, 4], device=model.device)
    model(inputs, class_labels=labels).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "checkpointing", "with_adapter"), [("causal", False, False), ("markov", True, True)]
)
def test_one_compiled_graph_under_a_mask_has_the_gradients_of_calls_per_scale(pattern, checkpointing, with_adapter):
    expected = gradients(training_model(with_adapter, attention_pattern=pattern))
    model = training_model(with_adapter, attention_pattern=pattern)
    set_attention([model], "mask", CPU)
    compile_blocks([model], backend="aot_eager", fullgraph=True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    for _ in range(2):
        model.zero_grad()
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert counters["stats"]["unique_graphs"] == 1


def test_stochastic_depth_makes_a_graph_for_every_block_and_no_more():
    model = training_model(num_layers=3, drop_path_rate=0.2)
    set_attention([model], "mask", CPU)
    compile_blocks([model], backend="eager", fullgraph=True)
    for _ in range(2):
        gradients(model)
    assert counters["stats"]["unique_graphs"] == 3


def test_every_schedule_has_its_graphs():
    model = training_model(num_layers=3, drop_path_rate=0.2, scale_sizes=[1, 2, 3, 4])
    set_attention([model], "mask", CPU)
    schedules = {(3, 2, 1, 0): 30, (3, 2, 0): 21, (3, 1, 0): 26, (3, 0): 17}
    compile_blocks([model], len(schedules), backend="eager", fullgraph=True)
    for _ in range(2):
        for timesteps, num_tokens in schedules.items():
            model(torch.randn(3, num_tokens, 8), timestep=timesteps).sample.sum().backward()
    assert counters["stats"]["unique_graphs"] == 3 * len(schedules)


@pytest.mark.cuda
@pytest.mark.parametrize("with_adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("pattern", ["markov", "causal"])
def test_what_a_gpu_trains_with_has_the_gradients_of_calls_per_scale(pattern, checkpointing, with_adapter):
    overrides = {"attention_pattern": pattern, "attention_head_dim": 16, "class_dropout_prob": 0.0}
    expected = gradients(training_model(with_adapter, **overrides).to(GPU))
    model = training_model(with_adapter, **overrides).to(GPU)
    assert set_attention([model], None, GPU) == ("flex" if has_compiler(GPU) else "mask")
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-2, rtol=1e-2, msg=name)
