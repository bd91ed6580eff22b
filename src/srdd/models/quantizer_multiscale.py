"""The multi-scale residual quantizer (VAR's `VectorQuantizer2` in the paper's notation, Section 3.2 and Appendix B).

Shape legend: B batch, K scales, N all tokens, N_k tokens in scale k, C code channels, V codebook size, H W latent
grid.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from srdd.area_means import area_means
from srdd.scales import split_scales


@dataclass
class QuantizerOutput(BaseOutput):
    """
    What the quantizer makes of a latent map during training.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`):
            The latent state after the last scale kept, with straight-through gradients to the quantizer's input.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The packed token pyramid.
        codebook_loss (`torch.Tensor`): Mean over scales of the squared distance that moves the codes (float32 scalar).
        commitment_loss (`torch.Tensor`): The same distance with the gradient on the encoder's side (float32 scalar).
    """

    latents: torch.Tensor
    token_ids: torch.LongTensor
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor


class MultiScaleQuantizer(nn.Module):
    """
    One codebook shared by all scales and a few residual convolutions shared among them.

    Args:
        codebook_size (`int`): Number of codes V.
        latent_channels (`int`): Channels C of the latent map and of every code.
        scale_sizes (`Sequence[Sequence[int]]`): The model's own scale list, the last entry being its latent grid.
        num_residual_convs (`int`, defaults to 4): How many residual convolutions the scales share.
        residual_ratio (`float`, defaults to 0.5): The `r` of the residual convolutions.
        normalize_codes (`bool`, defaults to `False`): Look codes up by cosine similarity, not Euclidean distance.
    """

    def __init__(
        self,
        codebook_size: int,
        latent_channels: int,
        scale_sizes: Sequence[Sequence[int]],
        num_residual_convs: int = 4,
        residual_ratio: float = 0.5,
        normalize_codes: bool = False,
    ):
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, latent_channels)
        self.residual_convs = nn.ModuleList(
            nn.Conv2d(latent_channels, latent_channels, kernel_size=3, padding=1) for _ in range(num_residual_convs)
        )
        self.residual_ratio = residual_ratio
        self.normalize_codes = normalize_codes
        grid_area = math.prod(scale_sizes[-1])
        self.log_shares = [math.log(math.prod(size) / grid_area) for size in scale_sizes]
        # VAR spreads four convolutions over the scales a little wider than any other number of them.
        margin = (1 / 3 if num_residual_convs == 4 else 1 / 2) / num_residual_convs
        # Summed as numpy's linspace does: among ten scales two lie midway, and rounding decides as it does in VAR.
        step = (1 - margin - margin) / max(num_residual_convs - 1, 1)
        self.conv_positions = [index * step + margin for index in range(num_residual_convs)]

    def residual_conv(self, scale_size: Sequence[int], grid_size: Sequence[int]) -> nn.Conv2d:
        """The convolution of a scale: that of the model's own scale which covers the nearest share of its grid."""
        log_share = math.log(math.prod(scale_size) / math.prod(grid_size))
        distances = [abs(own - log_share) for own in self.log_shares]
        last = len(distances) - 1
        position = distances.index(min(distances)) / last if last else 1.0
        offsets = [abs(tick - position) for tick in self.conv_positions]
        return self.residual_convs[offsets.index(min(offsets))]

    def residual_map(self, token_map: torch.LongTensor, grid_size: Sequence[int]) -> torch.Tensor:
        """
        `phi_k(up(C[z_k]))` of a token map `(B, h, w)`, at latent resolution: `(B, C, H, W)`.

        `phi(x) = (1 - r) x + r conv3x3(x)` repairs what upsampling a coarse code map smears (`r = residual_ratio`).
        """
        codes = self.codebook(token_map).permute(0, 3, 1, 2)  # (B, C, h, w)
        scale_size, grid_size = tuple(codes.shape[-2:]), tuple(grid_size)
        # Autocast would round the map, and with another rest come other tokens at all finer scales. To switch it off
        # takes the host as long as to launch a kernel.
        device_type = codes.device.type
        is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext():
            if scale_size != grid_size:
                codes = F.interpolate(codes, size=grid_size, mode="bicubic")  # (B, C, H, W)
            convolved = self.residual_conv(scale_size, grid_size)(codes)
            return torch.lerp(codes, convolved, self.residual_ratio)

    @torch.no_grad()
    def code_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All codes `(V, C)` in float32, of unit length where cosines are compared, and their square sums `(V,)`."""
        # Reading the table through `forward` lets offloading hooks bring the weight in first.
        table = self.codebook(torch.arange(self.codebook.num_embeddings, device=device)).float()
        table = F.normalize(table, dim=-1) if self.normalize_codes else table
        return table, table.square().sum(dim=1)

    @torch.no_grad()
    def nearest_tokens(
        self, features: torch.Tensor, code_table: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.LongTensor:
        """Ids `(B, h, w)` of the codes nearest to a feature map `(B, C, h, w)`, compared in float32."""
        table, square_sums = self.code_table(features.device) if code_table is None else code_table
        flat = features.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, C)
        with torch.autocast(features.device.type, enabled=False):
            if self.normalize_codes:
                token_ids = (F.normalize(flat, dim=-1) @ table.T).argmax(dim=1)
            else:
                # |x - c|^2 without |x|^2, which is the same for every code.
                token_ids = torch.addmm(square_sums, flat, table.T, alpha=-2).min(dim=1).indices
        return token_ids.view(features.shape[0], *features.shape[-2:])

    @torch.no_grad()
    def quantize(self, latents: torch.Tensor, scale_sizes: Sequence[Sequence[int]]) -> torch.LongTensor:
        """Greedy residual quantization of a latent map `(B, C, H, W)` into packed token ids `(B, N)`."""
        return torch.cat([token_map.flatten(1) for _, token_map, _ in self.lookups(latents, scale_sizes)], dim=1)

    def lookups(
        self, latents: torch.Tensor, scale_sizes: Sequence[Sequence[int]]
    ) -> Iterator[tuple[torch.Tensor, torch.LongTensor, torch.Tensor]]:
        """
        Greedy residual quantization, scale by scale: what is looked up `(B, C, h, w)`, its ids `(B, h, w)`, and their
        residual map `(B, C, H, W)` in float32, which alone has a gradient.
        """
        rest, code_table = latents.detach().float(), self.code_table(latents.device)
        for scale_size in scale_sizes:
            features = area_means(rest, scale_size)
            token_map = self.nearest_tokens(features, code_table)
            residual_map = self.residual_map(token_map, latents.shape[-2:]).float()
            rest = rest - residual_map.detach()
            yield features, token_map, residual_map

    def latent_states(
        self, token_ids: torch.LongTensor, scale_sizes: Sequence[Sequence[int]], grid_size: Sequence[int]
    ) -> list[torch.Tensor]:
        """The latent state after every scale, float32 `(B, C, H, W)` each, summed coarse to fine."""
        state: torch.Tensor | float = 0.0
        states = []
        for token_map in split_scales(token_ids, scale_sizes):
            state = state + self.residual_map(token_map, grid_size).float()
            states.append(state)
        return states

    def forward(
        self,
        latents: torch.Tensor,
        scale_sizes: Sequence[Sequence[int]],
        num_scales: torch.LongTensor | None = None,
    ) -> QuantizerOutput:
        """
        Quantize with gradients: straight-through to `latents`, and VAR's two losses averaged over the scales.
        `num_scales` `(B,)` says after how many scales each image's state is taken; all of them by default.
        """
        target = latents.detach().float()
        state: torch.Tensor | float = 0.0
        states, token_ids = [], []
        for _, token_map, residual_map in self.lookups(target, scale_sizes):
            state = state + residual_map
            states.append(state)
            token_ids.append(token_map.flatten(1))
        codebook_loss = torch.stack([F.mse_loss(state, target) for state in states]).mean()
        commitment_loss = torch.stack([F.mse_loss(latents.float(), state.detach()) for state in states]).mean()
        state = states[-1]
        if num_scales is not None:
            state = torch.stack(states, dim=1)[torch.arange(len(latents), device=latents.device), num_scales - 1]
        straight_through = latents + (state.to(latents.dtype) - latents).detach()
        return QuantizerOutput(straight_through, torch.cat(token_ids, dim=1), codebook_loss, commitment_loss)
