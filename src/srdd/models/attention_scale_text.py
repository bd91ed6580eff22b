"""Attention of the transformer that draws from texts: over scales with rotary positions, and to the text.

Shape legend: B batch, N tokens of the scales at hand, L tokens of the text, D width, H heads.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from srdd.models.attention_scale import RotaryEmbedding, ScaleAttention
from srdd.models.rotary_positions import place_angles


def scale_rotary_embedding(
    scale_sizes: Sequence[Sequence[int]], head_dim: int, rope_theta: float, rope_extent: float, device: torch.device
) -> RotaryEmbedding:
    """
    Cosines and sines of the angles by which pairs of a head's channels turn with their place in the picture.

    The first half of the pairs turns with the column, the second with the row. All scales span the same extent, so
    that tokens at the same place in the picture have nearly the same angles at all of them.

    Args:
        scale_sizes (`Sequence`): `(height, width)` of the packed scales.
        head_dim (`int`): Width of a head, a multiple of 4.
        rope_theta (`float`): Base of the frequencies.
        rope_extent (`float`): The position of the last row and column of every scale; the first is at 0.
        device (`torch.device`): Where they are needed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Float32, of shape `(1, num_tokens, 1, head_dim / 2)`.
    """
    spacings = [[rope_extent / max(side - 1, 1) for side in size] for size in scale_sizes]
    rows, columns = place_angles(scale_sizes, spacings, head_dim, rope_theta, device)  # (N, D/H/4) each
    angles = torch.cat([columns, rows], dim=-1)[None, :, None]  # (1, N, 1, D/H/2)
    return angles.cos(), angles.sin()


def rotated(states: torch.Tensor, rotary: RotaryEmbedding) -> torch.Tensor:
    """Heads `(B, N, H, D / H)` whose pairs of neighbouring channels are turned, in float32."""
    cosines, sines = rotary
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, H, D/H/2)
    turned = first * cosines - second * sines, first * sines + second * cosines
    return torch.stack(turned, dim=-1).flatten(-2)


class RotaryScaleAttention(ScaleAttention):
    """
    Attention over scales with rotary positions. Queries and keys are normalised over the full width, before they are
    split into heads.
    """

    def __init__(self, dim: int, heads: int, norm_eps: float, layer: int):
        super().__init__(dim, heads, qk_norm=False, layer=layer)
        self.norm_eps = norm_eps
        self.scale = (dim // heads) ** -0.5

    def project(
        self, hidden_states: torch.Tensor, image_rotary_emb: RotaryEmbedding
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of hidden states `(B, N, D)`, `(B, N, H, D / H)` each."""
        if self.fused_projections:
            query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        query, key = (F.layer_norm(states, states.shape[-1:], eps=self.norm_eps) for states in (query, key))
        query, key, value = (states.unflatten(-1, (self.heads, -1)) for states in (query, key, value))
        return rotated(query, image_rotary_emb).to(value.dtype), rotated(key, image_rotary_emb).to(value.dtype), value


class TextAttention(nn.Module):
    """
    Attention of image tokens to a text, whose keys and values are the same at all scales. Queries and keys are
    normalised over the full width.
    """

    def __init__(self, dim: int, text_dim: int, heads: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.norm_eps = norm_eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(text_dim, dim)
        self.to_v = nn.Linear(text_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def split(self, states: torch.Tensor) -> torch.Tensor:
        """Heads `(B, H, L, D / H)` of states `(B, L, D)`."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_text(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of a text `(B, L, text_dim)`, `(B, H, L, D / H)` each."""
        key, value = self.to_k(text), self.to_v(text)
        key = F.layer_norm(key, key.shape[-1:], eps=self.norm_eps).to(value.dtype)
        return self.split(key), self.split(value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text_mask: torch.BoolTensor | None = None,
    ) -> torch.Tensor:
        query = self.to_q(hidden_states)
        query = self.split(F.layer_norm(query, query.shape[-1:], eps=self.norm_eps).to(value.dtype))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=text_mask)  # (B, H, N, D/H)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))  # (B, N, D)
