"""The scale transformer: VAR's AdaLN transformer with exchangeable attention over scales.

Shape legend: B batch, K scales, N_k tokens in scale k, N tokens of the scales at hand, D width, H heads, C code
channels, V codebook.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from types import NoneType

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from srdd.acceleration import accelerate, set_fast_linears
from srdd.checks import described, shown
from srdd.models.attention_scale import (
    AttentionMask,
    MaskedScaleAttnProcessor,
    ScaleAttention,
    ScaleSegment,
    scale_segments,
)
from srdd.models.configuration import check_configuration, check_num_parameters
from srdd.models.guidance import guide
from srdd.models.neighbourhoods import Neighbourhood, check_windows, scale_masks
from srdd.models.saved_weights import SavedModelMixin
from srdd.models.scale_cache import ModulationCache, ScaleKVCache, SeenStates
from srdd.scales import ScaleSizes, normalize_scale_sizes, scale_slices


Timesteps = int | Sequence[int] | torch.Tensor

# Modes of `torch.compile` that replay CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class ScaleTransformerBlock(nn.Module):
    """
    Attention and MLP, each modulated and gated by the class embedding (AdaLN).

    The six modulations are, in order: gates of attention and MLP, scales of both, to which 1 was added, shifts of
    both.
    """

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
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = ScaleAttention(dim, heads, qk_norm, layer)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=round(dim * mlp_ratio), activation_fn="gelu-approximate")
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
        modulations: torch.Tensor | None = None,
        attention_mask: AttentionMask | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Packed scales.
            conditioning (`torch.Tensor` of shape `(batch, dim)`): SiLU of the class embedding; of shape
                `(batch, 6 * dim)` and already projected if the model shares its AdaLN.
            segments (`Sequence[ScaleSegment]`): The packed scales and what they see.
            kv_cache ([`ScaleKVCache`] or [`SeenStates`], *optional*): Keys and values of scales not in the input.
            modulations (`torch.Tensor` of shape `(batch, 6, dim)`, *optional*): What follows from `conditioning`, from
                an earlier call.
            attention_mask (`torch.BoolTensor`, `BlockMask` or `tuple`, *optional*): What the attention processor
                asked for, or the masks of the scales' windows.

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
        branch = self.attn(modulated, segments, kv_cache, attention_mask)
        drops_paths = self.training and torch.is_grad_enabled() and self.drop_path_rate > 0
        hidden_states = torch.addcmul(hidden_states, gate1, self.drop_path(branch) if drops_paths else branch)
        branch = self.ff(torch.addcmul(shift2, self.norm2(hidden_states), scale2))
        hidden_states = torch.addcmul(hidden_states, gate2, self.drop_path(branch) if drops_paths else branch)
        return hidden_states, modulations


def begin_step(*_) -> None:
    """A hook: outputs of earlier forwards may be overwritten from here on, those within this one may not."""
    torch.compiler.cudagraph_mark_step_begin()


def class_names(id2label: Mapping[int | str, str] | None, num_classes: int) -> dict[str, str]:
    """
    Names of classes as JSON has them: it turns integer keys into strings.

    Raises:
        ValueError: If a class does not exist, or a name is no string.
    """
    if not isinstance(id2label, (Mapping, NoneType)):
        raise ValueError(f"`id2label` must be a dict of names by class id, got {shown(id2label)}.")
    names = {str(index): name for index, name in (id2label or {}).items()}
    unknown = sorted(index for index in names if not re.fullmatch(r"[0-9]{1,9}", index) or int(index) >= num_classes)
    if unknown:
        raise ValueError(f"`id2label` must name classes in [0, {num_classes - 1}], got {shown(unknown)}.")
    wrong = [name for name in names.values() if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"`id2label` must hold names that are strings, got {shown(wrong)}.")
    return names


class ScaleTransformer2DModel(SavedModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
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

    Raises:
        ValueError: If an argument is of another kind or out of the bounds in [`~srdd.models.configuration`],
            `scale_sizes` is no growing list of scales, `id2label` names classes that do not exist,
            `attention_windows` do not fit the scales or the pattern, or the model would have more than 2 * 10^10
            parameters.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ScaleTransformerBlock"]
    _repeated_blocks = ["ScaleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["class_embed", "scale_embed", "norm"]
    _skip_keys = ["kv_cache", "modulation_cache"]

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
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """VAR's initialisation: small gates, a small head and residual branches scaled by depth."""
        std = math.sqrt(1 / (3 * self.pos_embed.shape[-1]))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        nn.init.trunc_normal_(self.start_pos_embed, std=std)
        self.proj_out.weight.mul_(0.02)
        self.adaln_out.weight.mul_(0.5)
        for block in self.blocks:
            for linear in (block.attn.to_out[0], block.ff.net[-1]):
                linear.weight.div_(math.sqrt(2 * len(self.blocks)))
            six = block.adaln.weight.unflatten(0, (6, -1)) if hasattr(block, "adaln") else block.scale_shift_table
            six[:2].mul_(1e-5)
            six[2:].mul_(0.5)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return {int(index): name for index, name in self.config.id2label.items()}

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def needs_kv_cache(self) -> bool:
        """Whether drawing scale after scale needs a [`ScaleKVCache`]."""
        return self.config.attention_pattern != "markov"

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

    def train(self, mode: bool = True) -> "ScaleTransformer2DModel":
        """As torch has it. Kernels are chosen then, for what the weights have become: loaded, quantized or trained."""
        accelerate(self)
        return super().train(mode)

    def enable_fast_linears(self) -> None:
        """
        Let linear layers use kernels of oneDNN on CPUs where no gradient is asked for. By default they do where it is
        known to be faster: for float32 on AMD's CPUs from Zen 5 on, for torchao's int8 weights wherever there is VNNI.
        Logits agree with torch's to rounding; no copies of float32 weights are kept.
        """
        set_fast_linears(self, True)

    def disable_fast_linears(self) -> None:
        """Leave linear layers to torch and torchao."""
        set_fast_linears(self, False)

    def _check_timesteps(self, timestep: Timesteps | None) -> list[int]:
        last = len(self.token_slices) - 1
        if timestep is None:
            return list(range(last, -1, -1))
        values = timestep.tolist() if hasattr(timestep, "tolist") else timestep  # tensors and arrays
        values = list(values) if isinstance(values, (Sequence, range)) and not isinstance(values, str) else [values]
        are_integers = all(isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values)
        falling = are_integers and all(coarse > fine for coarse, fine in zip(values, values[1:]))
        if not values or not falling or min(values) < 0 or max(values) > last:
            raise ValueError(f"`timestep` must be falling integers in [0, {last}], got {shown(values)}.")
        return [int(value) for value in values]

    def _check_token_indices(
        self, token_indices: torch.LongTensor, timesteps: list[int], kv_cache: ScaleKVCache | None
    ) -> None:
        if len(timesteps) > 1:
            raise ValueError(f"`timestep` must be one scale's with `token_indices`, got {timesteps}.")
        if kv_cache is None or kv_cache.is_read_only or timesteps[0] not in kv_cache.places:
            read_only = kv_cache is not None and kv_cache.is_read_only
            given = "a read-only one" if read_only else None if kv_cache is None else kv_cache.timesteps
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

    def _embed(
        self,
        hidden_states: torch.Tensor,
        class_embedding: torch.Tensor,
        timesteps: list[int],
        token_indices: torch.LongTensor | None,
    ) -> torch.Tensor:
        """Input, position and scale embeddings; the coarsest scale starts from the class embedding (SOS)."""
        embedded = self.proj_in(hidden_states.to(self.pos_embed.dtype))  # (B, N, D)
        if timesteps[0] == len(self.token_slices) - 1:
            start_pos_embed = self.start_pos_embed if token_indices is None else self.start_pos_embed[0, token_indices]
            start = class_embedding.unsqueeze(1) + start_pos_embed
            embedded = torch.cat([start, embedded[:, start.shape[1] :]], dim=1)
        # Ids are made on the device, so that the host need not send them; by way of `forward`, which brings in weights
        # that are offloaded.
        scales = self.scale_embed(torch.arange(len(self.token_slices), device=embedded.device))  # (K, D)
        scale_ids = [len(self.token_slices) - 1 - timestep for timestep in timesteps]
        positions = [self.pos_embed[:, self.token_slices[k]] + scales[k] for k in scale_ids]
        positions = positions[0] if len(positions) == 1 else torch.cat(positions, dim=1)
        return embedded + (positions if token_indices is None else positions[0, token_indices])

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
        timesteps = self._check_timesteps(timestep)
        cached = [t for t in kv_cache.timesteps if t > timesteps[0]] if kv_cache is not None else []
        num_tokens = [tokens.stop - tokens.start for tokens in (self.token_slices[-1 - t] for t in timesteps)]
        neighbourhoods = self.neighbourhoods(timesteps) if self.config.attention_windows else ()
        segments = scale_segments(self.config.attention_pattern, timesteps, num_tokens, cached, neighbourhoods)
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
        null_class = self.config.num_classes
        if class_labels is None:
            class_labels = torch.full((hidden_states.shape[0],), null_class, device=hidden_states.device)
        # A tensor is not looked at: that would wait for its device.
        is_tensor = isinstance(guidance_weight, torch.Tensor) and guidance_weight.shape == ()
        is_weight = isinstance(guidance_weight, numbers.Real) and math.isfinite(guidance_weight)
        if guidance_weight is not None and not is_weight and not (is_tensor and guidance_weight.is_floating_point()):
            raise ValueError(f"`guidance_weight` must be a finite number, got {shown(guidance_weight)}.")
        if guidance_weight is not None and len(hidden_states) % 2:
            raise ValueError(
                "`hidden_states` must be two halves with `guidance_weight`, conditional and unconditional, got a batch"
                f" of {len(hidden_states)}."
            )
        if not isinstance(class_labels, torch.Tensor) or class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`class_labels` must be an int64 or int32 tensor, got {described(class_labels)}.")
        if class_labels.shape != hidden_states.shape[:1]:
            raise ValueError(
                f"`class_labels` must have shape ({hidden_states.shape[0]},), got {tuple(class_labels.shape)}."
            )
        # A training step wants gradients; drawing with a model in training mode does not depend on that mode.
        if self.training and torch.is_grad_enabled() and self.config.class_dropout_prob > 0:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, null_class, class_labels)

        try:
            class_embedding = self.class_embed(class_labels)  # (B, D)
        except IndexError as error:
            low, high = (bound.item() for bound in class_labels.aminmax())
            raise ValueError(f"`class_labels` must lie in [0, {null_class}], got [{low}, {high}].") from error
        hidden_states = self._embed(hidden_states, class_embedding, timesteps, token_indices)  # (B, N, D)
        stored = modulation_cache if modulation_cache is not None else ModulationCache()
        is_stored = stored.out is not None
        condition = F.silu(class_embedding)
        conditioning = condition if self.adaln is None or is_stored else self.adaln(condition)
        processor, attention_mask = self.blocks[0].attn.processor, None
        if isinstance(processor, MaskedScaleAttnProcessor):
            attention_mask = processor.attention_mask(segments, kv_cache, hidden_states.device)
        if attention_mask is None and neighbourhoods:
            attention_mask = scale_masks(neighbourhoods, hidden_states.device, token_indices)
        for layer, block in enumerate(self.blocks):
            states = kv_cache
            if kv_cache is not None and len(segments) == 1:
                like = hidden_states.unflatten(-1, (block.attn.heads, -1))  # (B, N, H, D/H)
                states = kv_cache.seen_by(layer, timesteps[0], segments[0].seen, like) or kv_cache
            modulations = stored.blocks[layer] if is_stored else None
            inputs = (hidden_states, conditioning, segments, states, modulations, attention_mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, modulations = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states, modulations = block(*inputs)
            if modulation_cache is not None and not is_stored:
                # A copy: where a block is replayed as a CUDA graph, the next forward writes over what it returned.
                modulation_cache.blocks.append(modulations.clone())
        modulations = stored.out if is_stored else self.adaln_out(condition)
        if modulation_cache is not None:
            modulation_cache.out = modulations
        scale, shift = modulations.unsqueeze(1).chunk(2, dim=-1)  # each (B, 1, D)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)
        if guidance_weight is not None:
            hidden_states = guide(*hidden_states.chunk(2), guidance_weight)
        logits = self.proj_out(hidden_states)  # (B, N, V)
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
