import contextlib
import copy
import dataclasses
import shutil
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, init_empty_weights
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from live_memory import peak_bytes
from no_host import RefuseTransfers
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import LATENT_CHANNELS, LIGHT_DECODER, VQVAE_CONFIG, tiny_vqvae
from torch._dynamo.testing import CompileCounter

from srdd import MultiScaleVQModel
from srdd.acceleration import accelerate, decoder
from srdd.acceleration.decoder import (
    ACCELERATOR,
    COMPILED,
    COMPILED_ON_CPU,
    FLOAT32_ON_CPU,
    HALF_ON_CPU,
    MAPS_AT_PEAK,
    MIB,
    PLAIN,
    LeanResnetBlock2D,
    MergedUpsample2D,
    UpsamplingConv2d,
    current_path,
    decoding_path,
    images_per_slice,
    run_decoder,
)
from srdd.acceleration.module_swapping import recast


ATTENTION = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16, 32],
    "sample_size": 16,
}

# Constructor overrides.
MODELS = {
    "default": {},
    "attention": ATTENTION,
    "patches": {"sample_size": 16, "patch_size": 2},
    "not-silu": {"act_fn": "gelu"},
    "light": LIGHT_DECODER,
}


def random_latents(batch_size=3, height=4, width=4, seed=0) -> torch.Tensor:
    return torch.randn(batch_size, LATENT_CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))


def plainly(model: MultiScaleVQModel, latents: torch.Tensor) -> torch.Tensor:
    """Pixels by diffusers' own code."""
    model.disable_fast_decoding()
    sample = model.decode(latents).sample
    model.enable_fast_decoding()
    return sample


def diffusers_decoder(model: MultiScaleVQModel) -> Decoder:
    """A decoder that nobody touched, with the same weights."""
    config = model.config
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
    own = {name: config[f"decoder_{name}"] for name in names}
    decoder = Decoder(
        in_channels=config.latent_channels,
        out_channels=3 * config.patch_size**2,
        act_fn=config.act_fn,
        up_block_types=config.up_block_types,
        **{name: config[name] if value is None else value for name, value in own.items()},
    )
    decoder.load_state_dict(model.decoder.state_dict())
    return decoder.train(model.training)


