import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from diffusers.models.autoencoders.vae import Decoder
from live_memory import peak_bytes
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, LIGHT_DECODER, VQVAE_CONFIG, tiny_vqvae

from srdd import MultiScaleVQModel
from srdd.acceleration import decoder


NUM_TOKENS = 1 + 4 + 16

# Constructor overrides, and the (height, width) of an image that they fit.
SHAPES = {
    "square": ({}, (8, 8)),
    "non-square": ({"sample_size": (8, 12), "scale_sizes": [[1, 1], [1, 2], [2, 4], [4, 6]]}, (8, 12)),
    "one-scale": ({"scale_sizes": [4]}, (8, 8)),
    "patches": ({"sample_size": 16, "patch_size": 2}, (16, 16)),
    "light-decoder": ({"sample_size": 16, "patch_size": 2, **LIGHT_DECODER}, (16, 16)),
}


def random_images(height=8, width=8, batch_size=2, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, 3, height, width, generator=generator) * 2 - 1


def random_token_ids(num_tokens=NUM_TOKENS, batch_size=2, seed=0) -> torch.Tensor:
    return torch.randint(CODEBOOK_SIZE, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def model_and_images(request):
    overrides, size = request.param
    return tiny_vqvae(**overrides), random_images(*size)


@torch.no_grad()
def test_latent_states_end_at_what_decode_tokens_decodes(model_and_images):
    model, images = model_and_images
    token_ids = model.tokenize(images)
    states = model.latent_states(token_ids)
    assert token_ids.shape == (2, model.num_tokens)
    assert len(states) == len(model.config.scale_sizes)
    assert torch.equal(model.decode(states[-1]).sample, model.decode_tokens(token_ids).sample)
    assert model.decode_tokens(token_ids, return_dict=False)[0].shape == images.shape


@torch.no_grad()
def test_reconstruction_passes_through_the_token_pyramid(model_and_images):
    model, images = model_and_images
    output = model(images)
    assert torch.equal(output.token_ids, model.tokenize(images))
    torch.testing.assert_close(output.sample, model.decode_tokens(output.token_ids).sample, atol=1e-5, rtol=0)
    as_tuple = model(images, return_dict=False)
    assert len(as_tuple) == 5
    assert torch.equal(as_tuple[1], output.token_ids)


@torch.no_grad()
def test_tokens_are_those_of_the_encoded_latents(model_and_images):
    model, images = model_and_images
    latents = model.encode(images, return_dict=False)[0]
    assert latents.shape == (2, LATENT_CHANNELS, *model.config.scale_sizes[-1])
    assert torch.equal(model.quantize_latents(latents), model.tokenize(images))


@torch.no_grad()
def test_residual_maps_add_up_to_the_latent_states(model_and_images):
    model, _ = model_and_images
    token_ids = random_token_ids(model.num_tokens)
    total, start = torch.zeros(()), 0
    for (height, width), state in zip(model.config.scale_sizes, model.latent_states(token_ids)):
        token_map = token_ids[:, start : start + height * width].view(-1, height, width)
        total = total + model.residual_map(token_map)
        start += height * width
        torch.testing.assert_close(state, total, atol=1e-5, rtol=0)


@torch.no_grad()
def test_teacher_forcing_inputs_are_the_downsampled_states_before_each_scale(model_and_images):
    model, _ = model_and_images
    token_ids = random_token_ids(model.num_tokens)
    state, expected, start = torch.zeros(2, LATENT_CHANNELS, *model.config.scale_sizes[-1]), [], 0
    for height, width in model.config.scale_sizes:
        small = F.adaptive_avg_pool2d(state, (height, width))
        expected += [small[:, :, row, column] for row in range(height) for column in range(width)]
        state = state + model.residual_map(token_ids[:, start : start + height * width].view(-1, height, width))
        start += height * width
    inputs = model.teacher_forcing_inputs(token_ids)
    assert inputs.shape == (2, model.num_tokens, LATENT_CHANNELS)
    torch.testing.assert_close(inputs, torch.stack(expected, dim=1), atol=1e-5, rtol=0)
    assert not inputs[:, : math.prod(model.config.scale_sizes[0])].any()


@torch.no_grad()
@pytest.mark.parametrize("scale_sizes", [[4], [1, 4], [2, 3, 4], [1, 2, 3, 4], [[1, 3], [4, 4]]])
def test_other_scale_lists_that_end_at_the_grid(scale_sizes):
    model, images = tiny_vqvae(), random_images()
    token_ids = model.tokenize(images, scale_sizes)
    states = model.latent_states(token_ids, scale_sizes)
    assert [state.shape for state in states] == [(2, LATENT_CHANNELS, 4, 4)] * len(scale_sizes)
    assert torch.equal(model.decode(states[-1]).sample, model.decode_tokens(token_ids, scale_sizes).sample)
    assert model.teacher_forcing_inputs(token_ids, scale_sizes).shape == (*token_ids.shape, LATENT_CHANNELS)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 12), (4, 2)])
