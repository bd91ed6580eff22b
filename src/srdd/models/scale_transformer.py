"""
What all transformers over scales share: their inputs and checks, the way through the blocks, and how they are run.

Shape legend: B batch, K scales, N tokens of the scales at hand, D width, H heads, V codebook.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin

from srdd.acceleration import accelerate, set_fast_linears
from srdd.checks import described, shown
from srdd.models.attention_scale import REACH, MaskedScaleAttnProcessor, ScaleSegment, scale_segments
from srdd.models.guidance import guide
from srdd.models.neighbourhoods import scale_masks
from srdd.models.saved_weights import SavedModelMixin
from srdd.models.scale_cache import ModulationCache, ScaleKVCache


Timesteps = int | Sequence[int] | torch.Tensor

# Modes of `torch.compile` that replay CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def begin_step(*_) -> None:
    """A hook: outputs of earlier forwards may be overwritten from here on, those within this one may not."""
    torch.compiler.cudagraph_mark_step_begin()


class PackedScales(NamedTuple):
    """
    What a forward computes: one scale, or several packed coarse to fine.

    Args:
        segments (`tuple[ScaleSegment, ...]`): Where each scale lies, and what its tokens see.
        kv_cache ([`ScaleKVCache`], *optional*): Keys and values of scales that are not in the inputs.
        token_indices (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*): Which tokens of the one scale
            the inputs are, if not all.
    """

    segments: tuple[ScaleSegment, ...]
    kv_cache: ScaleKVCache | None
    token_indices: torch.LongTensor | None


class ScaleTransformer(SavedModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """
    Base of the transformers that predict the tokens of a scale from the latent state before it.

    A model of this kind has `proj_in`, `scale_embed`, `start_pos_embed` and a `pos_embed`, which is `None` where the
    attention knows positions; `blocks`, each with an `attn` over scales, an `ff` and an `adaln`, or a
    `scale_shift_table` in its place where the model has a `shared_adaln`; `norm_out`, `adaln_out` and `proj_out`. A
    block is called with hidden states, conditioning, segments, cache and mask of its attention, and what it returned
    beside hidden states in an earlier call with the same condition.
    """

    # Attention patterns with which drawing scale after scale needs no [`ScaleKVCache`].
    patterns_without_cache: tuple[str, ...] = ("markov",)

    _supports_gradient_checkpointing = True
    _skip_keys = ["kv_cache", "modulation_cache"]

    gradient_checkpointing = False

    @torch.no_grad()
    def init_weights(self) -> None:
        """VAR's initialisation: small gates, a small head and residual branches scaled by depth."""
        std = math.sqrt(1 / (3 * self.dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for embedding in self.parameters(recurse=False):
            nn.init.trunc_normal_(embedding, std=std)
        self.proj_out.weight.mul_(0.02)
        self.adaln_out.weight.mul_(0.5)
        for block in self.blocks:
            outward = [module.to_out[0] for module in block.children() if hasattr(module, "to_out")]
            for linear in (*outward, block.ff.net[-1]):
                linear.weight.div_(math.sqrt(2 * len(self.blocks)))
            six = block.adaln.weight.unflatten(0, (6, -1)) if hasattr(block, "adaln") else block.scale_shift_table
            six[:2].mul_(1e-5)
            six[2:].mul_(0.5)

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    def add_adapter(self, *args, **kwargs) -> None:
        """As [`~diffusers.loaders.PeftAdapterMixin.add_adapter`]; not where projections are fused."""
        self._check_not_fused()
        super().add_adapter(*args, **kwargs)

    def load_lora_adapter(self, *args, **kwargs) -> None:
        """As [`~diffusers.loaders.PeftAdapterMixin.load_lora_adapter`]; not where projections are fused."""
        self._check_not_fused()
        super().load_lora_adapter(*args, **kwargs)

    def _check_not_fused(self) -> None:
        if any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError(
                "Projections must not be fused where an adapter is added, as it would change nothing: call"
                " `unfuse_qkv_projections` first."
            )

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compile the blocks, as [`~diffusers.ModelMixin.compile_repeated_blocks`] does, with the arguments of
        `torch.compile`.

        With CUDA graphs (`mode="reduce-overhead"`) every forward is then one step of them. Left alone, torch takes
        each call of a compiled block for one, and frees what the block before has returned, which is its input.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        options = kwargs.get("options") or {}
        if kwargs.get("mode") in CUDA_GRAPH_MODES or options.get("triton.cudagraphs"):
            self.register_forward_pre_hook(begin_step)

    def train(self, mode: bool = True) -> "ScaleTransformer":
        """As torch has it. Kernels are chosen then, for what the weights have become: loaded, quantized or trained."""
        accelerate(self)
        return super().train(mode)

    def enable_fast_linears(self) -> None:
        """
        Let linear layers use kernels of oneDNN on CPUs where no gradient is asked for. By default they do where it is
        known to be faster: for float32 on AMD's CPUs with AVX-512, for torchao's int8 weights wherever there is VNNI.
        Logits agree with torch's to rounding; no copies of float32 weights are kept.
        """
        set_fast_linears(self, True)

    def disable_fast_linears(self) -> None:
        """Leave linear layers to torch and torchao."""
        set_fast_linears(self, False)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: Timesteps | None,
        kv_cache: ScaleKVCache | None,
        guidance_weight: float | torch.Tensor | None,
        token_indices: torch.LongTensor | None,
    ) -> PackedScales:
        """What a forward is about, unless an argument that all models have does not fit."""
        last = len(self.token_slices) - 1
        values = timestep.tolist() if hasattr(timestep, "tolist") else timestep  # tensors and arrays
        values = range(last, -1, -1) if values is None else values
        values = list(values) if isinstance(values, (Sequence, range)) and not isinstance(values, str) else [values]
        are_integers = all(isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values)
        falling = are_integers and all(coarse > fine for coarse, fine in zip(values, values[1:]))
        if not values or not falling or min(values) < 0 or max(values) > last:
            raise ValueError(f"`timestep` must be falling integers in [0, {last}], got {shown(values)}.")
        timesteps = [int(value) for value in values]
        cached = [t for t in kv_cache.timesteps if t > timesteps[0]] if kv_cache is not None else []
        num_tokens = [tokens.stop - tokens.start for tokens in (self.token_slices[-1 - t] for t in timesteps)]
        neighbourhoods = self.neighbourhoods(timesteps) if self.config.get("attention_windows") else ()
        packed = map(tuple, (timesteps, num_tokens, cached, neighbourhoods))
        segments = scale_segments(REACH[self.config.attention_pattern], *packed)
        expected = (segments[-1].tokens.stop, self.config.latent_channels)
        if token_indices is not None:
            self._check_token_indices(token_indices, timesteps, kv_cache)
            expected = (token_indices.shape[1], self.config.latent_channels)
            kv_cache = kv_cache.select(kv_cache.image_indices, token_indices)
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            raise ValueError(f"`hidden_states` must be a floating-point tensor, got {described(hidden_states)}.")
        if hidden_states.ndim != 3 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {expected[0]}, {expected[1]}) for the timesteps {timesteps},"
                f" got {tuple(hidden_states.shape)}."
            )
        # A tensor is not looked at: that would wait for its device.
        is_tensor = isinstance(guidance_weight, torch.Tensor) and guidance_weight.shape == ()
        is_weight = isinstance(guidance_weight, numbers.Real) and math.isfinite(guidance_weight)
        if guidance_weight is not None and not is_weight and not (is_tensor and guidance_weight.is_floating_point()):
            raise ValueError(f"`guidance_weight` must be a finite number, got {shown(guidance_weight)}.")
        if guidance_weight is not None and hidden_states.shape[0] % 2:
            raise ValueError(
                "`hidden_states` must be two halves with `guidance_weight`, conditional and unconditional, got a batch"
                f" of {len(hidden_states)}."
            )
        return PackedScales(segments, kv_cache, token_indices)

    def _check_token_indices(
        self, token_indices: torch.LongTensor, timesteps: list[int], kv_cache: ScaleKVCache | None
    ) -> None:
        if len(timesteps) > 1:
            raise ValueError(f"`timestep` must be one scale's with `token_indices`, got {timesteps}.")
        given = None
        if kv_cache is not None:
            given = "one that keeps no scale of its own" if not kv_cache.keeps_own_scale else kv_cache.timesteps
            given = "a read-only one" if kv_cache.is_read_only else given
        if not isinstance(given, list) or timesteps[0] not in given:
            raise ValueError(
                f"`kv_cache` must hold the timestep {timesteps[0]} and not be read only with `token_indices`, got"
                f" {given}."
            )
        tokens = self.token_slices[-1 - timesteps[0]]
        low, high = (bound.item() for bound in token_indices.aminmax())
        if low < 0 or high >= tokens.stop - tokens.start:
            raise ValueError(
                f"`token_indices` must lie in [0, {tokens.stop - tokens.start - 1}], got [{low}, {high}]."
            )

    def _predict(
        self,
        packed: PackedScales,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        condition: torch.Tensor,
        conditioning: Any,
        modulation_cache: ModulationCache | None,
        guidance_weight: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Logits of packed scales: embeddings of start, position and scale, all blocks, the last norm and the head.

        Args:
            packed ([`PackedScales`]): The scales.
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Their embedded inputs.
            embedding (`torch.Tensor` of shape `(batch, dim)`): Of the condition: the coarsest scale starts from it.
            condition (`torch.Tensor` of shape `(batch, dim)`): Its SiLU, by which the last norm is modulated.
            conditioning (`Any`): What all blocks are told of the condition.
            modulation_cache ([`ModulationCache`], *optional*): As in `forward`.
            guidance_weight (`float` or `torch.Tensor`, *optional*): As in `forward`.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, codebook_size)`
        """
        segments, kv_cache, token_indices = packed
        if segments[0].timestep == len(self.token_slices) - 1:
            start_pos_embed = self.start_pos_embed if token_indices is None else self.start_pos_embed[0, token_indices]
            start = embedding.unsqueeze(1) + start_pos_embed
            hidden_states = torch.cat([start, hidden_states[:, start.shape[1] :]], dim=1)
        # Ids are made on the device, so that the host need not send them; by way of `forward`, which brings in weights
        # that are offloaded.
        scales = self.scale_embed(torch.arange(len(self.token_slices), device=hidden_states.device))  # (K, D)
        places = [(scales[-1 - s.timestep], self.token_slices[-1 - s.timestep]) for s in segments]
        if self.pos_embed is None:
            positions = [scale.expand(1, tokens.stop - tokens.start, -1) for scale, tokens in places]
        else:
            positions = [self.pos_embed[:, tokens] + scale for scale, tokens in places]
        positions = positions[0] if len(positions) == 1 else torch.cat(positions, dim=1)
        hidden_states = hidden_states + (positions if token_indices is None else positions[0, token_indices])

        is_stored = modulation_cache is not None and modulation_cache.out is not None
        processor, attention_mask = self.blocks[0].attn.processor, None
        if isinstance(processor, MaskedScaleAttnProcessor):
            attention_mask = processor.attention_mask(segments, kv_cache, hidden_states.device)
        if attention_mask is None and any(segment.neighbourhood for segment in segments):
            neighbourhoods = [segment.neighbourhood for segment in segments]
            attention_mask = scale_masks(neighbourhoods, hidden_states.device, token_indices)
        for layer, block in enumerate(self.blocks):
            states = kv_cache
            if kv_cache is not None and len(segments) == 1:
                like = hidden_states.unflatten(-1, (block.attn.heads, -1))  # (B, N, H, D/H)
                states = kv_cache.seen_by(layer, segments[0].timestep, segments[0].seen, like) or kv_cache
            following = modulation_cache.blocks[layer] if is_stored else ()
            arguments = (hidden_states, conditioning, segments, states, attention_mask, *following)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, *following = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states, *following = block(*arguments)
            if modulation_cache is not None and not is_stored:
                # Copies: where a block is replayed as a CUDA graph, the next forward writes over what it returned.
                modulation_cache.blocks.append([tensor.clone() for tensor in following])
        modulations = modulation_cache.out if is_stored else self.adaln_out(condition)
        if modulation_cache is not None:
            modulation_cache.out = modulations
        scale, shift = modulations.unsqueeze(1).chunk(2, dim=-1)  # each (B, 1, D)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)
        if guidance_weight is not None:
            hidden_states = guide(*hidden_states.unflatten(0, (2, -1)), guidance_weight)
        return self.proj_out(hidden_states)  # (B, N, V)
