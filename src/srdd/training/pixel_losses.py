"""How far a reconstruction is from a picture: the losses that tokenizers and decoders are trained with."""

import torch

from srdd.evaluation.perceptual_distance import EfficientNetPerceptualLoss
from srdd.training.settings import PixelLossSettings


class PixelLosses:
    """
    Weighted distances between pictures.

    Args:
        settings ([`PixelLossSettings`]): The weights.
        device (`torch.device`): Where the pictures are.
    """

    def __init__(self, settings: PixelLossSettings, device: torch.device):
        self.settings = settings
        self.perceptual = EfficientNetPerceptualLoss().to(device) if settings.perceptual_weight > 0 else None

    def __call__(
        self, sample: torch.Tensor, target: torch.Tensor, with_perceptual: bool = True
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels around [-1, 1].
            target (`torch.Tensor` of the same shape): Pixels in [-1, 1], float32.
            with_perceptual (`bool`, defaults to `True`): Whether the perceptual distance is one of them.

        Returns:
            `dict[str, torch.Tensor]`: Weighted float32 scalars, `"l1"`, `"l2"` and, if there is one, `"perceptual"`.
        """
        error = sample.float() - target
        losses = {
            "l1": self.settings.l1_weight * error.abs().mean(),
            "l2": self.settings.l2_weight * error.square().mean(),
        }
        if with_perceptual and self.perceptual is not None:
            losses["perceptual"] = self.settings.perceptual_weight * self.perceptual(sample, target).float()
        return losses
