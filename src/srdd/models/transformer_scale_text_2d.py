"""The scale transformer that draws from texts: Switti's, with cross-attention and rotary positions.

Shape legend: B batch, N tokens of the scales at hand, L tokens of the text, D width, V codebook.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from srdd.checks import check_list, check_number, described
from srdd.models.attention_scale import AttentionMask, RotaryEmbedding, ScaleSegment
from srdd.models.attention_scale_text import RotaryScaleAttention, TextAttention, scale_rotary_embedding
from srdd.models.configuration import check_configuration, check_num_parameters
from srdd.models.scale_cache import ModulationCache, ScaleKVCache, SeenStates
from srdd.models.scale_transformer import ScaleTransformer, Timesteps
from srdd.scales import ScaleSizes, normalize_scale_sizes, scale_slices


class SizeEmbedding(nn.Module):
    """
    What a model is told of a picture's size and crop: each number by sines and cosines of random frequencies, then a
    projection.

    A number turns a sine many times: frequencies and phases stay in float32, whatever the model's dtype is.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(dim // 8), requires_grad=False)
        self.proj = nn.Linear(8 * (dim // 8), dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SizeEmbedding":
        frequencies = self.frequencies.data
        super()._apply(fn, recurse)
        if self.frequencies.dtype != torch.float32:
            self.frequencies.data = frequencies.to(self.frequencies.device)
        return self

    def forward(self, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embedding `(B, D)` of float32 numbers `(B, 4)`: height, width, top and left."""
        phases = sizes.unsqueeze(-1) * self.frequencies * 2 * math.pi  # (B, 4, D/8)
        return self.proj(torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(1).to(dtype))


class TextConditioning(NamedTuple):
    """
    What the blocks are told. The first three are `None` where all that follows from them is stored.

    Args:
        pooled (`torch.Tensor` of shape `(batch, dim)`, *optional*): Embedding of the pooled text.
        size (`torch.Tensor` of shape `(batch, dim)`, *optional*): Embedding of size and crop.
        text (`torch.Tensor` of shape `(batch, num_text_tokens, cross_attention_dim)`, *optional*): The text.
        text_mask (`torch.BoolTensor` of shape `(batch, 1, 1, num_text_tokens)`, *optional*): True where it is no
            padding.
        image_rotary_emb (`tuple[torch.Tensor, torch.Tensor]`): Where the tokens lie.
    """

    pooled: torch.Tensor | None
    size: torch.Tensor | None
    text: torch.Tensor | None
    text_mask: torch.BoolTensor | None
    image_rotary_emb: RotaryEmbedding


class ScaleTextTransformerBlock(nn.Module):
    """
    Attention over scales and MLP, each modulated and gated by pooled text and size (AdaLN), and attention to the text
    in between. There are norms before and after all three.

    The six modulations are those of [`ScaleTransformerBlock`].
    """

    def __init__(self, dim: int, text_dim: int, heads: int, mlp_ratio: float, norm_eps: float, layer: int):
        super().__init__()
        self.size_scales = nn.Parameter(torch.zeros(dim))
        self.adaln = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.RMSNorm(dim, eps=norm_eps)
        self.attn = RotaryScaleAttention(dim, heads, norm_eps, layer)
        self.norm1_out = nn.RMSNorm(dim, eps=norm_eps)
        self.norm2 = nn.RMSNorm(dim, eps=norm_eps)
        self.norm_text = nn.RMSNorm(text_dim, eps=norm_eps)
        self.attn2 = TextAttention(dim, text_dim, heads, norm_eps)
        self.norm2_out = nn.RMSNorm(dim, eps=norm_eps)
        self.norm3 = nn.RMSNorm(dim, eps=norm_eps)
        self.ff = FeedForward(dim, inner_dim=round(dim * mlp_ratio), activation_fn="swiglu", bias=False)
        self.norm3_out = nn.RMSNorm(dim, eps=norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: TextConditioning,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        modulations: torch.Tensor | None = None,
        text_key: torch.Tensor | None = None,
        text_value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Packed scales.
            conditioning ([`TextConditioning`]): What all blocks are told.
            segments (`Sequence[ScaleSegment]`): The packed scales and what they see.
            kv_cache ([`ScaleKVCache`] or [`SeenStates`], *optional*): Keys and values of scales not in the input.
            attention_mask (`torch.BoolTensor` or `BlockMask`, *optional*): What the attention processor asked for.
            modulations (`torch.Tensor` of shape `(batch, 6, dim)`, *optional*): What follows from `conditioning`, from
                an earlier call.
            text_key (`torch.Tensor` of shape `(batch, heads, num_text_tokens, head_dim)`, *optional*): Likewise.
            text_value (`torch.Tensor` of the same shape, *optional*): Likewise.

        Returns:
            `tuple[torch.Tensor, ...]`: Hidden states, modulations, and the text's key and value.
        """
        if modulations is None:
            condition = F.silu(conditioning.pooled + self.size_scales * conditioning.size)
            gates, scales, shifts = self.adaln(condition).unflatten(-1, (6, -1)).chunk(3, dim=1)  # each (B, 2, D)
            modulations = torch.cat([gates, 1 + scales, shifts], dim=1)
            text_key, text_value = self.attn2.project_text(self.norm_text(conditioning.text))
        gate1, gate2, scale1, scale2, shift1, shift2 = modulations.unsqueeze(2).unbind(1)  # each (B, 1, D)
        modulated = torch.addcmul(shift1, self.norm1(hidden_states), scale1)
        branch = self.attn(modulated, segments, kv_cache, attention_mask, conditioning.image_rotary_emb)
        hidden_states = torch.addcmul(hidden_states, gate1, self.norm1_out(branch))
        branch = self.attn2(self.norm2(hidden_states), text_key, text_value, conditioning.text_mask)
        hidden_states = hidden_states + self.norm2_out(branch)
        branch = self.ff(torch.addcmul(shift2, self.norm3(hidden_states), scale2))
        hidden_states = torch.addcmul(hidden_states, gate2, self.norm3_out(branch))
        return hidden_states, modulations, text_key, text_value


class ScaleTextTransformer2DModel(ScaleTransformer):
    r"""
    Predicts the tokens of a scale from the latent state before it and a text: `p_theta(z_k | x_k, k, text)`.

    The architecture is that of Switti (Voronov et al., 2024). A text comes as the states of its tokens, which all
    blocks attend to, and as one pooled vector, from which the coarsest scale starts and which modulates the blocks.
    Time and packed scales are as in [`ScaleTransformer2DModel`].

    Parameters:
        codebook_size (`int`, defaults to 4096): Number of codes V of the tokenizer.
        latent_channels (`int`, defaults to 32): Channels C of a code.
        scale_sizes (`list`): All scales the model knows, as side lengths or `(height, width)` pairs. Scale embeddings
            belong to this list; a schedule over fewer scales uses a part of them.
        num_layers (`int`, defaults to 30): Number of blocks.
        num_attention_heads (`int`, defaults to 30): Heads of every attention.
        attention_head_dim (`int`, defaults to 64): Width of a head, a multiple of 4; the model's width is heads times
            this, a multiple of 8.
        mlp_ratio (`float`, defaults to 2.6666666666666665): Width of the gated MLP over the model's width.
        cross_attention_dim (`int`, defaults to 2048): Width of the text's states.
        pooled_projection_dim (`int`, defaults to 1280): Width of the pooled text.
        attention_pattern (`str`, defaults to `"markov"`): What a token sees beside the text: `"markov"` (Switti),
            `"causal"` (Switti's autoregressive variant) or `"banded"`, as in [`ScaleTransformer2DModel`].
        rope_theta (`float`, defaults to 10000.0): Base of the frequencies of rotary positions.
        rope_extent (`float`, defaults to 128.0): The position of every scale's last row and column; the first is at 0.
        norm_eps (`float`, defaults to 1e-6): Epsilon of all norms.
        guidance_distilled (`bool`, defaults to `False`): The model learned a teacher's guided distribution: pipelines
            then use no guidance unless asked to.
        codebook_fingerprint (`str`, *optional*): That of the tokenizer's codebook, as it was trained: pipelines refuse
            a tokenizer with another one. Nothing is compared where either has none.

    Raises:
        ValueError: If an argument is of another kind or out of the bounds in [`~srdd.models.configuration`], widths
            are no such multiples, `scale_sizes` is no growing list of scales, or the model would have more than
            2 * 10^10 parameters.
    """

    _no_split_modules = ["ScaleTextTransformerBlock"]
    _repeated_blocks = ["ScaleTextTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pooled_embed", "scale_embed", "size_embed", "norm"]
    _keep_in_fp32_modules = ["frequencies"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 4096,
        latent_channels: int = 32,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        num_layers: int = 30,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        mlp_ratio: float = 2.6666666666666665,
        cross_attention_dim: int = 2048,
        pooled_projection_dim: int = 1280,
        attention_pattern: str = "markov",
        rope_theta: float = 10000.0,
        rope_extent: float = 128.0,
        norm_eps: float = 1e-6,
        guidance_distilled: bool = False,
        codebook_fingerprint: str | None = None,
    ):
        super().__init__()
        checked = check_configuration(self.config)
        scale_sizes = normalize_scale_sizes(scale_sizes)
        self.register_to_config(**checked, scale_sizes=scale_sizes)
        dim = num_attention_heads * attention_head_dim
        if attention_head_dim % 4 or dim % 8:
            raise ValueError(
                "`attention_head_dim` must be a multiple of 4, and `num_attention_heads` times it one of 8, got"
                f" {attention_head_dim} and {num_attention_heads}."
            )
        check_num_parameters(
            num_layers * dim * (dim * (12 + 3 * mlp_ratio) + 2 * cross_attention_dim)
            + dim * (codebook_size + pooled_projection_dim),
            "`num_layers`, `num_attention_heads`, `attention_head_dim`, `mlp_ratio`, `cross_attention_dim`,"
            " `pooled_projection_dim` and `codebook_size`",
        )
        self.token_slices = scale_slices(scale_sizes)
        self.proj_in = nn.Linear(latent_channels, dim)
        self.pooled_embed = nn.Linear(pooled_projection_dim, dim)
        self.size_embed = SizeEmbedding(dim)
        self.scale_embed = nn.Embedding(len(scale_sizes), dim)
        self.pos_embed = None
        self.start_pos_embed = nn.Parameter(torch.empty(1, self.token_slices[0].stop, dim))
        self.blocks = nn.ModuleList(
            ScaleTextTransformerBlock(dim, cross_attention_dim, num_attention_heads, mlp_ratio, norm_eps, layer)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, codebook_size)
        self.init_weights()

    def _check_texts(
        self,
        batch_size: int,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.BoolTensor | None,
        pooled_projections: torch.Tensor | None,
    ) -> None:
        for name, tensor, ndim, width in (
            ("encoder_hidden_states", encoder_hidden_states, 3, self.config.cross_attention_dim),
            ("pooled_projections", pooled_projections, 2, self.config.pooled_projection_dim),
        ):
            is_tensor = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim == ndim
            if not is_tensor or (tensor.shape[0], tensor.shape[-1]) != (batch_size, width) or tensor.numel() == 0:
                tokens = "num_text_tokens, " if ndim == 3 else ""
                raise ValueError(
                    f"`{name}` must be a floating-point tensor of shape ({batch_size}, {tokens}{width}), got"
                    f" {described(tensor)}."
                )
        mask, shape = encoder_attention_mask, tuple(encoder_hidden_states.shape[:2])
        if mask is not None and not (
            isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == shape
        ):
            raise ValueError(
                f"`encoder_attention_mask` must be a boolean tensor of shape {shape}, got {described(mask)}."
            )

    def _sizes(
        self,
        batch_size: int,
        original_size: Sequence[int] | torch.Tensor,
        crop_coords: Sequence[int] | torch.Tensor,
        device: torch.device,
    ) -> torch.Tensor:
        """Height, width, top and left, float32 `(B, 4)`."""
        pairs = []
        for name, pair in (("original_size", original_size), ("crop_coords", crop_coords)):
            if not isinstance(pair, torch.Tensor):
                numbers = [check_number(name, number, low=0) for number in check_list(name, pair, 2)]
                # Filled in on the device, so that the host need not send them.
                pair = torch.stack([torch.full((batch_size,), float(n), device=device) for n in numbers], dim=1)
            elif pair.shape != (batch_size, 2):
                raise ValueError(
                    f"`{name}` must be two numbers or have shape ({batch_size}, 2), got {described(pair)}."
                )
            pairs.append(pair.to(device, torch.float32))
        return torch.cat(pairs, dim=1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Timesteps | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.BoolTensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        original_size: Sequence[int] | torch.Tensor = (512, 512),
        crop_coords: Sequence[int] | torch.Tensor = (0, 0),
        kv_cache: ScaleKVCache | None = None,
        modulation_cache: ModulationCache | None = None,
        guidance_weight: float | torch.Tensor | None = None,
        token_indices: torch.LongTensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, latent_channels)`):
                The inputs `x_k` of one scale, or of several packed coarse to fine, of any floating-point dtype. Those
                of the coarsest scale are not read: the pooled text's embedding stands there.
            timestep (`int`, `Sequence[int]` or `torch.Tensor`, *optional*):
                The scales in `hidden_states`, as falling timesteps `K - 1 ... 0`; all of them by default (training).
            encoder_hidden_states (`torch.Tensor`, *optional*):
                States of the texts' tokens, `(batch, num_text_tokens, cross_attention_dim)`. Never left out: no
                default would do.
            encoder_attention_mask (`torch.BoolTensor` of shape `(batch, num_text_tokens)`, *optional*):
                False where a text is padded, which is not read; at least one token of each text is none. By default
                all are read.
            pooled_projections (`torch.Tensor` of shape `(batch, pooled_projection_dim)`, *optional*):
                Pooled texts. Never left out.
            original_size (`tuple[int, int]` or `torch.Tensor` of shape `(batch, 2)`, defaults to `(512, 512)`):
                Height and width of the picture that a training example was cut from, after its shorter side was made
                512; the default for drawing, whatever the model's size.
            crop_coords (`tuple[int, int]` or `torch.Tensor` of shape `(batch, 2)`, defaults to `(0, 0)`):
                Where it was cut, from top and left.
            kv_cache ([`ScaleKVCache`], *optional*): As in [`ScaleTransformer2DModel`].
            modulation_cache ([`ModulationCache`], *optional*):
                Holds from call to call what follows from texts and sizes: AdaLN modulations, and the texts' keys and
                values. Once it is filled, nothing else of the texts is read than their mask and, at the coarsest
                scale, `pooled_projections`.
            guidance_weight (`float` or float32 `torch.Tensor` of shape `()`, *optional*):
                As in [`ScaleTransformer2DModel`]: the batch is then two halves, and the logits are of half of it.
            token_indices (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*):
                As in [`ScaleTransformer2DModel`]: the tokens of one scale to compute.
            return_dict (`bool`, defaults to `True`): Whether to return a `Transformer2DModelOutput`.

        Returns:
            `Transformer2DModelOutput` or `(sample,)`: Logits of shape `(batch, num_tokens, codebook_size)`.

        Raises:
            ValueError: If there are no texts, they, their mask or sizes are of another shape or kind, or as in
                [`ScaleTransformer2DModel`].
        """
        packed = self._check_inputs(hidden_states, timestep, kv_cache, guidance_weight, token_indices)
        batch_size, device = hidden_states.shape[0], hidden_states.device
        self._check_texts(batch_size, encoder_hidden_states, encoder_attention_mask, pooled_projections)
        scale_sizes = [self.config.scale_sizes[-1 - segment.timestep] for segment in packed.segments]
        head_dim, theta = self.config.attention_head_dim, self.config.rope_theta
        rotary = scale_rotary_embedding(scale_sizes, head_dim, theta, self.config.rope_extent, device)
        if token_indices is not None:
            rotary = tuple(part[0, token_indices] for part in rotary)  # each (B, N, 1, D/H/2)
        dtype, mask = self.start_pos_embed.dtype, encoder_attention_mask
        embedded = self.proj_in(hidden_states.to(dtype))  # (B, N, D)
        pooled, size, text = self.pooled_embed(pooled_projections.to(dtype)), None, None  # (B, D)
        if modulation_cache is None or modulation_cache.out is None:
            size = self.size_embed(self._sizes(batch_size, original_size, crop_coords, device), dtype)
            text = encoder_hidden_states.to(dtype)
            if mask is not None:
                text = text.masked_fill(~mask.unsqueeze(-1), 0.0)  # no weight of attention makes a number of NaN
        text_mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, L)
        conditioning = TextConditioning(None if size is None else pooled, size, text, text_mask, rotary)
        logits = self._predict(
            packed, embedded, pooled, F.silu(pooled), conditioning, modulation_cache, guidance_weight
        )
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
