"""Decoding in int8 against float32."""

import copy
import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import LATENT_CHANNELS, LIGHT_DECODER, tiny_pipeline, tiny_vqvae

from srdd import MultiScaleVQModel
from srdd.acceleration import decoder, int8_decoder
from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.acceleration.decoder import FLOAT32_ON_CPU, current_path
from srdd.acceleration.int8_decoder import CHUNK, Int8Conv2d, Int8UpsamplingConv2d, scale_and_zero_point, to_uint8


# Constructor overrides, and how many convolutions are quantized: all of residual blocks, and one between two levels.
MODELS = {
    "default": ({}, 13),
    "patches": ({"sample_size": 16, "patch_size": 2}, 13),
    "not-silu": ({"act_fn": "gelu"}, 13),
    "light": (LIGHT_DECODER, 9),
}

needs_vnni = pytest.mark.skipif(not MULTIPLIES_INT8, reason="needs oneDNN and a CPU with VNNI")


def random_latents(batch_size=3, seed=0) -> torch.Tensor:
    return torch.randn(batch_size, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))


def int8_vqvae(**overrides) -> MultiScaleVQModel:
    model = tiny_vqvae(**overrides)
    model.enable_int8_decoding(random_latents(8, seed=1))
    return model


def int8_conv(in_channels=12, out_channels=7, bias=True, kind=Int8Conv2d) -> Int8Conv2d | Int8UpsamplingConv2d:
    torch.manual_seed(0)
    conv = kind(in_channels, out_channels, 3, padding=1, bias=bias).eval()
    conv.input_bounds = (-0.3, 2.0)
    return conv


@pytest.fixture
def on_int8_path() -> Iterator[None]:
    """Layers on their own run as they do while a decoder decodes in float32 on a CPU."""
    entered = current_path.set(FLOAT32_ON_CPU)
    yield
    current_path.reset(entered)


def rounded(inputs, bounds) -> torch.Tensor:
    scale, zero_point = scale_and_zero_point(*bounds)
    return ((inputs / scale + zero_point + 0.5).floor().clamp(0, 255) - zero_point) * scale


def relative_error(sample, expected) -> float:
    return ((sample - expected).norm() / expected.norm()).item()


def num_int8(model) -> int:
    return sum(getattr(module, "input_bounds", None) is not None for module in model.modules())


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize(("overrides", "num_convolutions"), MODELS.values(), ids=MODELS.keys())
def test_pixels_are_close_to_those_of_float32(overrides, num_convolutions):
    model, latents = tiny_vqvae(**overrides), random_latents()
    expected, before = model.decode(latents).sample, latents.clone()
    model.enable_int8_decoding(random_latents(8, seed=1))
    assert num_int8(model) == num_int8(model.decoder) == num_convolutions
    sample = model.decode(latents).sample
    assert 1e-4 < relative_error(sample, expected) < 0.05
    assert sample.dtype == torch.float32
    assert sample.is_contiguous()
    assert torch.equal(latents, before)
    model.disable_int8_decoding()
    assert num_int8(model) == 0
    assert torch.equal(model.decode(latents).sample, expected)


@pytest.mark.parametrize(("low", "high"), [(-0.3, 2.0), (-3.0, 3.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0)])
def test_integers_spread_over_the_bounds_and_zero_is_exact(low, high):
    scale, zero_point = scale_and_zero_point(low, high)
    assert 0 <= zero_point <= 255
    low, high = min(low, 0.0), max(high, 0.0)
    numbers = torch.linspace(low, high, 2 * CHUNK + 3).view(1, 1, 1, -1)
    found = (to_uint8(numbers, scale, zero_point).float() - zero_point) * scale
    assert (found - numbers).abs().max() <= 1.001 * scale  # at the ends; half of it in between
    assert (found - numbers).abs().median() <= 0.5 * scale
    beyond = torch.tensor([-1e9, low - 1, 0.0, high + 1, 1e9]).view(1, 5, 1, 1)
    integers = to_uint8(beyond, scale, zero_point).flatten().tolist()
    assert integers[2] == zero_point
    if low < high:
        assert integers == [0, 0, zero_point, 255, 255]


