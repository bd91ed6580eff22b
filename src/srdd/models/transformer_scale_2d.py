"""The scale transformer: VAR's AdaLN transformer with exchangeable attention over scales.

Shape legend: B batch, K scales, N_k tokens in scale k, N tokens of the scales at hand, D width, H heads, C code
channels, V codebook.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from srdd.models.attention_scale import AttentionMask, RotaryEmbedding, ScaleAttention, ScaleSegment
from srdd.models.configuration import check_configuration, check_num_parameters
from srdd.models.neighbourhoods import Neighbourhood, check_windows
from srdd.models.scale_cache import ModulationCache, ScaleKVCache, SeenStates
from srdd.models.scale_class_transformer import ClassScaleTransformer, class_names
from srdd.models.scale_transformer import Timesteps
from srdd.scales import ScaleSizes, normalize_scale_sizes, scale_slices


class ScaleTransformerBlock(nn.Module):
    """
    Attention and MLP, each modulated and gated by the class embedding (AdaLN).

    The six modulations are, in order: gates of attention and MLP, scales of both, to which 1 was added, shifts of
    both.
    """

    # What it is made of.
    norm_class: type[nn.Module] = nn.LayerNorm
    attention_class: type[ScaleAttention] = ScaleAttention
    feed_forward: dict[str, Any] = {"activation_fn": "gelu-approximate"}

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        shared_adaln: bool,
        drop_path_rate: float,
        norm_eps: float,
        layer: int,
    ):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = self.norm_class(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = self.attention_class(dim, heads, qk_norm, layer)
        self.norm2 = self.norm_class(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=round(dim * mlp_ratio), **self.feed_forward)
        if shared_adaln:
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        else:
            self.adaln = nn.Linear(dim, 6 * dim)

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        """Stochastic depth: a residual branch is dropped for whole images."""
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path_rate
        return branch * (kept / (1 - self.drop_path_rate)).to(branch.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        modulations: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Packed scales.
            conditioning (`torch.Tensor` of shape `(batch, dim)`): SiLU of the class embedding; of shape
                `(batch, 6 * dim)` and already projected if the model shares its AdaLN.
            segments (`Sequence[ScaleSegment]`): The packed scales and what they see.
            kv_cache ([`ScaleKVCache`] or [`SeenStates`], *optional*): Keys and values of scales not in the input.
            attention_mask (`torch.BoolTensor`, `BlockMask` or `tuple`, *optional*): What the attention processor
                asked for, or the masks of the scales' windows.
            modulations (`torch.Tensor` of shape `(batch, 6, dim)`, *optional*): What follows from `conditioning`, from
                an earlier call.
            image_rotary_emb (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Where the tokens lie, for an attention
                that asks for it.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Hidden states and modulations.
        """
        if modulations is None:
            if hasattr(self, "adaln"):
                modulations = self.adaln(conditioning).unflatten(-1, (6, -1))  # (B, 6, D)
            else:
                modulations = conditioning.unflatten(-1, (6, -1)) + self.scale_shift_table
            gates, scales, shifts = modulations.chunk(3, dim=1)
            modulations = torch.cat([gates, 1 + scales, shifts], dim=1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulations.unsqueeze(2).unbind(1)  # each (B, 1, D)
        modulated = torch.addcmul(shift1, self.norm1(hidden_states), scale1)  # AdaLN
        branch = self.attn(modulated, segments, kv_cache, attention_mask, image_rotary_emb)
        drops_paths = self.training and torch.is_grad_enabled() and self.drop_path_rate > 0
        hidden_states = torch.addcmul(hidden_states, gate1, self.drop_path(branch) if drops_paths else branch)
        branch = self.ff(torch.addcmul(shift2, self.norm2(hidden_states), scale2))
        hidden_states = torch.addcmul(hidden_states, gate2, self.drop_path(branch) if drops_paths else branch)
        return hidden_states, modulations


class ScaleTransformer2DModel(ClassScaleTransformer):
    r"""
    Predicts the tokens of a scale from the latent state before it: `p_theta(z_k | x_k, k, y)`.

    Time runs as in diffusion, `t = K - 1` (coarsest) to `t = 0` (finest). Scales are packed, coarse to fine.

    Parameters:
        codebook_size (`int`, defaults to 4096): Number of codes V of the tokenizer.
        latent_channels (`int`, defaults to 32): Channels C of a code.
        scale_sizes (`list`): All scales the model knows, as side lengths or `(height, width)` pairs. Position and
            scale embeddings belong to this list; a schedule over fewer scales uses a part of them.
        num_layers (`int`, defaults to 16): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Heads of every attention.
        attention_head_dim (`int`, defaults to 64): Width of a head; the model's width is heads times this.
        mlp_ratio (`float`, defaults to 4.0): Width of the MLP over the model's width.
        num_classes (`int`, defaults to 1000): Number of classes; 0 is an unconditional model. The id `num_classes`
            itself is the null class of classifier-free guidance.
        attention_pattern (`str`, defaults to `"markov"`): What a token sees. `"markov"`: the inputs of its own scale,
            which are the previous state, so that the scales form a Markov chain (paper, Definition 1; SDD).
            `"causal"`: its own and all coarser scales (VAR). `"banded"`: its own and the scale just before it.
            Weights fit all three.
        qk_norm (`bool`, defaults to `True`): L2-normalise queries and keys, with a learned temperature per head.
        shared_adaln (`bool`, defaults to `False`): One AdaLN projection for all blocks, as VAR's 512px model.
        class_dropout_prob (`float`, defaults to 0.1): Share of labels replaced by the null class in training mode.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last block; it grows linearly from zero.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.
        id2label (`dict`, *optional*): Names of the classes.
        guidance_distilled (`bool`, defaults to `False`): The model learned a teacher's guided distribution: pipelines
            then use no guidance unless asked to.
        attention_windows (`list[int]`, *optional*): With the pattern "markov", the side of the square that a token
            sees of its own scale, one odd number for each of `scale_sizes`; 0 is the whole scale (MVAR). Weights fit
            any.
        codebook_fingerprint (`str`, *optional*): That of the tokenizer's codebook, as it was trained: pipelines refuse
            a tokenizer with another one. Nothing is compared where either has none.

    Raises:
        ValueError: If an argument is of another kind or out of the bounds in [`~srdd.models.configuration`],
            `scale_sizes` is no growing list of scales, `id2label` names classes that do not exist,
            `attention_windows` do not fit the scales or the pattern, or the model would have more than 2 * 10^10
            parameters.
    """

    _no_split_modules = ["ScaleTransformerBlock"]
    _repeated_blocks = ["ScaleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["class_embed", "scale_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 4096,
        latent_channels: int = 32,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        attention_pattern: str = "markov",
        qk_norm: bool = True,
        shared_adaln: bool = False,
        class_dropout_prob: float = 0.1,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        id2label: dict[int, str] | None = None,
        guidance_distilled: bool = False,
        attention_windows: list[int] | None = None,
        codebook_fingerprint: str | None = None,
    ):
        super().__init__()
        checked = check_configuration(self.config)
        scale_sizes = normalize_scale_sizes(scale_sizes)
        attention_windows = check_windows(attention_windows, scale_sizes, attention_pattern)
        self.register_to_config(
            **checked,
            scale_sizes=scale_sizes,
            id2label=class_names(id2label, num_classes),
            attention_windows=attention_windows,
        )

        self.token_slices = scale_slices(scale_sizes)
        dim = num_attention_heads * attention_head_dim
        num_embeddings = codebook_size + num_classes + self.token_slices[-1].stop
        check_num_parameters(
            num_layers * dim**2 * (4 + 2 * mlp_ratio + 6 * (not shared_adaln)) + num_embeddings * dim,
            "`num_layers`, `num_attention_heads`, `attention_head_dim`, `mlp_ratio`, `codebook_size`, `num_classes`"
            " and `scale_sizes`",
        )
        self.proj_in = nn.Linear(latent_channels, dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.scale_embed = nn.Embedding(len(scale_sizes), dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.token_slices[-1].stop, dim))
        self.start_pos_embed = nn.Parameter(torch.empty(1, self.token_slices[0].stop, dim))
        self.adaln = nn.Linear(dim, 6 * dim) if shared_adaln else None
        self.blocks = nn.ModuleList(
            ScaleTransformerBlock(
                dim=dim,
                heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                shared_adaln=shared_adaln,
                drop_path_rate=drop_path_rate * layer / max(num_layers - 1, 1),
                norm_eps=norm_eps,
                layer=layer,
            )
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, codebook_size)
        self.init_weights()

    def neighbourhoods(self, timesteps: Sequence[int]) -> list[Neighbourhood | None]:
        """
        What the tokens of scales see of their own scale; `None` where that is all of it.

        Raises:
            ValueError: If there are windows, and the pattern is not "markov".
        """
        sizes, pattern = self.config.scale_sizes, self.config.attention_pattern
        windows = check_windows(self.config.attention_windows, sizes, pattern) or [0] * len(sizes)
        scales = [(sizes[-1 - timestep], windows[-1 - timestep]) for timestep in timesteps]
        return [Neighbourhood(tuple(size), window) if window else None for size, window in scales]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Timesteps | None = None,
        class_labels: torch.LongTensor | None = None,
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
                of the coarsest scale are not read: the class embedding stands there.
            timestep (`int`, `Sequence[int]` or `torch.Tensor`, *optional*):
                The scales in `hidden_states`, as falling timesteps `K - 1 ... 0`; all of them by default (training).
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Class ids in `[0, num_classes]`; `num_classes` is the null class, the default.
            kv_cache ([`ScaleKVCache`], *optional*):
                Gives the patterns "causal" and "banded" the scales that are not in `hidden_states`, and receives those
                that are.
            modulation_cache ([`ModulationCache`], *optional*):
                Holds the AdaLN modulations of `class_labels` from call to call.
            guidance_weight (`float` or float32 `torch.Tensor` of shape `()`, *optional*):
                The weight `w` of classifier-free guidance. The first half of the batch is then the conditional one,
                the second the unconditional one, and the logits are those of `cond + w (cond - uncond)`, of half the
                batch. The halves are merged before the last layer, which is linear.
            token_indices (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*):
                Which tokens of its scale `hidden_states` holds, if not all. It holds one scale then, and `kv_cache`
                must have it from an earlier forward: the keys and values of these tokens are replaced there, and they
                see the others as the cache has them. An index may occur twice with the same input.
            return_dict (`bool`, defaults to `True`): Whether to return a `Transformer2DModelOutput`.

        Returns:
            `Transformer2DModelOutput` or `(sample,)`: Logits of shape `(batch, num_tokens, codebook_size)`.

        Raises:
            ValueError: If `timestep` is not falling or out of range, `hidden_states` does not hold those scales or
                tokens, there is not one class label for each image, a label is out of range, `guidance_weight` is no
                finite number, or `token_indices` come without a cache that holds their scale. Labels are not read back
                from accelerators, which would wait for it: on CUDA one out of range is a device-side assertion.
        """
        packed = self._check_inputs(hidden_states, timestep, kv_cache, guidance_weight, token_indices)
        class_embedding = self._embed_classes(hidden_states, class_labels, self.config.class_dropout_prob)  # (B, D)
        condition = conditioning = F.silu(class_embedding)
        if self.adaln is not None and (modulation_cache is None or modulation_cache.out is None):
            conditioning = self.adaln(condition)
        embedded = self.proj_in(hidden_states.to(self.start_pos_embed.dtype))  # (B, N, D)
        logits = self._predict(
            packed, embedded, class_embedding, condition, conditioning, modulation_cache, guidance_weight
        )
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
