"""How close images are to the images they should be, one value for each."""

from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn as nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from srdd.evaluation.perceptual_distance import EfficientNetPerceptualLoss


# SSIM's Gaussian window (Wang et al. 2004).
SMALLEST_SIDE = 11


@lru_cache(maxsize=1)
def _perceptual_loss() -> EfficientNetPerceptualLoss:
    return EfficientNetPerceptualLoss()


@torch.no_grad()
def pair_metrics(
    images: torch.Tensor, references: torch.Tensor, lpips: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """
    Compare images with references, image by image. Means over images are the caller's.

    Args:
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1], sides of at least 11 pixels.
        references (`torch.Tensor` of the same shape): In [0, 1].
        lpips (`torch.nn.Module`, *optional*): What [`load_lpips`] returns, for `"lpips"`.

    Returns:
        `dict[str, torch.Tensor]`: Float32 tensors of shape `(batch,)`. `"psnr"` in dB, infinite for equal images;
        `"ssim"`; `"perceptual_distance"` on EfficientNet-Lite0's features, the recipe of LPIPS with a network that
        needs no download: it is not LPIPS. With `lpips`, `"lpips"`.

    Raises:
        ImportError: If EfficientNet-Lite0 is not installed.
        ValueError: If shapes differ or are too small, or values lie outside of [0, 1].
    """
    for name, pixels in (("images", images), ("references", references)):
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < SMALLEST_SIDE or not len(pixels):
            raise ValueError(
                f"`{name}` must have shape (batch, 3, height, width) with sides of at least {SMALLEST_SIDE}, got"
                f" {tuple(pixels.shape)}."
            )
        if not pixels.is_floating_point() or not ((pixels >= 0) & (pixels <= 1)).all():
            raise ValueError(
                f"`{name}` must be floats in [0, 1], got {pixels.dtype} in [{pixels.min()}, {pixels.max()}]."
            )
    if images.shape != references.shape:
        raise ValueError(
            f"`references` must have the shape of `images`, {tuple(images.shape)}, got {tuple(references.shape)}."
        )
    images, references = images.float(), references.to(images.device, torch.float32)
    perceptual_loss = _perceptual_loss().to(images.device)
    metrics = {
        "psnr": peak_signal_to_noise(images, references),
        "ssim": structural_similarity(images, references),
        "perceptual_distance": perceptual_loss(images * 2 - 1, references * 2 - 1, reduction="none"),
    }
    if lpips is not None:
        lpips = lpips.to(images.device)
        metrics["lpips"] = torch.stack([lpips(a[None], b[None]) for a, b in zip(images, references)])
    return metrics


def peak_signal_to_noise(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of images `(batch, 3, height, width)` in [0, 1], in dB, of shape `(batch,)`."""
    return peak_signal_noise_ratio(images, references, data_range=1.0, dim=(1, 2, 3), reduction="none")


def structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    SSIM of images in [0, 1] as in Wang et al. 2004 and scikit-image: a Gaussian window of 11 pixels (sigma 1.5), the
    mean over channels and over the windows that lie in the image. It is the one SSIM of this package. torchmetrics'
    own mean also counts windows over a reflected border.

    Args:
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1], sides of at least 11 pixels.
        references (`torch.Tensor` of the same shape): In [0, 1].

    Returns:
        `torch.Tensor` of shape `(batch,)`.

    Raises:
        ValueError: If a side is shorter.
    """
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        raise ValueError(f"`images` must have sides of at least {SMALLEST_SIDE}, got {tuple(images.shape)}.")
    _, similarity = structural_similarity_index_measure(
        images, references, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SMALLEST_SIDE // 2
    return similarity[..., border:-border, border:-border].mean(dim=(1, 2, 3))


def load_lpips() -> nn.Module:
    """
    LPIPS (Zhang et al. 2018) of torchmetrics, on AlexNet, for images in [0, 1]. Downloads the weights of its network.

    Raises:
        ImportError: If torchvision is missing.
    """
    if find_spec("torchvision") is None:
        raise ImportError("LPIPS needs a torchvision of the same build as PyTorch; pair metrics work without it.")
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