def test_other_image_sizes_with_their_own_scale_list(height, width):
    model, images = tiny_vqvae(), random_images(height, width)
    scale_sizes = [[1, 1], [height // 2, width // 2]]
    token_ids = model.tokenize(images, scale_sizes)
    assert token_ids.shape == (2, 1 + height * width // 4)
    assert model.decode_tokens(token_ids, scale_sizes).sample.shape == images.shape


@torch.no_grad()
def test_coarse_scales_can_be_read_on_their_own():
    model = tiny_vqvae()
    token_ids = random_token_ids()
    coarse = model.latent_states(token_ids[:, :5], [1, 2], grid_size=(4, 4))
    for state, whole in zip(coarse, model.latent_states(token_ids)):
        assert torch.equal(state, whole)
    latents = model.encode(random_images()).latents
    assert torch.equal(model.quantize_latents(latents, [1, 2]), model.quantize_latents(latents)[:, :5])


@torch.no_grad()
def test_slicing_changes_nothing():
    model, images = tiny_vqvae(), random_images(batch_size=3)
    latents, token_ids = model.encode(images).latents, model.tokenize(images)
    sample = model.decode(latents).sample
    encoded_batches = []
    handle = model.encoder.register_forward_hook(lambda module, args, output: encoded_batches.append(len(args[0])))
    model.enable_slicing()
    torch.testing.assert_close(model.encode(images).latents, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.tokenize(images), token_ids)
    assert encoded_batches == [1] * 6
    model.disable_slicing()
    model.encode(images)
    handle.remove()
    assert encoded_batches[-1] == 3


@torch.no_grad()
def test_patches_are_folded_into_channels():
    model, images = tiny_vqvae(sample_size=16, patch_size=2), random_images(16, 16)
    folded = images.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    expected = model.quant_conv(model.encoder(folded))
    torch.testing.assert_close(model.encode(images).latents, expected, atol=1e-5, rtol=0)
    assert model.spatial_compression_ratio == 4
    assert model.decode(expected).sample.shape == images.shape


def test_straight_through_gradient_reaches_the_encoder_but_not_the_codebook():
    model = tiny_vqvae().train()
    model(random_images()).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.codebook.weight.grad is None


def test_codebook_loss_reaches_the_codebook_and_commitment_loss_the_encoder():
    model = tiny_vqvae().train()
    output = model(random_images())
    output.codebook_loss.backward(retain_graph=True)
    assert model.quantize.codebook.weight.grad.abs().sum() > 0
    assert model.encoder.conv_in.weight.grad is None
    model.zero_grad()
    output.commitment_loss.backward()
    assert model.quantize.codebook.weight.grad is None
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vqvae().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(random_images())
        (output.sample.square().mean() + output.codebook_loss + output.commitment_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0, msg=name)


def test_codebook_usage_counts_every_scale():
    model = tiny_vqvae()
    token_ids = random_token_ids(batch_size=6)
    token_ids[:, :1] = 3
    usage = model.codebook_usage(token_ids)
    for scale, (start, end) in enumerate([(0, 1), (1, 5), (5, 21)]):
        codes, counts = np.unique(token_ids[:, start:end].numpy(), return_counts=True)
        shares = counts / counts.sum()
        assert usage["usage"][scale] == pytest.approx(len(codes) / CODEBOOK_SIZE)
        assert usage["perplexity"][scale] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    assert usage["usage"][0] == pytest.approx(1 / CODEBOOK_SIZE)
    assert usage["perplexity"][0] == pytest.approx(1.0)


@torch.no_grad()
def test_half_precision_model_keeps_its_state_in_float32():
    model = tiny_vqvae().to(torch.bfloat16)
    token_ids = random_token_ids()
    assert model.latent_states(token_ids)[-1].dtype == torch.float32
    assert model.teacher_forcing_inputs(token_ids).dtype == torch.float32
    sample = model.decode_tokens(token_ids).sample
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), tiny_vqvae().decode_tokens(token_ids).sample, atol=0.1, rtol=0.1)


def test_config_holds_lists_of_pairs():
    assert tiny_vqvae(scale_sizes=(1, (2, 2), 4)).config.scale_sizes == [[1, 1], [2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale_sizes": [1, 2, 3]}, r"`scale_sizes` must end at the latent grid \(4, 4\), got .*\(3, 3\)"),
        ({"scale_sizes": [4, 2]}, r"`scale_sizes` must grow from scale to scale, got \[2, 2\]"),
        ({"sample_size": 9}, r"multiples of 2, got \(9, 9\)"),
        ({"sample_size": (8, 16)}, r"`scale_sizes` must end at the latent grid \(4, 8\)"),
        ({"decoder_block_out_channels": [8]}, r"`decoder_block_out_channels` must be 2 positive .* got \[8\]"),
        ({"decoder_block_out_channels": [8] * 3}, r"`decoder_block_out_channels` must .* 2 .* got \[8, 8, 8\]"),
        ({"decoder_block_out_channels": ()}, r"`decoder_block_out_channels` must be a list .* got \(\)"),
        ({"decoder_block_out_channels": [8, 0]}, r"`decoder_block_out_channels\[1\]` must be an integer .* got 0"),
        ({"decoder_block_out_channels": [8, 16.0]}, r"`decoder_block_out_channels\[1\]` must be .* got 16.0"),
        ({"decoder_layers_per_block": -1}, r"`decoder_layers_per_block` must be an integer in \[0, 64\], got -1"),
        ({"decoder_layers_per_block": 1.5}, "`decoder_layers_per_block` must be an integer .* got 1.5"),
        ({"decoder_mid_block_add_attention": "no"}, "`decoder_mid_block_add_attention` must be True .* got 'no'"),
        ({"decoder_norm_num_groups": 12}, r"`decoder_norm_num_groups` .* divisor .* \[16, 32\], got 12"),
        ({"decoder_norm_num_groups": 0}, r"`decoder_norm_num_groups` must be an integer in \[1, 8192\], got 0"),
        # The encoder's groups do not fit.
        ({"decoder_block_out_channels": [8, 12]}, r"`norm_num_groups` .* \[8, 12\], got 8"),
        ({"norm_num_groups": 12}, r"`norm_num_groups` .* divisor .* \[16, 32\], got 12"),
        ({"quant_conv_kernel_size": 2}, "`quant_conv_kernel_size` must be odd, got 2"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, r"`up_block_types` must be a list of 2 entries, got"),
        ({"down_block_types": ["DownBlock2D"] * 2}, r"`down_block_types\[0\]` must be one of .*, got 'DownBlock2D'"),
    ],
)
def test_constructor_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_vqvae(**overrides)


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_a_decoder_has_its_own_sizes_and_the_encoder_its_own():
    plain, model = tiny_vqvae(), tiny_vqvae(**LIGHT_DECODER)
    expected = Decoder(
        LATENT_CHANNELS, 3, ("UpDecoderBlock2D",) * 2, (4, 12), layers_per_block=0, norm_num_groups=2,
        mid_block_add_attention=False,
    )  # fmt: skip
    assert shapes(model.decoder) == shapes(expected)
    norms = [module for module in model.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {2}
    assert shapes(model.encoder) == shapes(plain.encoder)
    assert model.spatial_compression_ratio == plain.spatial_compression_ratio


@pytest.mark.parametrize("name", LIGHT_DECODER)
def test_every_size_of_a_decoder_can_be_set_alone(name):
    value = [8, 32] if name == "decoder_block_out_channels" else LIGHT_DECODER[name]
    plain, model = tiny_vqvae(), tiny_vqvae(**{name: value})
    sizes = [str(vqvae.decoder) for vqvae in (plain, model)]  # names the groups of norms, too
    assert sizes[0] != sizes[1]
    assert str(model.encoder) == str(plain.encoder)
    with torch.no_grad():
        assert model(random_images()).sample.shape == (2, 3, 8, 8)


def test_a_decoder_like_the_encoder_is_drawn_as_if_nothing_was_said():
    same = {f"decoder_{name}": VQVAE_CONFIG[name] for name in ("block_out_channels", "layers_per_block")}
    models = []
    for overrides in ({}, same, dict.fromkeys(LIGHT_DECODER)):
        torch.manual_seed(0)
        models.append(MultiScaleVQModel(**VQVAE_CONFIG, **overrides))
    for model in models[1:]:
        assert all(torch.equal(tensor, models[0].state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_configuration_from_before_decoders_had_sizes_is_loaded(tmp_path):
    model = tiny_vqvae()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in LIGHT_DECODER}))
    loaded = MultiScaleVQModel.from_pretrained(tmp_path)
    assert shapes(loaded) == shapes(model)
    assert all(loaded.config[name] is None for name in LIGHT_DECODER)


def test_a_light_decoder_survives_json(tmp_path):
    model = tiny_vqvae(**{**LIGHT_DECODER, "decoder_block_out_channels": (4, 12)})
    assert model.config.decoder_block_out_channels == [4, 12]
    model.save_pretrained(tmp_path)
    loaded = MultiScaleVQModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in LIGHT_DECODER} == LIGHT_DECODER
    latents = torch.randn(2, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)