@needs_vnni
@pytest.mark.usefixtures("on_int8_path")
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_that_of_the_rounded_numbers(bias, layout):
    conv, inputs = int8_conv(bias=bias), torch.randn(2, 12, 5, 6).contiguous(memory_format=layout)
    conv.weight[3] = 0
    weight_scales = conv.weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) / 127
    weight = (conv.weight / weight_scales).round() * weight_scales
    expected = F.conv2d(rounded(inputs, conv.input_bounds), weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(inputs), expected, atol=1e-5, rtol=0)


@needs_vnni
@pytest.mark.usefixtures("on_int8_path")
@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (6, 6)])
def test_up_sampling_is_merged_in_int8(size):
    conv, inputs = int8_conv(kind=Int8UpsamplingConv2d), torch.randn(2, 12, *size)
    expected = F.interpolate(rounded(inputs, conv.input_bounds), scale_factor=2.0, mode="nearest")
    expected = F.conv2d(expected, conv.weight, conv.bias, padding=1)
    assert relative_error(conv(inputs, upsample=True), expected) < 0.02  # the kernels' roundings


@needs_vnni
@pytest.mark.usefixtures("on_int8_path")
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    conv = int8_conv(64, 48)
    inputs = torch.randn(4, 64, 9, 7) * torch.tensor([1.0, 1e3, 1e-3, 0.0])[:, None, None, None]
    output = conv(inputs)
    assert torch.equal(output, torch.cat([conv(image) for image in inputs.split(1)]))
    assert torch.equal(output[3], conv.bias[:, None, None].expand(48, 9, 7))
    model, latents = int8_vqvae(), random_latents(4)
    alone = torch.cat([model.decode(image).sample for image in latents.split(1)])
    # Float32 layers may round another way in a batch, and a number between two integers then goes to the other.
    assert relative_error(model.decode(latents).sample, alone) < 0.01
    model.enable_slicing()
    assert torch.equal(model.decode(latents).sample, alone)


@needs_vnni
def test_float32_where_a_gradient_may_be_asked_for_and_in_training():
    model, plain, latents = int8_vqvae(), tiny_vqvae(), random_latents()
    for each in (model, plain):
        each.decode(latents).sample.square().sum().backward()
    for name, parameter in plain.decoder.named_parameters():
        assert torch.equal(model.decoder.get_parameter(name).grad, parameter.grad), name
    with torch.no_grad():
        assert torch.equal(model.train().decode(latents).sample, plain.train().decode(latents).sample)
        for each in (model, plain):
            each.eval().disable_fast_decoding()
        assert torch.equal(model.decode(latents).sample, plain.decode(latents).sample)
        model.enable_int8_decoding(latents)
        assert torch.equal(model.decode(latents).sample, plain.decode(latents).sample)
        model.enable_fast_decoding()
        assert not torch.equal(model.decode(latents).sample, plain.decode(latents).sample)


@needs_vnni
@torch.no_grad()
def test_float32_weights_serve_other_dtypes():
    latents = random_latents()
    expected = tiny_vqvae().to(torch.bfloat16).decode(latents).sample
    assert torch.equal(int8_vqvae().to(torch.bfloat16).decode(latents).sample, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_vqvae().decode(latents).sample, tiny_vqvae().decode(latents).sample)


@needs_vnni
@torch.no_grad()
def test_float32_weights_are_saved_and_bounds_are_not(tmp_path):
    model, plain, latents = int8_vqvae(), tiny_vqvae(), random_latents()
    model.decode(latents)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    again = MultiScaleVQModel.from_pretrained(tmp_path)
    assert num_int8(again) == 0
    assert torch.equal(again.decode(latents).sample, plain.decode(latents).sample)
    again.enable_int8_decoding(random_latents(8, seed=1))
    assert torch.equal(again.decode(latents).sample, model.decode(latents).sample)


@needs_vnni
@torch.no_grad()
def test_copies_decode_alike_on_their_own():
    model, latents = int8_vqvae(), random_latents()
    expected = model.decode(latents).sample
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.decode(latents).sample, expected)
        again.disable_int8_decoding()
    assert torch.equal(model.decode(latents).sample, expected)


