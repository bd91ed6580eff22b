"""Linear layers by oneDNN's kernels against torch's and torchao's own."""

import contextlib
import copy
import gc
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from diffusers.models.activations import GELU
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import LATENT_CHANNELS, tiny_pipeline, tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from srdd import ScaleTransformer2DModel, SRDDPipeline
from srdd.acceleration import accelerate, cpu, linear_layers, set_fast_linears
from srdd.acceleration.linear_layers import FastGELU, FastLinear, packed_weight


FLOAT32, INT8 = "mkldnn._linear_pointwise.default", "onednn.qlinear_pointwise.default"
NUM_LINEARS = 17  # of the tiny transformer

ZEN_5 = {"cpu_name": "AMD EPYC 9575F", "avx512_f": True, "avx512_vnni": True, "avx_vnni": True}
ZEN_4 = {**ZEN_5, "cpu_name": "AMD EPYC 9454", "avx_vnni": False}
SAPPHIRE_RAPIDS = {**ZEN_5, "cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "amx_int8": True}
ZEN_3 = {**ZEN_4, "cpu_name": "AMD EPYC 7713", "avx512_f": False, "avx512_vnni": False}
HASWELL = {"cpu_name": "Intel(R) Core(TM) i7-4770", "avx512_f": False, "avx512_vnni": False, "avx_vnni": False}

pytestmark = pytest.mark.skipif(
    not cpu.CAPABILITIES.get("avx2"),
    reason="needs oneDNN, and torch to know the CPU",
)


class Operators(TorchDispatchMode):
    """How often every operator ran."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] = self.counts.get(str(function), 0) + 1
        return function(*args, **(kwargs or {}))


def count(name, function, *args) -> int:
    with Operators() as operators:
        function(*args)
    return operators.counts.get(name, 0)


def random_inputs(batch_size=3, seed=0) -> tuple[torch.Tensor, None, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 21, LATENT_CHANNELS, generator=generator), None, torch.arange(batch_size)


def logits_of(model, *, fast: bool, inputs=None) -> torch.Tensor:
    (model.enable_fast_linears if fast else model.disable_fast_linears)()
    with torch.no_grad():
        return model(*(inputs or random_inputs())).sample


def fast_layer(in_features=12, out_features=7, bias=True) -> FastLinear:
    torch.manual_seed(0)
    layer = FastLinear(in_features, out_features, bias=bias)
    layer.fast = True
    return layer


@pytest.mark.parametrize("pattern", ["markov", "causal"])
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln", "shared_adaln"])
def test_logits_are_those_of_torch(pattern, shared_adaln):
    model = tiny_transformer(pattern, shared_adaln=shared_adaln)
    expected = logits_of(model, fast=False)
    torch.testing.assert_close(logits_of(model, fast=True), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_linear_layer_takes_part_and_can_be_told_not_to():
    model = tiny_transformer()
    model.enable_fast_linears()
    assert count(FLOAT32, model, *random_inputs()) == NUM_LINEARS
    assert count("aten.gelu.default", model, *random_inputs()) == 0
    model.disable_fast_linears()
    assert count(FLOAT32, model, *random_inputs()) == 0


@pytest.mark.parametrize(
    ("capabilities", "slow"), [(ZEN_5, True), (ZEN_4, True), (ZEN_3, False), (SAPPHIRE_RAPIDS, False), ({}, False)]
)
def test_mkl_is_slow_on_cpus_of_amd_with_avx_512(capabilities, slow):
    assert cpu.mkl_is_slow(capabilities) == (slow and torch.backends.mkl.is_available())


@pytest.mark.parametrize(
    ("capabilities", "able"), [(ZEN_4, True), (SAPPHIRE_RAPIDS, True), (HASWELL, False), ({}, False)]
)
def test_int8_wants_vnni(capabilities, able):
    assert cpu.multiplies_int8(capabilities) == able


@torch.no_grad()
@pytest.mark.parametrize("mkl_is_slow", [True, False])
def test_the_cpu_decides_by_default(monkeypatch, mkl_is_slow):
    monkeypatch.setattr(linear_layers, "MKL_IS_SLOW", mkl_is_slow)
    assert count(FLOAT32, tiny_transformer(), *random_inputs()) == (NUM_LINEARS if mkl_is_slow else 0)


INPUTS = {
    "matrix": torch.randn(3, 12),
    "vector": torch.randn(12),
    "batch": torch.randn(2, 3, 12),
    "four": torch.randn(2, 3, 4, 12),
    "empty": torch.randn(2, 0, 12),
    "transposed": torch.randn(12, 5).t(),
    "slice": torch.randn(2, 6, 12)[:, 1:4],
    "expanded": torch.randn(1, 1, 12).expand(2, 5, 12),
    "not-a-number": torch.full((2, 12), torch.nan),
}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_inputs_of_all_shapes(inputs, bias):
    layer = fast_layer(bias=bias)
    expected = F.linear(inputs, layer.weight, layer.bias)
    assert count(FLOAT32, layer, inputs) == 1
    torch.testing.assert_close(layer(inputs), expected, atol=1e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(
        layer(inputs, tanh_gelu=True), F.gelu(expected, approximate="tanh"), atol=1e-6, rtol=0, equal_nan=True
    )


@torch.no_grad()
def test_weights_of_all_strides():
    inputs = torch.randn(5, 12)
    for weight in (torch.randn(12, 7).t(), torch.randn(7, 24)[:, ::2], torch.randn(7, 24)[:, 3:15]):
        layer = fast_layer()
        layer.weight = nn.Parameter(weight)
        torch.testing.assert_close(layer(inputs), F.linear(inputs, weight, layer.bias), atol=1e-5, rtol=0)


def test_torch_computes_where_a_gradient_may_be_asked_for():
    model, inputs = tiny_transformer(), random_inputs()
    plain = copy.deepcopy(model)
    model.enable_fast_linears()
    plain.disable_fast_linears()
    for each in (model, plain):
        each(*inputs).sample.square().sum().backward()
    for parameter, expected in zip(model.parameters(), plain.parameters()):
        assert torch.equal(parameter.grad, expected.grad)


@torch.no_grad()
@pytest.mark.parametrize("case", ["float16", "float64", "meta", "subclass", "off", "autocast", "gradients"])
def test_torch_computes_all_else(case):
    layer, inputs, other = fast_layer(), torch.randn(3, 12), contextlib.nullcontext()
    assert count(FLOAT32, layer, inputs) == 1
    if case == "autocast":
        other = torch.autocast("cpu", torch.bfloat16)
    elif case == "gradients":
        other = torch.enable_grad()
    elif case == "off":
        layer.fast = False
    elif case == "meta":
        layer, inputs = layer.to("meta"), inputs.to("meta")
    elif case == "subclass":
        inputs = inputs.as_subclass(type("Subclass", (torch.Tensor,), {}))
    else:
        layer, inputs = layer.to(getattr(torch, case)), inputs.to(getattr(torch, case))
    with other:
        assert count(FLOAT32, layer, inputs) == 0


@torch.no_grad()
def test_a_layer_that_is_cast_or_moved_changes_its_kernel_at_once():
    layer, inputs = fast_layer(), torch.randn(3, 12)
    expected = layer(inputs)
    for change in (nn.Module.half, nn.Module.double, lambda module: module.to("meta")):
        other = change(copy.deepcopy(layer))
        other_inputs = inputs.to(other.weight.device, other.weight.dtype)
        assert count(FLOAT32, other, other_inputs) == 0
        assert other(other_inputs).dtype == other.weight.dtype
    layer.double().float()
    assert count(FLOAT32, layer, inputs) == 1
    assert torch.equal(layer(inputs), expected)
    with pytest.raises(RuntimeError, match="dtype"):
        layer.half()(inputs)


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_a_call_of_a_layer_is_one_function_of_ours(fast):
    layer, inputs, functions = fast_layer(), torch.randn(3, 12), []
    layer.fast = fast

    def note(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent.name == "acceleration":
            functions.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        layer(inputs)
    finally:
        sys.setprofile(None)
    assert functions == ["forward"]


@torch.no_grad()
def test_compiled_code_holds_operators_of_torch():
    layer, inputs, graphs = nn.Sequential(fast_layer()), torch.randn(3, 12), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(inputs), layer(inputs), atol=1e-6, rtol=0)
    assert len(graphs) == 1
    assert "_linear_pointwise" not in graphs[0]


@torch.no_grad()
def test_new_weights_count_at_once():
    model = tiny_transformer()
    before = logits_of(model, fast=True)
    other = tiny_transformer(seed=7)
    expected = logits_of(other, fast=True)
    assert not torch.equal(before, expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(model, fast=True), expected)
    model.blocks[1].ff.net[2].weight.data.neg_()  # what no version counter sees
    other.blocks[1].ff.net[2].weight = nn.Parameter(-other.blocks[1].ff.net[2].weight)
    changed = logits_of(other, fast=True)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits_of(model, fast=True), changed)


def test_parameters_keep_names_and_modules_can_be_copied():
    model = tiny_transformer()
    expected = logits_of(model, fast=True)
    assert "blocks.0.ff.net.0.proj.weight" in model.state_dict()
    assert len(model.state_dict()) == len(list(model.parameters()))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(again, fast=True), expected)


@torch.no_grad()
def test_hooks_and_adapters_see_what_comes_before_the_activation():
    inputs, seen = torch.randn(3, 12), []
    gelu = nn.Sequential(GELU(12, 7, approximate="tanh"))
    expected = gelu(inputs)
    accelerate(gelu)
    set_fast_linears(gelu, True)
    assert type(gelu[0]) is FastGELU
    assert type(gelu[0].proj) is FastLinear
    assert count(FLOAT32, gelu, inputs) == 1
    handle = gelu[0].proj.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(gelu(inputs), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[0], F.linear(inputs, gelu[0].proj.weight, gelu[0].proj.bias), atol=1e-6, rtol=0)
    handle.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), gelu)
    adapter = gelu[0].proj
    difference = adapter.lora_B["default"](adapter.lora_A["default"](inputs)) * adapter.scaling["default"]
    before = F.linear(inputs, adapter.base_layer.weight, adapter.base_layer.bias) + difference
    torch.testing.assert_close(gelu(inputs), F.gelu(before, approximate="tanh"), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_exact_gelu_stays_exact():
    inputs, gelu = torch.randn(3, 12), nn.Sequential(GELU(12, 7))
    expected = gelu(inputs)
    accelerate(gelu)
    set_fast_linears(gelu, True)
    torch.testing.assert_close(gelu(inputs), expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_fused_projections_do_as_the_others(fast):
    model, inputs = tiny_transformer(), random_inputs()
    expected = logits_of(model, fast=fast)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-5, rtol=0)
    assert count(FLOAT32, model, *inputs) == (NUM_LINEARS - 4 if fast else 0)


# What follows is about torchao's weights.


@pytest.fixture
def torchao():
    torchao = pytest.importorskip("torchao.quantization")
    if not cpu.MULTIPLIES_INT8:
        pytest.skip("needs a CPU with VNNI")
    return torchao


@pytest.fixture
def config(torchao):
    return TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    return tmp_path


def load(folder, config) -> ScaleTransformer2DModel:
    return ScaleTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=config, dtype=torch.float32
    )


def relative_error(logits, expected) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(INPUTS) - {"vector", "empty"}))  # at which torchao's own code fails
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_int8_is_what_torchao_computes(config, torchao, name, bias, dtype):
    model, inputs = nn.Sequential(fast_layer(bias=bias)).to(dtype), INPUTS[name].to(dtype)
    torchao.quantize_(model, config.quant_type)
    assert count(INT8, model, inputs) == 1
    output = model(inputs)
    model[0].fast = False
    assert count(INT8, model, inputs) == 0
    assert output.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output, model(inputs), atol=atol, rtol=atol, equal_nan=True)


@torch.no_grad()
def test_int8_of_an_image_does_not_depend_on_its_batch(config, torchao):
    model = nn.Sequential(fast_layer(64, 48))
    torchao.quantize_(model, config.quant_type)
    inputs = torch.randn(4, 5, 64) * torch.tensor([1.0, 1e3, 1e-3, 0.0])[:, None, None]
    alone = torch.cat([model(image) for image in inputs.split(1)])
    assert torch.equal(model(inputs), alone)
    assert torch.equal(alone[3], model[0].bias.expand(5, 48))
    rows = F.linear(inputs, fast_layer(64, 48).weight)
    for image in range(3):
        assert relative_error(alone[image] - model[0].bias, rows[image]) < 0.02


@torch.no_grad()
def test_a_quantized_model_loads_draws_and_is_saved(config, folder, tmp_path):
    expected = logits_of(ScaleTransformer2DModel.from_pretrained(folder, subfolder="transformer"), fast=False)
    model = load(folder, config)
    assert count(INT8, model, *random_inputs()) == NUM_LINEARS
    logits = logits_of(model, fast=True)
    assert 1e-3 < relative_error(logits, expected) < 0.03
    # One rounding that goes the other way makes a difference to all layers after it.
    assert relative_error(logits_of(model, fast=False), logits) < 0.01
    model.save_pretrained(tmp_path / "int8")
    again = ScaleTransformer2DModel.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    assert torch.equal(logits_of(again, fast=True), logits)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = SRDDPipeline.from_pretrained(folder, quantization_config=mapping, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert count(INT8, pipe.transformer, *random_inputs()) == NUM_LINEARS
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


@torch.no_grad()
def test_modules_can_be_left_in_float(torchao, folder):
    quant_type = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    model = load(folder, TorchAoConfig(quant_type, modules_to_not_convert=["proj_in", "proj_out"]))
    model.enable_fast_linears()
    assert count(INT8, model, *random_inputs()) == NUM_LINEARS - 2
    assert count(FLOAT32, model, *random_inputs()) == 2


@torch.no_grad()
def test_nothing_is_left_of_int8_weights_after_dequantization(config, folder):
    model = load(folder, config)
    logits = logits_of(model, fast=True)
    assert model.proj_out.weight.qdata in linear_layers._packed_weights
    gc.collect()
    held = len(linear_layers._packed_weights)
    model.dequantize()
    gc.collect()
    assert len(linear_layers._packed_weights) == held - NUM_LINEARS
    assert 1e-4 < relative_error(logits_of(model, fast=True), logits) < 0.03


@torch.no_grad()
def test_new_int8_weights_count_at_once(config, torchao):
    model, other = tiny_transformer(), tiny_transformer(seed=7)
    for each in (model, other):
        torchao.quantize_(each, config.quant_type)
    expected = logits_of(other, fast=True)
    assert not torch.equal(logits_of(model, fast=True), expected)
    packed = packed_weight(model.proj_out.weight)
    assert packed_weight(model.proj_out.weight) is packed
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(model, fast=True), expected)


def test_a_quantized_model_can_be_copied_and_cast(config, torchao):
    model = tiny_transformer()
    torchao.quantize_(model, config.quant_type)
    expected = logits_of(model, fast=True)
    assert torch.equal(logits_of(copy.deepcopy(model), fast=True), expected)
    model.to(torch.float32).to("cpu")  # torch exchanges the weights for others
    assert torch.equal(logits_of(model, fast=True), expected)
    inputs, _, labels = random_inputs()
    again = logits_of(model.to(torch.bfloat16), fast=True, inputs=(inputs.bfloat16(), None, labels))
    assert again.dtype == torch.bfloat16
    assert relative_error(again.float(), expected) < 0.03


def test_a_model_can_be_quantized_in_inference_mode(config, torchao):
    model = tiny_transformer()
    with torch.inference_mode():
        torchao.quantize_(model, config.quant_type)
        logits = logits_of(model, fast=True)
        assert torch.equal(logits_of(model, fast=True), logits)
    assert torch.equal(logits_of(model, fast=True), logits)


@torch.no_grad()
def test_other_kinds_of_weights_are_torchaos_business(torchao):
    symmetric = torchao.Int8DynamicActivationInt8WeightConfig
    for quant_type in (
        torchao.Int8WeightOnlyConfig(set_inductor_config=False),
        symmetric(set_inductor_config=False, granularity=torchao.PerTensor()),
        symmetric(set_inductor_config=False, granularity=[torchao.PerTensor(), torchao.PerRow()]),
        symmetric(set_inductor_config=False, act_mapping_type=torchao.MappingType.ASYMMETRIC),
        symmetric(set_inductor_config=False, reduce_range=True),
    ):
        model = nn.Sequential(fast_layer())
        torchao.quantize_(model, quant_type)
        assert type(model[0].weight).__name__ == "Int8Tensor"
        assert packed_weight(model[0].weight) is None
        assert model(torch.randn(3, 12)).shape == (3, 7)


@torch.no_grad()
def test_torchao_computes_on_cpus_without_vnni(monkeypatch, config, torchao):
    monkeypatch.setattr(linear_layers, "MULTIPLIES_INT8", False)
    model = nn.Sequential(fast_layer())
    torchao.quantize_(model, config.quant_type)
    assert count(INT8, model, torch.randn(3, 12)) == 0


@torch.no_grad()
def test_integers_with_other_rules_for_activations_are_looked_at_again(config, torchao):
    model = nn.Sequential(fast_layer())
    torchao.quantize_(model, config.quant_type)
    assert packed_weight(model[0].weight) is not None
    rules = model[0].weight.act_quant_kwargs
    model[0].weight.act_quant_kwargs = None
    assert packed_weight(model[0].weight) is None
    model[0].weight.act_quant_kwargs = rules
    assert packed_weight(model[0].weight) is not None