@pytest.mark.parametrize("method", ["encode", "tokenize", "forward"])
def test_images_that_the_encoder_cannot_halve_are_refused(method):
    with pytest.raises(ValueError, match=r"`sample` must have sides that are multiples of 2, got \(8, 9\)"):
        getattr(tiny_vqvae(), method)(random_images(8, 9))


@pytest.mark.parametrize("method", ["tokenize", "forward"])
def test_own_scales_on_another_image_size_are_refused(method):
    with pytest.raises(ValueError, match=r"`scale_sizes` must end at the latent grid \(8, 8\), got .*\(4, 4\)"):
        getattr(tiny_vqvae(), method)(random_images(16, 16))


@pytest.mark.parametrize("method", ["latent_states", "teacher_forcing_inputs", "decode_tokens", "codebook_usage"])
def test_bad_token_pyramids_are_refused(method):
    read = getattr(tiny_vqvae(), method)
    with pytest.raises(ValueError, match=rf"`token_ids` must lie in \[0, {CODEBOOK_SIZE - 1}\], got \[\d+, 32\]"):
        read(torch.arange(12, CODEBOOK_SIZE + 1).flip(0).view(1, NUM_TOKENS))
    with pytest.raises(ValueError, match=rf"`token_ids` must lie in \[0, {CODEBOOK_SIZE - 1}\], got \[-1, -1\]"):
        read(torch.full((1, NUM_TOKENS), -1))
    with pytest.raises(ValueError, match=r"`token_ids` must have shape \(batch, 21\) .*got \(2, 20\)"):
        read(random_token_ids(num_tokens=20))


