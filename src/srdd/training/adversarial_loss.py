"""The adversarial loss of the tokenizer (VQGAN, Esser et al. 2021, Section 3.1)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator


class PatchDiscriminator(nn.Sequential):
    """
    Tells real from reconstructed patches (pix2pix's PatchGAN, with group norms: no state but its weights).

    Args:
        in_channels (`int`, defaults to 3): Channels of the images.
        channels (`int`, defaults to 64): Channels after the first layer; they double with every further one.
        num_layers (`int`, defaults to 3): Layers that halve the resolution.

    Input: pixels in [-1, 1] of shape `(batch, in_channels, height, width)`, sides at least `3 * 2 ** num_layers`.
    Output: logits of shape `(batch, 1, height // 2 ** num_layers - 2, ...)`, positive where a patch looks real.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, num_layers + 1):
            wider = min(8, 2**layer) * channels
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider // 4), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (scalar)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the tokenizer (scalar)."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    accelerator: Accelerator,
    largest: float = 1e4,
) -> torch.Tensor:
    """
    The weight under which the adversarial loss pulls as hard at the decoder's last layer as the reconstruction loss
    (VQGAN, Equation 7); the same on all processes.

    Args:
        reconstruction_loss (`torch.Tensor`): Scalar.
        adversarial_loss (`torch.Tensor`): Scalar.
        last_layer (`torch.Tensor`): Weights of the decoder's last layer.
        accelerator (`Accelerator`): Averages the gradients over the processes.
        largest (`float`, defaults to 1e4): Upper bound.

    Returns:
        `torch.Tensor`: Scalar without gradient.
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        [gradient] = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(accelerator.reduce(gradient, reduction="mean").norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=largest)
