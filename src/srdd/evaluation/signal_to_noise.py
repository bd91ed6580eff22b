"""
The signal-to-noise ratio of every scale (paper, Section 3.2 (3) and Figure 3).

The paper says that the ratio rises from scale to scale, as it does along a diffusion, and gives no formula for it.
Here the signal is what the chain ends in, and the noise is what a state still lacks of it: `state = signal - noise`,
as a diffusion's state is signal plus noise. With `f_k` the latent state after k of K scales,

    SNR_k = sum |f_K|^2 / sum |f_K - f_k|^2    and, in pixels,    sum |D(f_K)|^2 / sum |D(f_K) - D(f_k)|^2

where `D` decodes and the sums run over all images, positions and channels. Energies are taken about 0, the state that
every image starts from (`SNR_0 = 1`, 0 dB) and the mid grey of pixels in [-1, 1]. `SNR_K` is infinite. Nothing forces
the ratio to rise; a trained tokenizer makes it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from srdd.models import MultiScaleVQModel
from srdd.scales import ScaleSizes, normalize_scale_sizes


@dataclass
class SignalToNoise:
    """
    Signal-to-noise ratios, one number for each scale, coarse to fine; infinite at the last.

    Args:
        scale_sizes (`list[list[int]]`): `[height, width]` of the scales.
        latent (`list[float]`): Ratios of energies in the space of latent states, above 0.
        pixel (`list[float]`): Ratios of energies of decoded pixels, above 0.
        num_images (`int`): How many images they were measured on.
    """

    scale_sizes: list[list[int]]
    latent: list[float]
    pixel: list[float]
    num_images: int

    @property
    def latent_db(self) -> list[float]:
        """`latent` in decibels."""
        return [_decibels(ratio) for ratio in self.latent]

    @property
    def pixel_db(self) -> list[float]:
        """`pixel` in decibels."""
        return [_decibels(ratio) for ratio in self.pixel]


def _decibels(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def _energy(values: torch.Tensor) -> float:
    return values.float().square().sum().item()


@torch.no_grad()
def signal_to_noise(
    vqvae: MultiScaleVQModel, batches: Iterable[torch.Tensor], scale_sizes: ScaleSizes | None = None
) -> SignalToNoise:
    """
    Measure the signal-to-noise ratio of every scale on images.

    Only sums are kept from batch to batch; how images are batched changes nothing beyond rounding.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        batches (`Iterable[torch.Tensor]`): Pixels of shape `(batch, 3, height, width)` in [-1, 1].
        scale_sizes (`list`, *optional*): Any growing list of scales that ends at the latent grid; the model's own by
            default.

    Returns:
        [`SignalToNoise`]: Over the final latent and the decoded image, clamped to [-1, 1], of the same tokens.

    Raises:
        ValueError: If there is no image, or the scales do not grow or do not end at the latent grid.
    """
    scale_sizes = normalize_scale_sizes(vqvae.config.scale_sizes if scale_sizes is None else scale_sizes)
    signal, noise, num_images = [0.0, 0.0], [[0.0, 0.0] for _ in scale_sizes], 0
    for sample in batches:
        token_ids = vqvae.tokenize(sample.to(vqvae.device, vqvae.dtype), scale_sizes)
        latents = vqvae.latent_states(token_ids, scale_sizes)
        pixels = [vqvae.decode(state).sample.float().clamp(-1, 1) for state in latents]
        for space, states in enumerate((latents, pixels)):
            signal[space] += _energy(states[-1])
            for scale, state in enumerate(states):
                noise[scale][space] += _energy(states[-1] - state)
        num_images += len(sample)
    if num_images == 0:
        raise ValueError("`batches` must hold at least one image, got none.")
    latent, pixel = (
        [signal[space] / lacking[space] if lacking[space] else math.inf for lacking in noise] for space in (0, 1)
    )
    return SignalToNoise(scale_sizes, latent, pixel, num_images)