@torch.no_grad()
def test_images_may_be_decoded_after_some_of_their_scales(model_and_images):
    model, images = model_and_images
    images = torch.cat([images, random_images(*images.shape[-2:], seed=1)])
    last = len(model.config.scale_sizes)
    num_scales = torch.tensor([1, last, max(1, last - 1), 1])
    whole, output = model(images), model(images, num_scales=num_scales)
    states = model.latent_states(model.tokenize(images))
    for image, count in enumerate(num_scales.tolist()):
        alone = model.decode(states[count - 1][image : image + 1]).sample[0]
        torch.testing.assert_close(output.sample[image], alone, atol=1e-5, rtol=0)
    # The pyramids and the quantizer's losses are those of all scales.
    assert torch.equal(output.token_ids, whole.token_ids)
    assert torch.equal(output.codebook_loss, whole.codebook_loss)
    assert torch.equal(output.commitment_loss, whole.commitment_loss)
    all_scales = model(images, num_scales=torch.full((4,), last))
    assert torch.equal(all_scales.sample, whole.sample)


def test_gradient_passes_straight_through_a_state_of_fewer_scales():
    model, images = tiny_vqvae(), random_images()
    latents = model.encode(images).latents.detach().requires_grad_()
    output = model.quantize(latents, model.config.scale_sizes, torch.tensor([1, 2]))
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    (output.latents * weights).sum().backward()
    assert torch.equal(latents.grad, weights)


