"""A perceptual loss that needs no download: the features of EfficientNet-Lite0, which installs from PyPI."""

import torch
import torch.nn as nn

from srdd.evaluation.features import enlarge_small, load_efficientnet_lite0


class EfficientNetPerceptualLoss(nn.Module):
    """
    Mean squared distance between unit-normalised features of two images at five depths of EfficientNet-Lite0, the
    recipe of LPIPS without its learned weights.

    Raises:
        ImportError: If EfficientNet-Lite0 is not installed.
    """

    # Last block at every resolution of the network.
    feature_blocks = (0, 2, 4, 10, 15)

    def __init__(self):
        super().__init__()
        network = load_efficientnet_lite0()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Unit-normalised feature maps of pixels in [-1, 1]."""
        hidden_states = self.stem(enlarge_small(pixels) * (127.5 / 128.0) + 0.5 / 128.0)
        features = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if index in self.feature_blocks:
                features.append(nn.functional.normalize(hidden_states, dim=1, eps=1e-6))
        return features

    def forward(self, sample: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels around [-1, 1].
            target (`torch.Tensor` of the same shape): Pixels in [-1, 1].
            reduction (`str`, defaults to `"mean"`): `"mean"` over images, or `"none"` for one value for each.

        Returns:
            `torch.Tensor`: A scalar, or of shape `(batch,)`.

        Raises:
            ValueError: If `reduction` is unknown.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
        with torch.no_grad():
            wanted = self.features(target)
        errors = [(a - b).square().sum(dim=1) for a, b in zip(self.features(sample), wanted)]  # (B, h, w) each
        if reduction == "none":
            return torch.stack([error.mean(dim=(1, 2)) for error in errors]).sum(dim=0)
        return torch.stack([error.mean() for error in errors]).sum()
