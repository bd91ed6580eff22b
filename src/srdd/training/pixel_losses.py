"""How far a reconstruction is from a picture: the losses that tokenizers and decoders are trained with."""

from argparse import Namespace

import torch

from srdd.evaluation.perceptual_distance import EfficientNetPerceptualLoss


class PixelLosses:
    """
    Weighted distances between pictures.

    Args:
        args (`Namespace`): With `l1_weight`, `l2_weight` and `perceptual_weight`, whose 0 needs no EfficientNet.
        device (`torch.device`): Where the pictures are.
    """

    def __init__(self, args: Namespace, device: torch.device):
        self.args = args
        self.perceptual = EfficientNetPerceptualLoss().to(device) if args.perceptual_weight > 0 else None

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
            "l1": self.args.l1_weight * error.abs().mean(),
            "l2": self.args.l2_weight * error.square().mean(),
        }
        if with_perceptual and self.perceptual is not None:
            losses["perceptual"] = self.args.perceptual_weight * self.perceptual(sample, target).float()
        return losses