@torch.no_grad()
def test_an_output_can_be_rebuilt_in_another_precision():
    # accelerate does so with the outputs of every model that it trains in half precision.
    output = tiny_vqvae().to(torch.bfloat16)(random_images().to(torch.bfloat16))
    again = convert_to_fp32(output)
    assert type(again) is type(output)
    assert (again.sample.dtype, again.latents.dtype) == (torch.float32, torch.float32)
    assert torch.equal(again.token_ids, output.token_ids)
    assert torch.equal(again.sample, output.sample.float())
    assert torch.equal(again.codebook_loss, output.codebook_loss)


def test_float8_weights_and_half_precision_save_memory_where_tensors_take_it(monkeypatch):
    for path in ("FLOAT32_ON_CPU", "HALF_ON_CPU"):
        monkeypatch.setattr(decoder, path, decoder.ACCELERATOR)

    def peak_and_weights(storage_dtype, compute_dtype):
        model = tiny_vqvae(sample_size=64, scale_sizes=[1, 2, 4, 32]).to(compute_dtype)
        model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=compute_dtype)
        images = random_images(64, 64).to(compute_dtype)
        return peak_bytes(model, model, images)[0], model.get_memory_footprint()

    float32, weights = peak_and_weights(torch.float32, torch.float32)
    float8, float8_weights = peak_and_weights(torch.float8_e4m3fn, torch.float32)
    half, half_weights = peak_and_weights(torch.float8_e4m3fn, torch.bfloat16)
    assert half_weights < float8_weights < weights / 3
    assert float32 - float8 > 0.8 * (weights - float8_weights)
    assert half - half_weights < 0.55 * (float8 - float8_weights)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_float8_weights_computes_in_the_dtype_asked_for(dtype):
    model, images = tiny_vqvae(), random_images()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert model.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert model.quantize.codebook.weight.dtype == torch.float32
    rounded = tiny_vqvae()
    rounded.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    token_ids = model.tokenize(images)
    assert model.encode(images).latents.dtype == model.decode_tokens(token_ids).sample.dtype == model.dtype == dtype
    assert model.latent_states(token_ids)[-1].dtype == torch.float32
    expected, tolerance = rounded.decode_tokens(token_ids).sample, 1e-4 if dtype == torch.float32 else 1e-2
    difference = (model.decode_tokens(token_ids).sample.float() - expected).abs().max() / expected.abs().max()
    assert difference < tolerance
    if dtype == torch.float32:
        assert torch.equal(token_ids, rounded.tokenize(images))