@torch.no_grad()
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 1)])
def test_pixels_are_those_of_the_plain_path(overrides, height, width):
    model, latents = tiny_vqvae(**overrides), random_latents(height=height, width=width)
    before = latents.clone()
    sample = model.decode(latents).sample
    plain = plainly(model, latents)
    expected = F.pixel_shuffle(diffusers_decoder(model)(model.post_quant_conv(latents)), model.config.patch_size)
    assert torch.equal(plain, expected)
    torch.testing.assert_close(sample, plain, atol=1e-4, rtol=0)
    assert sample.is_contiguous()
    assert torch.equal(latents, before)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (6, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_kernels_are_up_sampling_and_convolution(size, bias):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 7, 3, padding=1, bias=bias)
    recast(conv, {torch.nn.Conv2d: UpsamplingConv2d})
    hidden_states = torch.randn(2, 3, *size)
    expected = conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(conv(hidden_states, upsample=True), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("training", [False, True])
def test_training_and_gradients_run_diffusers_code(overrides, training):
    model = tiny_vqvae(**overrides).train(training)
    decoder = diffusers_decoder(model)
    latents = [random_latents(height=8, width=8).requires_grad_() for _ in range(2)]
    hidden_states = [latents[0] * 1, latents[1] * 1]
    ours, theirs = model.decoder(hidden_states[0]), decoder(hidden_states[1])
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.equal(latents[0].grad, latents[1].grad)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(model.decoder.get_parameter(name).grad, parameter.grad), name
    with torch.no_grad():
        # The first forward of a reentrant checkpoint, for one.
        assert not training or torch.equal(model.decoder(latents[0]), ours)


def with_gradient_pass_through_decode():
    model, latents = tiny_vqvae(), random_latents().requires_grad_()
    model.decode(latents).sample.square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_weights_are_drawn_and_named_as_diffusers_does():
    torch.manual_seed(0)
    decoder = Decoder(LATENT_CHANNELS, 3, ("UpDecoderBlock2D",) * 2, (16, 32), layers_per_block=1, norm_num_groups=8)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    ours = Decoder(LATENT_CHANNELS, 3, ("UpDecoderBlock2D",) * 2, (16, 32), layers_per_block=1, norm_num_groups=8)
    accelerate(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in decoder.named_parameters()]
    assert list(ours.state_dict()) == list(decoder.state_dict())
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_every_block_of_the_decoder_is_exchanged_and_none_of_the_encoder():
    model = tiny_vqvae(**ATTENTION)
    kinds = [type(module) for module in model.decoder.modules()]
    assert (kinds.count(LeanResnetBlock2D), kinds.count(MergedUpsample2D), kinds.count(UpsamplingConv2d)) == (8, 2, 2)
    assert ResnetBlock2D not in kinds
    assert Upsample2D not in kinds
    assert LeanResnetBlock2D not in map(type, model.encoder.modules())


def test_the_path_of_an_input():
    latents = random_latents()
    assert decoding_path(latents) == PLAIN  # a gradient may be wanted
    with torch.no_grad():
        assert decoding_path(latents) == FLOAT32_ON_CPU
        assert decoding_path(latents, fast=False) == PLAIN
        assert decoding_path(latents.to(torch.bfloat16)) == HALF_ON_CPU
        assert decoding_path(latents.to("meta")) == ACCELERATOR
        assert decoding_path(latents, compiled=True) == COMPILED_ON_CPU
        assert decoding_path(latents.to("meta"), compiled=True) == COMPILED
        assert decoding_path(latents, fast=False, compiled=True) == PLAIN
        with torch.autocast("cpu", torch.bfloat16):
            assert decoding_path(latents) == decoding_path(latents, compiled=True) == PLAIN
    with torch.inference_mode():
        assert decoding_path(latents) == FLOAT32_ON_CPU


def note_paths(model: MultiScaleVQModel) -> list[decoder.DecodingPath]:
    """The paths of all later runs of a decoder."""
    paths = []
    model.decoder.conv_in.register_forward_pre_hook(lambda module, args: paths.append(current_path.get()))
    return paths


def test_the_path_is_decided_once_for_a_decode(monkeypatch):
    decided = []

    def decide(*args):
        decided.append(decoding_path(*args))
        return decided[-1]

    monkeypatch.setattr(decoder, "decoding_path", decide)
    small = dataclasses.replace(FLOAT32_ON_CPU, bytes_per_slice=2 * 8192)
    monkeypatch.setattr(decoder, "FLOAT32_ON_CPU", small)
    model, latents = tiny_vqvae(), random_latents(5)
    paths = note_paths(model)
    with torch.no_grad():
        model.decode(latents)
        model.train().decode(latents)
    model.eval().decode(latents)
    with torch.no_grad():
        model.enable_slicing()
        model.decode(latents)
    assert decided == [small, PLAIN, PLAIN, small]
    assert paths == [small] * 3 + [PLAIN] * 2 + [small] * 5


@torch.no_grad()
def test_a_decoder_on_its_own_is_diffusers():
    model, latents = tiny_vqvae(**ATTENTION), random_latents()
    paths = note_paths(model)
    assert torch.equal(model.decoder(latents), diffusers_decoder(model)(latents))
    assert paths == [PLAIN]


def test_nothing_stays_switched_on_after_an_exception():
    model, latents = tiny_vqvae(), random_latents()

    def fail(module, args):
        raise RuntimeError("out of memory")

    handle = model.decoder.conv_out.register_forward_pre_hook(fail)
    paths = note_paths(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model.decode(latents)
    handle.remove()
    assert paths == [FLOAT32_ON_CPU]
    assert current_path.get() == PLAIN
    with_gradient = latents.clone().requires_grad_()
    assert torch.equal(model.decoder(with_gradient), diffusers_decoder(model)(with_gradient))


def test_a_decode_within_another_has_its_own_path():
    outer, inner, latents = tiny_vqvae(), tiny_vqvae(seed=7), random_latents()

    def differentiate(module, args):
        with torch.enable_grad():
            inner.decode(latents)

    outer.decoder.up_blocks[0].register_forward_pre_hook(differentiate)
    paths = note_paths(inner)
    outer.decoder.conv_out.register_forward_pre_hook(lambda module, args: paths.append(current_path.get()))
    with torch.no_grad():
        outer.decode(latents)
    assert paths == [PLAIN, FLOAT32_ON_CPU]


def test_threads_that_share_a_model_take_each_its_own_path():
    model, latents, paths = tiny_vqvae(), random_latents(), {}
    contexts = {
        "no_grad": (torch.no_grad,),
        "autocast": (torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)),
        "grad": (torch.enable_grad,),
    }

    def decode(name: str) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            for context in contexts[name]:
                stack.enter_context(context())
            return model.decode(latents).sample

    expected = {name: decode(name) for name in contexts}
    barrier = threading.Barrier(len(contexts), timeout=60)

    def meet(module, args):
        barrier.wait()
        paths[threading.current_thread().name] = current_path.get()
        barrier.wait()

    handles = [
        module.register_forward_pre_hook(meet) for module in (model.decoder.conv_in, model.decoder.up_blocks[1])
    ]
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: decode(name)}), name=name) for name in contexts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert paths == {"no_grad": FLOAT32_ON_CPU, "autocast": PLAIN, "grad": PLAIN}
    for name, sample in expected.items():
        assert torch.equal(found[name], sample), name
    assert found["grad"].requires_grad


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_compiled_decoder_is_one_graph_of_diffusers_code(overrides, dtype, gradients):
    model, latents = tiny_vqvae(**overrides).to(dtype), random_latents().to(dtype)
    torch._dynamo.reset()
    with torch.set_grad_enabled(gradients):
        expected = diffusers_decoder(model).to(dtype)(latents)
        compiled = torch.compile(model.decoder, fullgraph=True, backend="eager")
        assert torch.equal(compiled(latents), expected)


