import math

import pytest
import torch
from tiny_models import SAMPLE_SIZE, tiny_vqvae

from srdd.evaluation.signal_to_noise import signal_to_noise


def make_images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, SAMPLE_SIZE, SAMPLE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def plain_ratios(vqvae, images, scale_sizes) -> tuple[list[float], list[float]]:
    """The ratios image by image, each in one piece."""
    latent, pixel = [], []
    for k in range(len(scale_sizes) - 1):
        energies = torch.zeros(4, dtype=torch.float64)
        for image in images:
            states = vqvae.latent_states(vqvae.tokenize(image[None], scale_sizes), scale_sizes)
            final, state = states[-1], states[k]
            final_pixels, pixels = (vqvae.decode(states).sample.clamp(-1, 1) for states in (final, state))
            in_batches = (final, final - state, final_pixels, final_pixels - pixels)
            energies += torch.stack([states.double().square().sum() for states in in_batches])
        latent.append((energies[0] / energies[1]).item())
        pixel.append((energies[2] / energies[3]).item())
    return latent, pixel


@pytest.mark.parametrize("scale_sizes", [None, [1, 4]])
def test_ratios_are_energies_of_the_end_over_what_is_missing(scale_sizes):
    vqvae, images = tiny_vqvae(), make_images()
    measured = signal_to_noise(vqvae, [images[:3], images[3:]], scale_sizes)
    latent, pixel = plain_ratios(vqvae, images, scale_sizes or [1, 2, 4])
    assert measured.latent[:-1] == pytest.approx(latent, rel=1e-4)
    assert measured.pixel[:-1] == pytest.approx(pixel, rel=1e-4)
    assert measured.latent[-1] == measured.pixel[-1] == math.inf
    assert measured.num_images == 5
    assert measured.scale_sizes == [[side, side] for side in scale_sizes or [1, 2, 4]]
    assert measured.latent_db[:-1] == pytest.approx([10 * math.log10(ratio) for ratio in latent], abs=1e-3)
    assert measured.pixel_db[:-1] == pytest.approx([10 * math.log10(ratio) for ratio in pixel], abs=1e-3)
    assert measured.latent_db[-1] == math.inf


def test_how_images_are_batched_changes_nothing():
    vqvae, images = tiny_vqvae(), make_images()
    whole, in_batches = (signal_to_noise(vqvae, images.split(size)) for size in (5, 1))
    assert in_batches.latent == pytest.approx(whole.latent, rel=1e-4)
    assert in_batches.pixel == pytest.approx(whole.pixel, rel=1e-4)


def test_pixels_are_clamped_as_pictures_are():
    vqvae = tiny_vqvae()
    with torch.no_grad():  # all pictures are white, from the first scale on
        vqvae.decoder.conv_out.weight.zero_()
        vqvae.decoder.conv_out.bias.fill_(3.0)
    measured = signal_to_noise(vqvae, [make_images()])
    assert measured.pixel == [math.inf] * 3
    assert max(measured.latent[:-1]) < math.inf


def test_ratios_rise_on_pictures_of_a_trained_model(bundled_pipe, drawn_fruit):
    _, images = drawn_fruit
    measured = signal_to_noise(bundled_pipe.vqvae, (images * 2 - 1).split(1))
    for decibels in (measured.latent_db, measured.pixel_db):
        assert len(decibels) == 10
        assert all(before + 0.2 < after for before, after in zip(decibels, decibels[1:]))
    assert 1 < measured.latent_db[0] < 4
    assert 0 < measured.pixel_db[0] < 8


def test_a_tokenizer_in_half_precision_is_measured():
    vqvae = tiny_vqvae()
    full = signal_to_noise(vqvae, [make_images()])
    half = signal_to_noise(vqvae.to(torch.bfloat16), [make_images()])
    assert half.latent_db[0] == pytest.approx(full.latent_db[0], abs=1)


def test_errors():
    vqvae = tiny_vqvae()
    with pytest.raises(ValueError, match="`batches` must hold at least one image, got none"):
        signal_to_noise(vqvae, [])
    with pytest.raises(ValueError, match="`scale_sizes` must end at the latent grid"):
        signal_to_noise(vqvae, [make_images()], [1, 2])
    with pytest.raises(ValueError, match="`scale_sizes` must grow"):
        signal_to_noise(vqvae, [make_images()], [2, 1, 4])