@needs_vnni
@pytest.mark.usefixtures("on_int8_path")
@torch.no_grad()
def test_new_weights_count_at_once():
    conv, inputs = int8_conv(), torch.randn(1, 12, 5, 5)
    before = conv(inputs) - conv.bias[:, None, None]
    conv.weight.neg_()
    torch.testing.assert_close(conv(inputs) - conv.bias[:, None, None], -before, atol=1e-5, rtol=0)
    conv.weight.data = -conv.weight
    torch.testing.assert_close(conv(inputs) - conv.bias[:, None, None], before, atol=1e-5, rtol=0)
    conv.weight = nn.Parameter(-conv.weight)
    torch.testing.assert_close(conv(inputs) - conv.bias[:, None, None], -before, atol=1e-5, rtol=0)


@needs_vnni
def test_what_a_pipeline_draws_serves_as_examples():
    pipe, seed = tiny_pipeline(), torch.Generator().manual_seed
    expected = pipe([1, 2], generator=seed(0), output_type="pt").images
    pipe.vqvae.enable_int8_decoding(pipe("apple", num_images_per_prompt=8, output_type="latent").images)
    images = pipe([1, 2], generator=seed(0), output_type="pt").images
    assert 0 < relative_error(images, expected) < 0.05


@needs_vnni
def test_inference_mode():
    latents = random_latents()
    with torch.no_grad():
        expected = int8_vqvae().decode(latents).sample
    with torch.inference_mode():
        model = int8_vqvae()
        assert torch.equal(model.decode(latents).sample, expected)
    with torch.no_grad():
        assert torch.equal(model.decode(latents).sample, expected)


@needs_vnni
@torch.no_grad()
def test_adapters_are_not_left_out():
    latents = random_latents()
    config = LoraConfig(target_modules=["upsamplers.0.conv", "conv1"], init_lora_weights=False)
    for adapter_first in (True, False):
        model = tiny_vqvae() if adapter_first else int8_vqvae()
        torch.manual_seed(0)
        inject_adapter_in_model(config, model.decoder)
        model.eval()
        if adapter_first:
            expected = model.decode(latents).sample
            model.enable_int8_decoding(random_latents(8, seed=1))
        assert num_int8(model) == (6 if adapter_first else 13)
        assert relative_error(model.decode(latents).sample, expected) < 0.05
        model.disable_int8_decoding()
        assert torch.equal(model.decode(latents).sample, expected)


@needs_vnni
@pytest.mark.parametrize("shape", [(1, LATENT_CHANNELS, 4), (1, 3, 4, 4), (0, LATENT_CHANNELS, 4, 4)])
def test_latents_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`latents` must be of shape \(batch, 8, height, width\) on cpu, got \("):
        tiny_vqvae().enable_int8_decoding(torch.zeros(shape))


@needs_vnni
def test_what_cannot_be_quantized_is_refused():
    model = tiny_vqvae()
    with pytest.raises(ValueError, match="`latents` must be finite"):
        model.enable_int8_decoding(random_latents().div_(0.0))
    with pytest.raises(ValueError, match="on cpu, got .* on meta"):
        model.enable_int8_decoding(random_latents().to("meta"))
    assert num_int8(model) == 0
    with pytest.raises(ValueError, match="needs a decoder in torch.float32 on cpu, got torch.bfloat16 on cpu"):
        tiny_vqvae().to(torch.bfloat16).enable_int8_decoding(random_latents())


@torch.no_grad()
def test_cpus_without_vnni_are_refused_and_keep_float32(monkeypatch):
    model, latents = int8_vqvae() if MULTIPLIES_INT8 else tiny_vqvae(), random_latents()
    monkeypatch.setattr(decoder, "FLOAT32_ON_CPU", dataclasses.replace(FLOAT32_ON_CPU, int8=False))
    monkeypatch.setattr(int8_decoder, "MULTIPLIES_INT8", False)
    assert torch.equal(model.decode(latents).sample, tiny_vqvae().decode(latents).sample)
    with pytest.raises(ValueError, match="needs oneDNN and a CPU with VNNI"):
        model.enable_int8_decoding(latents)