WRONG_IDS = [None, [[1]], "1", np.zeros((2, 21), int), torch.zeros(2, 21), torch.zeros(2, 21, dtype=torch.bool)]


@pytest.mark.parametrize("method", ["latent_states", "teacher_forcing_inputs", "decode_tokens", "codebook_usage"])
@pytest.mark.parametrize("wrong", [*WRONG_IDS, torch.full((2, 21), torch.nan), torch.zeros(2, 21, dtype=torch.uint8)])
def test_token_ids_of_another_kind_are_refused(method, wrong):
    with pytest.raises(ValueError, match="`token_ids` must be an int64 or int32 tensor, got "):
        getattr(tiny_vqvae(), method)(wrong)


@pytest.mark.parametrize(
    "wrong", [*WRONG_IDS, *(torch.zeros(shape, dtype=torch.long) for shape in ((2, 4), (0, 2, 2)))]
)
def test_token_maps_of_another_kind_are_refused(wrong):
    with pytest.raises(ValueError, match="`token_map` must be an int64 or int32 tensor of shape .*, got "):
        tiny_vqvae().residual_map(wrong)


@pytest.mark.parametrize("wrong", [[0, CODEBOOK_SIZE], [-1, 0], [10**9, -5]])
def test_token_maps_out_of_range_are_refused(wrong):
    token_map = torch.tensor(wrong).view(1, 1, 2).expand(1, 2, 2)
    with pytest.raises(ValueError, match=rf"`token_map` must lie in \[0, 31\], got \[{min(wrong)}, {max(wrong)}\]"):
        tiny_vqvae().residual_map(token_map)


@pytest.mark.parametrize("wrong", [(4,), (4, 4, 4), "44", (0, 4), (4.0, 4), (10**6, 10**6), -4, (), True])
def test_grids_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="`grid_size` must "):
        tiny_vqvae().latent_states(torch.zeros(1, 1, dtype=torch.long), [1], wrong)


@pytest.mark.parametrize(
    "wrong",
    [[1, 2], 1, "x", torch.tensor([1]), torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0]), torch.tensor([True] * 2)],
)
def test_numbers_of_scales_of_another_kind_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`num_scales` must be an int64 or int32 tensor of shape \(2,\), got "):
        tiny_vqvae()(torch.zeros(2, 3, 8, 8), num_scales=wrong)


@pytest.mark.parametrize("wrong", [[0, 1], [1, 4], [-1, 3]])
def test_numbers_of_scales_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"`num_scales` must lie in \[1, 3\], got \[{min(wrong)}, {max(wrong)}\]"):
        tiny_vqvae()(torch.zeros(2, 3, 8, 8), num_scales=torch.tensor(wrong))


WRONG_MAPS = [None, [1], np.zeros((2, 3, 8, 8)), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8)]


@pytest.mark.parametrize("wrong", [*WRONG_MAPS, torch.zeros(2, 4, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_samples_of_another_kind_are_refused(wrong):
    model = tiny_vqvae()
    for call in (model, model.encode, model.tokenize):
        with pytest.raises(
            ValueError, match=r"`sample` must be a floating-point tensor of shape \(batch, 3, .*, got "
        ):
            call(wrong)


@pytest.mark.parametrize("wrong", [*WRONG_MAPS, torch.zeros(2, 7, 4, 4), torch.zeros(0, 8, 4, 4)])
def test_latents_of_another_kind_are_refused(wrong):
    model = tiny_vqvae()
    for call in (model.decode, model.quantize_latents):
        with pytest.raises(
            ValueError, match=r"`latents` must be a floating-point tensor of shape \(batch, 8, .*, got "
        ):
            call(wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_tokens(value):
    model, sample, latents = tiny_vqvae(), torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 4, 4)
    sample[1, 0, 0, 0] = latents[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="`latents` must give finite latents"):
        model.quantize_latents(latents)
    with pytest.raises(ValueError, match="`sample` must give finite latents"):
        model.tokenize(sample)
