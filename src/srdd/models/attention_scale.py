"""Attention over scales: what the patterns let tokens see, and how it is computed.

Shape legend: B batch, N_k tokens in scale k, N tokens of the scales at hand, D width, H heads.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from srdd.acceleration import accelerate
from srdd.kept_tensors import KeptTensors
from srdd.models.configuration import CHOICES
from srdd.models.neighbourhoods import NEIGHBOURHOOD_MASKS, Neighbourhood
from srdd.models.scale_cache import ScaleKVCache, SeenStates
from srdd.scales import MAX_SCALES


ATTENTION_PATTERNS = CHOICES["attention_pattern"]

# How many scales a token sees under each of them, its own among them.
REACH = {"causal": MAX_SCALES, "markov": 1, "banded": 2}

# Cosines and sines of the angles by which tokens turn.
RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]

# What is forbidden: to all packed tokens in one call, or scale by scale, `None` for one that sees its whole context.
AttentionMask = torch.BoolTensor | BlockMask | tuple[torch.BoolTensor | None, ...]


@dataclass(frozen=True)
class ScaleSegment:
    """
    Where one scale lies in the packed input, and what its tokens may see: cached scales and a part of the packed
    tokens, which `seen` names together, as timesteps. Where there is a neighbourhood, they see that part of their own
    scale and nothing else.
    """

    timestep: int
    tokens: slice
    context: slice
    cached: tuple[int, ...]
    seen: tuple[int, ...]
    neighbourhood: Neighbourhood | None = None


@functools.lru_cache(maxsize=512)
def scale_segments(
    reach: int,
    timesteps: tuple[int, ...],
    num_tokens: tuple[int, ...],
    cached: tuple[int, ...] = (),
    neighbourhoods: tuple[Neighbourhood | None, ...] = (),
) -> tuple[ScaleSegment, ...]:
    """
    What each packed scale sees. It is the same in every run, and made once.

    Args:
        reach (`int`): How many scales a token sees, its own among them.
        timesteps (`tuple[int, ...]`): The packed scales, coarse to fine.
        num_tokens (`tuple[int, ...]`): How many tokens each has.
        cached (`tuple[int, ...]`, defaults to `()`): Timesteps of coarser scales that a cache holds, coarse to fine.
        neighbourhoods (`tuple[Neighbourhood, ...]`, defaults to `()`): What the packed scales see of themselves, where
            they see nothing else; all of it where there are none.

    Returns:
        `tuple[ScaleSegment, ...]`
    """
    segments, start = [], 0
    for index, (timestep, count) in enumerate(zip(timesteps, num_tokens)):
        tokens, first = slice(start, start + count), max(0, index + 1 - reach)
        seen_cached = cached[max(0, len(cached) + index + 1 - reach) :]
        seen_from = segments[first].tokens.start if first < index else start
        seen = (*seen_cached, *timesteps[first : index + 1])
        context, neighbourhood = slice(seen_from, tokens.stop), neighbourhoods[index] if neighbourhoods else None
        segments.append(ScaleSegment(timestep, tokens, context, seen_cached, seen, neighbourhood))
        start = tokens.stop
    return tuple(segments)


class ScaleAttnProcessor:
    """One dense attention call per scale: no pattern ever needs an N x N mask. Windows need one of their scale's."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ScaleAttention",
        hidden_states: torch.Tensor,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, image_rotary_emb)  # each (B, N, H, D/H)
        # Nothing but the shape differs from scale to scale in the first two, so that a compiled block serves them all.
        if isinstance(kv_cache, SeenStates):
            seen = [(query, *kv_cache.completed_by(key, value))]
        elif len(segments) == 1 and kv_cache is None:
            seen = [(query, key, value)]
        else:
            seen = [
                (query[:, segment.tokens], *self.context(attn.layer, segment, key, value, kv_cache))
                for segment in segments
            ]
        # FlexAttention is for calls under a mask.
        is_flex = self._attention_backend == AttentionBackendName.FLEX
        backend = AttentionBackendName.NATIVE if is_flex else self._attention_backend
        attended = [
            dispatch_attention_fn(
                *states, attn_mask=mask, scale=attn.scale, backend=backend, parallel_config=self._parallel_config
            )
            for states, mask in zip(seen, attention_mask or [None] * len(seen))
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
        return attn.to_out[0](joined.flatten(2, 3))  # (B, N, D)

    @staticmethod
    @torch.compiler.disable
    def context(
        layer: int, segment: ScaleSegment, key: torch.Tensor, value: torch.Tensor, kv_cache: ScaleKVCache | None
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values that a scale sees, which the cache receives unless it is read only."""
        if kv_cache is not None and not kv_cache.is_read_only:
            kv_cache.update(layer, segment.timestep, key[:, segment.tokens], value[:, segment.tokens])
            return kv_cache.get(layer, segment.seen, len(key))
        packed = key[:, segment.context], value[:, segment.context]
        if kv_cache is None or not segment.cached:
            return packed
        past = kv_cache.get(layer, segment.cached, len(key))
        return tuple(torch.cat(pair, dim=1) for pair in zip(past, packed))


# Of each packed scale: where its queries start and stop, where the keys that they see do, and their neighbourhood.
MaskLayout = tuple[tuple[int, int, int, int, Neighbourhood | None], ...]


def dense_mask(layout: MaskLayout, device: torch.device) -> torch.BoolTensor:
    """`(1, 1, N, N)`, true where attention is allowed."""
    num_tokens = layout[-1][1]
    mask = torch.zeros(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=device)
    for start, stop, first, last, neighbourhood in layout:
        sees = True if neighbourhood is None else NEIGHBOURHOOD_MASKS[neighbourhood, device]
        mask[..., start:stop, first:last] = sees
    return mask


def block_mask(layout: MaskLayout, device: torch.device) -> BlockMask:
    """[`dense_mask`] as FlexAttention reads it: tiles that it forbids altogether are not computed."""
    sizes = torch.tensor([stop - start for start, stop, *_ in layout])
    first, last = (
        torch.tensor(bounds).repeat_interleave(sizes).to(device)  # (N,)
        for bounds in zip(*((first, last) for _, _, first, last, _ in layout))
    )

    def is_seen(batch, head, query, key):
        return (first[query] <= key) & (key < last[query])

    is_near = near(layout, device) if any(neighbourhood for *_, neighbourhood in layout) else None

    def is_seen_nearby(batch, head, query, key):
        return is_seen(batch, head, query, key) & is_near(batch, head, query, key)

    is_seen_at_all = is_seen if is_near is None else is_seen_nearby
    num_tokens = layout[-1][1]
    return create_block_mask(is_seen_at_all, None, None, num_tokens, num_tokens, device)


def near(layout: MaskLayout, device: torch.device) -> Callable[..., torch.Tensor]:
    """Whether a key of a token's scale lies in the token's neighbourhood, as FlexAttention asks it."""
    tables = []
    for start, stop, _, _, neighbourhood in layout:
        if neighbourhood is None:  # one place, which all tokens see
            tables.append(torch.tensor([0, 0, 0, 0, 1]).to(device).unsqueeze(1).expand(-1, stop - start))
            continue
        (height, width), window = neighbourhood.size, neighbourhood.window
        rows, columns = (torch.arange(side, device=device) for side in (height, width))
        top, left = (neighbourhood.starts(axis, device) for axis in (0, 1))
        by_row, by_column = (torch.stack(pair) for pair in ((rows, top), (columns, left)))
        table = [*by_row.repeat_interleave(width, dim=1), *by_column.repeat(1, height)]
        tables.append(torch.stack([*table, torch.full_like(table[0], window)]))
    row, top, column, left, window = (values.contiguous() for values in torch.cat(tables, dim=1))  # (N,) each

    def is_near(batch, head, query, key):
        below, right = row[key] - top[query], column[key] - left[query]
        return (below >= 0) & (below < window[query]) & (right >= 0) & (right < window[query])

    return is_near


# Made once for all layers and calls.
DENSE_MASKS, BLOCK_MASKS = (KeptTensors(make, maxsize=8) for make in (dense_mask, block_mask))


class MaskedScaleAttnProcessor(ScaleAttnProcessor):
    """
    One attention call for all packed scales under an N x N mask, as VAR trains: the same numbers in fewer calls.

    By default the mask is dense, and what it forbids is computed all the same. With the backend "flex" it is a
    `BlockMask`, and most of that is left out. FlexAttention wants compiled blocks: without a compiler it holds the
    scores of all pairs of tokens, and on CPUs it has no gradients.

    ```py
    transformer.set_attn_processor(MaskedScaleAttnProcessor())
    with attention_backend():  # of diffusers.models.attention_dispatch: other models keep theirs
        transformer.set_attention_backend("flex")  # after the processor: a new one has the default backend
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    ```

    Inputs of a single scale, and calls with a cache, need none of these. They go the usual way, and under "flex" to
    torch's own attention.
    """

    def attention_mask(
        self, segments: Sequence[ScaleSegment], kv_cache: ScaleKVCache | None, device: torch.device
    ) -> torch.BoolTensor | BlockMask | None:
        """The mask that all layers of a forward want, made ahead of it: compiled blocks do not make it."""
        if kv_cache is not None or len(segments) == 1:
            return None
        layout = tuple(
            (s.tokens.start, s.tokens.stop, s.context.start, s.context.stop, s.neighbourhood) for s in segments
        )
        masks = BLOCK_MASKS if self._attention_backend == AttentionBackendName.FLEX else DENSE_MASKS
        return masks[layout, device]

    def __call__(
        self,
        attn: "ScaleAttention",
        hidden_states: torch.Tensor,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        if attention_mask is None or isinstance(attention_mask, tuple):
            return super().__call__(attn, hidden_states, segments, kv_cache, attention_mask, image_rotary_emb)
        query, key, value = attn.project(hidden_states, image_rotary_emb)  # each (B, N, H, D/H)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=attn.scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](attended.flatten(2, 3))  # (B, N, D)


class ScaleAttention(nn.Module, AttentionModuleMixin):
    """
    Self-attention with VAR's query-key normalisation.

    The projections are named as diffusers' LoRA scripts expect. VAR's has no bias on the keys; converted checkpoints
    carry zeros there.
    """

    _default_processor_cls = ScaleAttnProcessor
    _available_processors = [ScaleAttnProcessor, MaskedScaleAttnProcessor]

    use_bias = True
    max_query_scale = math.log(100)

    def __init__(self, dim: int, heads: int, qk_norm: bool, layer: int):
        super().__init__()
        self.heads = heads
        self.layer = layer
        self.qk_norm = qk_norm
        if qk_norm:
            self.scale = 1.0
            self.query_scale = nn.Parameter(torch.full((heads, 1), math.log(4.0)))
        else:
            self.scale = 0.25 / math.sqrt(dim // heads)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(self._default_processor_cls())

    def fuse_projections(self) -> None:
        """
        As diffusers' own.

        Raises:
            ValueError: If an adapter is not merged, which the fused projection would leave out.
        """
        if not all(getattr(layer, "merged", True) for layer in (self.to_q, self.to_k, self.to_v)):
            raise ValueError(
                "An adapter must be merged (`fuse_lora`) before projections are fused, got one that is not."
            )
        super().fuse_projections()
        accelerate(self)

    def project(
        self, hidden_states: torch.Tensor, image_rotary_emb: RotaryEmbedding | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Query, key and value of hidden states `(B, N, D)`, `(B, N, H, D / H)` each; the first two normalised. Where
        projections are fused, that is one step for both. Nothing is turned here: positions are embedded.
        """
        if self.fused_projections:
            states = self.to_qkv(hidden_states).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D/H)
            matched, value = states[:, :, :2], states[:, :, 2]
            query, key = (F.normalize(matched, dim=-1) if self.qk_norm else matched).unbind(2)
        else:
            projections = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
            query, key, value = (states.unflatten(-1, (self.heads, -1)) for states in projections)  # (B, N, H, D/H)
            if self.qk_norm:
                query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        if self.qk_norm:
            query = query * self.query_scale.clamp(max=self.max_query_scale).exp()
        query, key = query.to(value.dtype), key.to(value.dtype)
        return query, key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, segments, kv_cache, attention_mask, image_rotary_emb)
