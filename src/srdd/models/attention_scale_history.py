"""Attention of the transformer with a history: what joins a scale's inputs of those before, and rotary positions.

Shape legend: B batch, K scales, N tokens of the scales at hand, D width, H heads.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from srdd.models.attention_scale import RotaryEmbedding, ScaleAttention, ScaleAttnProcessor, ScaleSegment
from srdd.models.rotary_positions import place_angles
from srdd.models.scale_cache import ScaleKVCache


def history_rotary_embedding(
    scale_sizes: Sequence[Sequence[int]],
    grid_size: Sequence[int],
    head_dim: int,
    rope_theta: float,
    device: torch.device,
) -> RotaryEmbedding:
    """
    Cosines and sines for [`HistoryScaleAttention`], of the tokens' places in the latent grid: row `i` of `h` lies at
    `i / h` of its height.

    Args:
        scale_sizes (`Sequence`): `(height, width)` of the packed scales.
        grid_size (`(int, int)`): Height and width of the latent grid.
        head_dim (`int`): Width of a head, a multiple of 4.
        rope_theta (`float`): Base of the frequencies.
        device (`torch.device`): Where they are needed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Float32, of shape `(1, num_tokens, 1, head_dim)`: of the row in the first
        half of the channels, of the column in the second.
    """
    spacings = [[grid / side for grid, side in zip(grid_size, size)] for size in scale_sizes]
    rows, columns = place_angles(scale_sizes, spacings, head_dim, rope_theta, device)  # (N, D/H/4) each
    angles = torch.cat([rows, rows, columns, columns], dim=-1)[None, :, None]  # (1, N, 1, D/H)
    return angles.cos(), angles.sin()


class HistoryScaleAttention(ScaleAttention):
    """
    Attention over scales with Markov-VAR's rotary positions.

    A channel of the first half of a head makes a pair with the one at the same place in the second half. The first is
    taken with the angle of the row, the second with that of the column. A pair does not turn as a whole then; that is
    how the published models were trained.
    """

    def project(
        self, hidden_states: torch.Tensor, image_rotary_emb: RotaryEmbedding
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of hidden states `(B, N, D)`, `(B, N, H, D / H)` each."""
        query, key, value = super().project(hidden_states)
        query, key = (placed(states, image_rotary_emb).to(value.dtype) for states in (query, key))
        return query, key, value


def placed(states: torch.Tensor, rotary: RotaryEmbedding) -> torch.Tensor:
    """Heads `(B, N, H, D / H)` with their places, in float32."""
    cosines, sines = rotary
    states = states.float()
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


class ScaleHistory(nn.Module):
    """
    Inputs of scales, each with a summary of the last scales and with the image's class (Markov-VAR).

    One learned query for each head looks at the inputs of all tokens of the last scales, the one at hand among them.
    Scales that are left out are not there: the last ones are the last that were visited. In a sampling run keys and
    values stay in the cache, in a layer of their own; a pass at a scale replaces its own.

    Args:
        dim (`int`): Width of the inputs.
        head_dim (`int`): Width of a head.
        layer (`int`): The layer of the cache.
    """

    def __init__(self, dim: int, head_dim: int, layer: int):
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(dim // head_dim, head_dim) / (3 * dim) ** 0.5)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_history = nn.LayerNorm(dim)
        self.proj_history = nn.Linear(dim, dim, bias=False)
        self.proj_out = nn.Linear(dim, dim)

    def pool(
        self, hidden_states: torch.Tensor, segments: Sequence[ScaleSegment], kv_cache: ScaleKVCache | None = None
    ) -> torch.Tensor:
        """Summaries `(B, K, D)` of what scales see, from normalised inputs `(B, N, D)`."""
        heads = len(self.query)
        key, value = (linear(hidden_states).unflatten(-1, (heads, -1)) for linear in (self.to_k, self.to_v))
        query = self.query.to(value.dtype).expand(value.shape[0], -1, -1).unsqueeze(2)  # (B, H, 1, D/H)
        pooled = []
        for segment in segments:
            seen = ScaleAttnProcessor.context(self.layer, segment, key, value, kv_cache)  # (B, ?, H, D/H) each
            pooled.append(F.scaled_dot_product_attention(query, *(states.transpose(1, 2) for states in seen)))
        return self.to_out[0](torch.cat(pooled, dim=2).transpose(1, 2).flatten(2))  # (B, K, D)

    def forward(
        self,
        hidden_states: torch.Tensor,
        class_embedding: torch.Tensor,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Embedded inputs of packed scales, the
                coarsest not among them.
            class_embedding (`torch.Tensor` of shape `(batch, dim)`): Of the images' classes.
            segments (`Sequence[ScaleSegment]`): These scales and the last ones that each of them sees.
            kv_cache ([`ScaleKVCache`], *optional*): Has the scales that are not in the input, and receives those that
                are.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, dim)`
        """
        hidden_states = self.norm(hidden_states)
        pooled = self.pool(hidden_states, segments, kv_cache)  # (B, K, D)
        history = self.proj_history(self.norm_history(pooled + class_embedding.unsqueeze(1)))
        hidden_states = self.proj_out(hidden_states)
        joined = [hidden_states[:, s.tokens] + history[:, k : k + 1] for k, s in enumerate(segments)]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)  # (B, N, D)
