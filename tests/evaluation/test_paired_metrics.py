import importlib.util

import pytest
import torch
import torch.nn.functional as F
from skimage import metrics as skimage_metrics

from srdd.evaluation.paired_metrics import load_lpips, pair_metrics, structural_similarity
from srdd.evaluation.perceptual_distance import EfficientNetPerceptualLoss


def make_pictures(count: int = 4, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(32, 40), mode="bicubic").clamp(0, 1)


def noisy(images: torch.Tensor, strength: float = 0.1) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + strength * noise).clamp(0, 1)


def test_psnr_and_ssim_are_those_of_scikit_image():
    references = make_pictures()
    images = noisy(references)
    metrics = pair_metrics(images, references)
    for index, (image, reference) in enumerate(zip(images.double().numpy(), references.double().numpy())):
        psnr = skimage_metrics.peak_signal_noise_ratio(reference, image, data_range=1.0)
        ssim = skimage_metrics.structural_similarity(
            reference,
            image,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert metrics["psnr"][index].item() == pytest.approx(psnr, rel=1e-5)
        assert metrics["ssim"][index].item() == pytest.approx(ssim, abs=1e-5)


def test_images_smaller_than_the_window_have_no_ssim():
    with pytest.raises(ValueError, match=r"`images` must have sides of at least 11, got \(1, 3, 16, 10\)"):
        structural_similarity(torch.rand(1, 3, 16, 10), torch.rand(1, 3, 16, 10))


def test_an_image_does_not_depend_on_the_others():
    references = make_pictures()
    images = noisy(references)
    whole = pair_metrics(images, references)
    for index in range(4):
        alone = pair_metrics(images[[index]], references[[index]])
        assert alone.keys() == whole.keys() == {"psnr", "ssim", "perceptual_distance"}
        for name, value in alone.items():
            assert value.shape == (1,)
            torch.testing.assert_close(value[0], whole[name][index], rtol=1e-5, atol=1e-6)


def test_equal_images_are_perfect_and_noise_makes_them_worse():
    references = make_pictures()
    perfect, good, bad = (pair_metrics(noisy(references, strength), references) for strength in (0, 0.05, 0.2))
    assert perfect["psnr"].isinf().all()
    torch.testing.assert_close(perfect["ssim"], torch.ones(4))
    assert not perfect["perceptual_distance"].any()
    assert (good["psnr"] > bad["psnr"]).all()
    assert (good["ssim"] > bad["ssim"]).all()
    assert (good["perceptual_distance"] < bad["perceptual_distance"]).all()


def test_perceptual_distance_is_the_loss_of_training():
    references, loss = make_pictures(), EfficientNetPerceptualLoss()
    images = noisy(references)
    distances = pair_metrics(images, references)["perceptual_distance"]
    pairs = zip(images * 2 - 1, references * 2 - 1)
    expected = torch.stack([loss(image[None], reference[None]) for image, reference in pairs])
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distances.mean(), loss(images * 2 - 1, references * 2 - 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'none', got 'sum'"):
        loss(images, references, reduction="sum")


class FirstPixel(torch.nn.Module):
    """Stands where LPIPS stands, which needs torchvision."""

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return (images - references)[0, 0, 0, 0].abs()


def test_lpips_is_asked_for_each_pair():
    references = make_pictures()
    images = noisy(references)
    metrics = pair_metrics(images, references, lpips=FirstPixel())
    torch.testing.assert_close(metrics["lpips"], (images - references)[:, 0, 0, 0].abs())


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_lpips_says_what_it_needs():
    with pytest.raises(ImportError, match="LPIPS needs a torchvision"):
        load_lpips()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 3, 32), r"`images` must have shape .* sides of at least 11, got \(4, 3, 32\)"),
        (torch.rand(4, 1, 32, 40), r"`images` must have shape \(batch, 3, .* got \(4, 1, 32, 40\)"),
        (torch.rand(4, 3, 10, 40), r"sides of at least 11, got \(4, 3, 10, 40\)"),
        (torch.rand(4, 3, 32, 41), r"`references` must have the shape of `images`, \(4, 3, 32, 41\), got"),
        (torch.rand(4, 3, 32, 40) * 255, r"`images` must be floats in \[0, 1\], got torch.float32 in"),
        (torch.full((4, 3, 32, 40), torch.nan), r"`images` must be floats in \[0, 1\], got torch.float32 in \[nan"),
        (torch.ones(4, 3, 32, 40, dtype=torch.uint8), r"`images` must be floats in \[0, 1\], got torch.uint8"),
    ],
)
def test_images_of_other_shapes_and_ranges_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        pair_metrics(images, make_pictures())
