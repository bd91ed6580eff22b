import math

import pytest
import torch
from skimage.metrics import structural_similarity
from tiny_models import CODEBOOK_SIZE, tiny_vqvae

from srdd.evaluation.reconstruction import evaluate_reconstruction


SIDE = 16


def make_vqvae(**overrides):
    """A tokenizer for images that SSIM's window fits into."""
    return tiny_vqvae(sample_size=SIDE, scale_sizes=[1, 2, 8], **overrides)


def make_batches(*sizes: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(sum(sizes), 3, SIDE // 4, SIDE // 4, generator=generator) * 2 - 1
    images = torch.nn.functional.interpolate(noise, size=(SIDE, SIDE), mode="bilinear")
    return [{"pixel_values": batch} for batch in images.split(sizes)]


class MeanColours(torch.nn.Module):
    """Features of an image, small enough to compute their Fréchet distance by hand: one for each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.float().mean(dim=(2, 3))


@torch.no_grad()
def reconstructions(vqvae, batches) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.cat([batch["pixel_values"] for batch in batches])
    token_ids = torch.cat([vqvae.tokenize(image[None]) for image in images])
    decoded = torch.cat([vqvae.decode_tokens(ids[None]).sample.clamp(-1, 1) for ids in token_ids])
    return images, decoded, token_ids


def test_quality_is_the_mean_over_images():
    vqvae, batches = make_vqvae(), make_batches(3, 2)
    images, decoded, _ = reconstructions(vqvae, batches)
    metrics, _ = evaluate_reconstruction(vqvae, batches)
    errors = (images - decoded).square().flatten(1).mean(dim=1).tolist()
    assert metrics["psnr"] == pytest.approx(sum(10 * math.log10(4 / error) for error in errors) / 5, abs=1e-4)
    unit = [pixels.double().add(1).div(2).numpy() for pixels in (images, decoded)]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similar = [structural_similarity(*pair, data_range=1.0, channel_axis=0, **window) for pair in zip(*unit)]
    assert metrics["ssim"] == pytest.approx(sum(similar) / 5, abs=1e-5)
    assert metrics["num_images"] == 5
    assert "rfd" not in metrics


def test_the_size_of_batches_changes_nothing():
    vqvae = make_vqvae()
    whole, in_batches = (evaluate_reconstruction(vqvae, make_batches(*sizes))[0] for sizes in ((6,), (1, 4, 1)))
    assert whole.keys() == in_batches.keys()
    for name, value in whole.items():
        assert in_batches[name] == pytest.approx(value, abs=1e-4)


def test_usage_is_that_of_the_pyramids():
    vqvae, batches = make_vqvae(), make_batches(3, 2)
    _, _, token_ids = reconstructions(vqvae, batches)
    metrics, _ = evaluate_reconstruction(vqvae, batches)
    expected = vqvae.codebook_usage(token_ids)
    assert metrics["usage"] == expected["usage"]
    assert metrics["perplexity"] == expected["perplexity"]
    assert metrics["codes_used"] == len(set(token_ids.flatten().tolist()))
    assert 0 < metrics["codes_used"] <= CODEBOOK_SIZE


def test_pictures_are_the_first_images_and_what_became_of_them():
    vqvae, batches = make_vqvae(), make_batches(3, 2)
    images, decoded, _ = reconstructions(vqvae, batches)
    _, [originals, again] = evaluate_reconstruction(vqvae, batches, num_pictures=2)
    assert torch.equal(originals, images[:2])
    torch.testing.assert_close(again, decoded[:2], atol=1e-5, rtol=0)
    assert again.abs().max() <= 1


def test_a_light_decoder_is_compared_with_its_teacher():
    teacher, light, batches = make_vqvae(), make_vqvae(), make_batches(3, 2)
    with torch.no_grad():
        light.decoder.conv_out.weight.mul_(0.7)
    images, wanted, _ = reconstructions(teacher, batches)
    decoded = reconstructions(light, batches)[1]

    def psnr(left, right) -> float:
        errors = (left - right).square().flatten(1).mean(dim=1).tolist()
        return pytest.approx(sum(10 * math.log10(4 / error) for error in errors) / 5, abs=1e-4)

    metrics, pictures = evaluate_reconstruction(light, batches, num_pictures=2, teacher=teacher)
    assert metrics["psnr"] == psnr(decoded, images)
    assert metrics["teacher_psnr"] == psnr(wanted, images)
    assert metrics["psnr_to_teacher"] == psnr(decoded, wanted)
    assert len({round(metrics[name], 2) for name in ("psnr", "teacher_psnr", "psnr_to_teacher")}) == 3
    for pictures_of_one, expected in zip(pictures, (images, wanted, decoded), strict=True):
        torch.testing.assert_close(pictures_of_one, expected[:2], atol=1e-5, rtol=0)
    assert "teacher_psnr" not in evaluate_reconstruction(light, batches)[0]


def test_frechet_distance_between_images_and_reconstructions():
    vqvae, batches = make_vqvae(), make_batches(5, 6)
    images, decoded, _ = reconstructions(vqvae, batches)
    metrics, _ = evaluate_reconstruction(vqvae, batches, features=MeanColours())
    real, fake = (pixels.add(1).mul(127.5).round().mean(dim=(2, 3)).double() for pixels in (images, decoded))
    # |m - n|^2 + tr(S + T - 2 (S T)^(1/2)), the square root by way of eigenvalues.
    covariances = real.T.cov(), fake.T.cov()
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root
    assert metrics["rfd"] == pytest.approx(expected.item(), rel=1e-3)
    assert metrics["rfd"] > 0


def test_a_tokenizer_in_half_precision_is_measured_in_float32():
    vqvae = make_vqvae().to(torch.bfloat16)
    metrics, pictures = evaluate_reconstruction(vqvae, make_batches(2), num_pictures=1)
    assert math.isfinite(metrics["psnr"])
    assert {picture.dtype for picture in pictures} == {torch.float32}


def test_a_better_tokenizer_scores_better():
    batches = make_batches(4)
    good, bad = make_vqvae(), make_vqvae()
    with torch.no_grad():  # a decoder that knows nothing but the mean colour is better than one that shouts
        for parameter in good.decoder.conv_out.parameters():
            parameter.zero_()
        bad.decoder.conv_out.bias.fill_(1.0)
    scores = [evaluate_reconstruction(vqvae, batches)[0]["psnr"] for vqvae in (good, bad)]
    assert scores[0] > scores[1]