# By what is compiled: the decoder's `compile`, `torch.compile` in its place, `decode`, and a function around it.
COMPILED_PARTS = ["decoder", "module", "decode", "function"]


def compile_part(model: MultiScaleVQModel, part: str, backend):
    """A function from latents to pixels of which that part is compiled."""
    settings = {"fullgraph": True, "backend": backend}
    decode = model.decode
    if part == "decoder":
        model.decoder.compile(**settings)
    elif part == "module":
        model.decoder = torch.compile(model.decoder, **settings)
    elif part == "decode":
        decode = torch.compile(decode, **settings)
    else:
        return torch.compile(lambda latents: model.decode(latents).sample, **settings)
    return lambda latents: decode(latents).sample


@torch.no_grad()
@pytest.mark.parametrize(
    ("part", "dtype"),
    [*((part, torch.float32) for part in COMPILED_PARTS), ("decoder", torch.float16), ("decoder", torch.bfloat16)],
)
def test_a_compiled_decoder_is_compiled_once_for_a_resolution(part, dtype):
    torch._dynamo.reset()
    model, counter = tiny_vqvae(**LIGHT_DECODER).to(dtype), CompileCounter()
    plain, compiled = tiny_vqvae(**LIGHT_DECODER).to(dtype), compile_part(model, part, counter)
    # One more for other batch sizes, one for another resolution; that is one for all.
    expected = {(3, 4, 4): 1, (5, 4, 4): 2, (2, 4, 4): 2, (4, 2, 6): 3, (3, 2, 6): 3, (2, 5, 7): 3}
    for shape, num_graphs in expected.items() if dtype == torch.float32 else [((3, 4, 4), 1)]:
        latents = random_latents(*shape)
        torch.testing.assert_close(compiled(latents), plainly(plain, latents), atol=1e-5, rtol=0)
        assert counter.frame_count == num_graphs


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(sys.platform == "win32" or shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_decoder_compiled_by_the_default_backend(dtype, tolerance):
    torch._dynamo.reset()
    model, latents = tiny_vqvae(**LIGHT_DECODER).to(dtype), random_latents()
    expected = plainly(model, latents).float()
    model.decoder.compile(fullgraph=True)
    sample = model.decode(latents).sample.float()
    torch.testing.assert_close(sample, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@torch.no_grad()
def test_a_compiled_decoder_gets_even_slices(monkeypatch):
    small = dataclasses.replace(COMPILED_ON_CPU, bytes_per_slice=4 * 3072)
    monkeypatch.setattr(decoder, "COMPILED_ON_CPU", small)
    torch._dynamo.reset()
    model, latents, batch_sizes, pixels = tiny_vqvae(**LIGHT_DECODER), random_latents(9), [], []

    def backend(graph_module, example_inputs):
        def run(*inputs):
            # As a compiler's CUDA graph: all outputs lie in one memory.
            [sample] = graph_module(*inputs)
            pixels.append(sample if not pixels else pixels[0][: len(sample)].copy_(sample))
            batch_sizes.append(len(sample))
            return (pixels[-1],)

        return run

    expected = plainly(model, latents)
    model.decoder.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(model.decode(latents).sample, expected, atol=1e-5, rtol=0)
    assert batch_sizes == [3, 3, 3]
    model.enable_slicing()
    model.decode(latents[:2])
    assert batch_sizes[3:] == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_an_accelerator_is_asked_nothing_and_sent_nothing(overrides, monkeypatch):
    monkeypatch.setattr(decoder, "ACCELERATOR", dataclasses.replace(ACCELERATOR, bytes_per_slice=2 * 8192))
    model = tiny_vqvae(**overrides).to("meta")
    latents = torch.empty(5, LATENT_CHANNELS, 4, 4, device="meta")
    with RefuseTransfers():
        sample = model.decode(latents).sample
    assert len(sample) == 5


@torch.no_grad()
def test_new_weights_are_decoded_with():
    model, latents = tiny_vqvae(), random_latents()
    before = model.decode(latents).sample
    conv = model.decoder.up_blocks[0].upsamplers[0].conv
    conv.weight.mul_(2)
    changed = model.decode(latents).sample
    assert not torch.allclose(changed, before, atol=1e-2)
    torch.testing.assert_close(changed, plainly(model, latents), atol=1e-4, rtol=0)
    conv.weight = torch.nn.Parameter(torch.randn_like(conv.weight) / 10)
    torch.testing.assert_close(model.decode(latents).sample, plainly(model, latents), atol=1e-4, rtol=0)
    clone = copy.deepcopy(model)
    clone.decoder.up_blocks[0].upsamplers[0].conv.weight.zero_()
    torch.testing.assert_close(clone.decode(latents).sample, plainly(clone, latents), atol=1e-4, rtol=0)


@torch.no_grad()
def test_batches_are_decoded_in_slices(monkeypatch):
    # The largest map of a tiny image has 32 channels of 8 x 8 pixels: 8 KiB.
    small = dataclasses.replace(FLOAT32_ON_CPU, bytes_per_slice=2 * 8192)
    monkeypatch.setattr(decoder, "FLOAT32_ON_CPU", small)
    model, latents = tiny_vqvae(), random_latents(5)
    batch_sizes = []
    model.decoder.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    sample = model.decode(latents).sample
    assert batch_sizes == [2, 2, 1]
    torch.testing.assert_close(plainly(model, latents), sample, atol=1e-4, rtol=0)
    assert batch_sizes[3:] == [5]
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=1e-4, rtol=0)
    assert batch_sizes[4:] == [1] * 5


@pytest.mark.parametrize(
    ("side", "dtype", "on_cpu", "on_accelerator"),
    [(16, torch.float32, 1, 6), (16, torch.bfloat16, 1, 12), (64, torch.bfloat16, 1, 1), (4, torch.float32, 3, 64)],
)
def test_images_per_slice_of_the_full_tokenizer(side, dtype, on_cpu, on_accelerator, monkeypatch):
    with init_empty_weights():
        model = MultiScaleVQModel(**{**VQVAE_CONFIG, "block_out_channels": [160, 160]}).eval().to(dtype)
    # Two levels of five: latent maps are larger by 8 than those of the full tokenizer for the same image.
    latents = torch.empty(128, LATENT_CHANNELS, 8 * side, 8 * side, dtype=dtype, device="meta")
    paths = {torch.float32: FLOAT32_ON_CPU, torch.bfloat16: HALF_ON_CPU}
    monkeypatch.setattr(model, "_decode", lambda latents: batch_sizes.append(len(latents)) or latents)
    batch_sizes = []
    for path, expected in ((paths[dtype], on_cpu), (ACCELERATOR, on_accelerator)):
        monkeypatch.setattr(decoder, "decoding_path", lambda *args, path=path: path)
        model.decode(latents)
        assert batch_sizes.pop(0) == expected
        batch_sizes.clear()


@torch.no_grad()
def test_slices_are_as_large_as_the_decoders_own_channels_allow(monkeypatch):
    # Float32 maps of 8 x 8 pixels: 8 KiB of the encoder's 32 channels, 3 KiB of the decoder's 12.
    monkeypatch.setattr(decoder, "FLOAT32_ON_CPU", dataclasses.replace(FLOAT32_ON_CPU, bytes_per_slice=24 * 1024))
    for overrides, expected in (({}, 3), (LIGHT_DECODER, 8)):
        model, batch_sizes = tiny_vqvae(**overrides), []
        model.decoder.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
        model.decode(random_latents(10))
        assert batch_sizes[0] == expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("bytes_per_image", "expected"), [(1, [100]), (FLOAT32_ON_CPU.bytes_per_slice // 30, [30, 30, 30, 10])]
)
def test_a_slice_has_one_image_at_least(bytes_per_image, expected):
    batch_sizes = []

    def decode(latents):
        batch_sizes.append(len(latents))
        return latents

    latents = random_latents(100)
    assert torch.equal(run_decoder(decode, latents, True, bytes_per_image), latents)
    assert batch_sizes == expected
    batch_sizes.clear()
    run_decoder(decode, latents[:3], True, 2 * FLOAT32_ON_CPU.bytes_per_slice)
    assert batch_sizes == [1] * 3


@pytest.mark.parametrize(
    ("batch_size", "free_mib", "expected"),
    [
        (1, None, 1),
        (12, None, 12),
        (13, None, 7),
        (64, None, 11),
        (64, 80_000, 11),  # half of it is far more than five maps of 12 images
        (64, 2400, 11),
        (64, 2399, 11),
        (64, 2000, 10),  # 200 MiB for the map of a slice
        (64, 400, 2),
        (64, 399, 1),
        (64, 0, 1),
    ],
)
def test_slices_are_even_and_fit_into_the_memory_that_is_free(batch_size, free_mib, expected):
    free_bytes = None if free_mib is None else free_mib * MIB
    # 256px in half precision: 160 channels.
    assert images_per_slice(batch_size, 20 * MIB, 256 * MIB, free_bytes) == expected


def test_slices_are_as_few_and_as_even_as_can_be():
    for batch_size in range(1, 130):
        for at_most in range(1, 40):
            size = images_per_slice(batch_size, 1, at_most)
            slices = [len(part) for part in torch.empty(batch_size).split(size)]
            assert max(slices) == size <= at_most
            assert len(slices) == -(-batch_size // at_most)
            assert len({*slices}) <= 2


@torch.no_grad()
def test_a_graph_is_captured_with_the_slices_of_the_run_before(monkeypatch):
    answers, batch_sizes = [], []
    monkeypatch.setattr(decoder, "free_memory", lambda device: answers.pop(0))
    monkeypatch.setattr(decoder, "_decided", {})

    def slices_of(batch_size, *free_bytes):
        answers.extend(free_bytes)
        batch_sizes.clear()
        latents = torch.empty(batch_size, LATENT_CHANNELS, 4, 4, device="meta")
        run_decoder(lambda latents: batch_sizes.append(len(latents)) or latents, latents, True, 20 * MIB)
        assert not answers
        return list(batch_sizes)

    assert slices_of(5, 2**40) == [5]
    assert slices_of(5, 400 * MIB) == [2, 2, 1]
    assert slices_of(5, None) == [2, 2, 1]  # captured
    assert slices_of(5, 2**40) == [5]
    assert slices_of(5, None) == [5]
    assert slices_of(13, None) == [7, 6]  # nothing was run before
    assert slices_of(1) == [1]  # nothing to ask for


@pytest.mark.parametrize("overrides", [{}, ATTENTION, {"block_out_channels": [32, 32], "layers_per_block": 3}])
def test_three_of_the_largest_maps_are_there_at_once(overrides):
    model = tiny_vqvae(**overrides).to("meta")
    latents = torch.empty(64, LATENT_CHANNELS, 4, 4, device="meta")
    peak, before = peak_bytes(model, model.decode, latents)
    largest_map = latents.shape[-2:].numel() * model._largest_map * latents.element_size() * len(latents)
    assert peak - before < 3.2 * largest_map
    assert MAPS_AT_PEAK == 3 + 2  # and cuDNN's copies


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_as_the_plain_path_does(dtype):
    model, latents = tiny_vqvae(**ATTENTION).to(dtype), random_latents()
    assert torch.equal(model.decode(latents).sample, plainly(model, latents))


@torch.no_grad()
def test_offloaded_weights_are_fetched():
    model, latents = tiny_vqvae(**ATTENTION), random_latents()
    expected = model.decode(latents).sample
    cpu_offload(model, torch.device("cpu"))
    assert model.decoder.up_blocks[0].upsamplers[0].conv.weight.is_meta
    assert torch.equal(model.decode(latents).sample, expected)


@torch.no_grad()
def test_weights_in_another_storage_precision_are_cast():
    model, latents = tiny_vqvae(), random_latents()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.decoder.up_blocks[0].upsamplers[0].conv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.decode(latents).sample, plainly(model, latents), atol=1e-4, rtol=0)


@torch.no_grad()
def test_adapters_are_not_left_out():
    model, latents = tiny_vqvae(), random_latents()
    plain = model.decode(latents).sample
    config = LoraConfig(target_modules=["upsamplers.0.conv", "conv1"], init_lora_weights=False)
    inject_adapter_in_model(config, model.decoder)
    adapted = model.eval().decode(latents).sample
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(adapted, plainly(model, latents), atol=1e-4, rtol=0)
