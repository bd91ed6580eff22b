"""The scale transformer with a history: Markov-VAR's, whose scales see a summary of the last ones in their inputs.

It is a class of its own: a gated MLP, RMS norms, rotary positions without a table of positions, and inputs with a
history would be as many flags of the first one.

Shape legend: B batch, N tokens of the scales at hand, D width, H heads, V codebook.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from srdd.models.attention_scale import AttentionMask, RotaryEmbedding, ScaleSegment, scale_segments
from srdd.models.attention_scale_history import HistoryScaleAttention, ScaleHistory, history_rotary_embedding
from srdd.models.configuration import check_configuration, check_num_parameters
from srdd.models.scale_cache import ModulationCache, ScaleKVCache, SeenStates
from srdd.models.scale_class_transformer import ClassScaleTransformer, class_names
from srdd.models.scale_transformer import PackedScales, Timesteps
from srdd.models.transformer_scale_2d import ScaleTransformerBlock
from srdd.scales import ScaleSizes, normalize_scale_sizes, scale_slices


class HistoryConditioning(NamedTuple):
    """
    What the blocks are told.

    Args:
        condition (`torch.Tensor` of shape `(batch, dim)`): SiLU of the class embedding.
        image_rotary_emb (`tuple[torch.Tensor, torch.Tensor]`): Where the tokens lie.
    """

    condition: torch.Tensor
    image_rotary_emb: RotaryEmbedding


class ScaleHistoryTransformerBlock(ScaleTransformerBlock):
    """[`ScaleTransformerBlock`] with RMS norms, rotary positions and a gated MLP without biases."""

    norm_class = nn.RMSNorm
    attention_class = HistoryScaleAttention
    feed_forward = {"activation_fn": "swiglu", "bias": False}

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: HistoryConditioning,
        segments: Sequence[ScaleSegment],
        kv_cache: ScaleKVCache | SeenStates | None = None,
        attention_mask: AttentionMask | None = None,
        modulations: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`ScaleTransformerBlock`], which has the place of the tokens beside its conditioning."""
        condition, image_rotary_emb = conditioning
        return super().forward(
            hidden_states, condition, segments, kv_cache, attention_mask, modulations, image_rotary_emb
        )


class ScaleHistoryTransformer2DModel(ClassScaleTransformer):
    r"""
    Predicts the tokens of a scale from the latent state before it and a few earlier ones.

    The architecture is that of Markov-VAR (Zhang et al., 2025). A scale's tokens see each other. What was before comes
    with their inputs: a summary of the last scales' inputs and of the image's class. Time and packed scales are as in
    [`ScaleTransformer2DModel`].

    Parameters:
        codebook_size (`int`, defaults to 4096): Number of codes V of the tokenizer.
        latent_channels (`int`, defaults to 32): Channels C of a code.
        scale_sizes (`list`): All scales the model knows, as side lengths or `(height, width)` pairs. Scale embeddings
            belong to this list; a schedule over fewer scales uses a part of them.
        num_layers (`int`, defaults to 16): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Heads of every attention.
        attention_head_dim (`int`, defaults to 64): Width of a head, a multiple of 4; the model's width is heads times
            this.
        mlp_ratio (`float`, defaults to 2.75): Width of the gated MLP over the model's width.
        num_classes (`int`, defaults to 1000): Number of classes; 0 is an unconditional model. The id `num_classes`
            itself is the null class of classifier-free guidance.
        attention_pattern (`str`, defaults to `"markov"`): What a token sees: `"markov"` (Markov-VAR), `"causal"` or
            `"banded"`, as in [`ScaleTransformer2DModel`]. The history is there in any case.
        qk_norm (`bool`, defaults to `True`): L2-normalise queries and keys, with a learned temperature per head.
        history_window (`int`, defaults to 3): How many scales the history is of: the last that are visited, the one at
            hand among them. The coarsest scale has no inputs and is none of them.
        history_head_dim (`int`, defaults to 128): Width of a head of the attention that makes it, a divisor of the
            model's width.
        rope_theta (`float`, defaults to 10000.0): Base of the frequencies of rotary positions.
        class_dropout_prob (`float`, defaults to 0.1): Share of labels replaced by the null class in training mode.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last block; it grows linearly from zero.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the blocks' norms and the last one.
        id2label (`dict`, *optional*): Names of the classes.
        guidance_distilled (`bool`, defaults to `False`): The model learned a teacher's guided distribution: pipelines
            then use no guidance unless asked to.
        codebook_fingerprint (`str`, *optional*): That of the tokenizer's codebook, as it was trained: pipelines refuse
            a tokenizer with another one. Nothing is compared where either has none.

    Raises:
        ValueError: If an argument is of another kind or out of the bounds in [`~srdd.models.configuration`], widths
            are no such multiples, `scale_sizes` is no growing list of scales, `id2label` names classes that do not
            exist, or the model would have more than 2 * 10^10 parameters.
    """

    _no_split_modules = ["ScaleHistoryTransformerBlock", "ScaleHistory"]
    _repeated_blocks = ["ScaleHistoryTransformerBlock"]
    _skip_layerwise_casting_patterns = ["class_embed", "scale_embed", "norm"]

    patterns_without_cache = ()  # the history is in the cache
    labels_of_both_halves = ("history_class_labels",)

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 4096,
        latent_channels: int = 32,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        mlp_ratio: float = 2.75,
        num_classes: int = 1000,
        attention_pattern: str = "markov",
        qk_norm: bool = True,
        history_window: int = 3,
        history_head_dim: int = 128,
        rope_theta: float = 10000.0,
        class_dropout_prob: float = 0.1,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        id2label: dict[int, str] | None = None,
        guidance_distilled: bool = False,
        codebook_fingerprint: str | None = None,
    ):
        super().__init__()
        checked = check_configuration(self.config)
        scale_sizes = normalize_scale_sizes(scale_sizes)
        self.register_to_config(**checked, scale_sizes=scale_sizes, id2label=class_names(id2label, num_classes))
        dim = num_attention_heads * attention_head_dim
        if attention_head_dim % 4 or dim % history_head_dim:
            raise ValueError(
                "`attention_head_dim` must be a multiple of 4, and `num_attention_heads` times it one of"
                f" `history_head_dim`, got {attention_head_dim}, {num_attention_heads} and {history_head_dim}."
            )
        check_num_parameters(
            dim * (num_layers * dim * (10 + 3 * mlp_ratio) + 5 * dim + codebook_size + num_classes),
            "`num_layers`, `num_attention_heads`, `attention_head_dim`, `mlp_ratio`, `codebook_size` and"
            " `num_classes`",
        )
        self.token_slices = scale_slices(scale_sizes)
        self.proj_in = nn.Linear(latent_channels, dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.scale_embed = nn.Embedding(len(scale_sizes), dim)
        self.pos_embed = None
        # Markov-VAR has none; converted checkpoints carry zeros there.
        self.start_pos_embed = nn.Parameter(torch.empty(1, self.token_slices[0].stop, dim))
        self.history = ScaleHistory(dim, history_head_dim, layer=num_layers)
        self.blocks = nn.ModuleList(
            ScaleHistoryTransformerBlock(
                dim=dim,
                heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                shared_adaln=False,
                drop_path_rate=drop_path_rate * layer / max(num_layers - 1, 1),
                norm_eps=norm_eps,
                layer=layer,
            )
            for layer in range(num_layers)
        )
        self.norm_out = nn.RMSNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, codebook_size)
        self.init_weights()

    def _recall(
        self, hidden_states: torch.Tensor, class_embedding: torch.Tensor, packed: PackedScales
    ) -> torch.Tensor:
        """Embedded inputs `(B, N, D)`, those of all scales but the coarsest with their history."""
        last = len(self.token_slices) - 1
        scales = [segment for segment in packed.segments if segment.timestep < last]
        if not scales:
            return hidden_states
        start, timesteps = scales[0].tokens.start, [segment.timestep for segment in scales]
        num_tokens = [segment.tokens.stop - segment.tokens.start for segment in scales]
        stored = packed.kv_cache.timesteps if packed.kv_cache is not None else []
        cached = [timestep for timestep in stored if timesteps[0] < timestep < last]
        segments = scale_segments(self.config.history_window, *map(tuple, (timesteps, num_tokens, cached)))
        recalled = self.history(hidden_states[:, start:], class_embedding, segments, packed.kv_cache)
        return torch.cat([hidden_states[:, :start], recalled], dim=1) if start else recalled

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Timesteps | None = None,
        class_labels: torch.LongTensor | None = None,
        kv_cache: ScaleKVCache | None = None,
        modulation_cache: ModulationCache | None = None,
        guidance_weight: float | torch.Tensor | None = None,
        token_indices: torch.LongTensor | None = None,
        history_class_labels: torch.LongTensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, latent_channels)`):
                The inputs `x_k` of one scale, or of several packed coarse to fine, of any floating-point dtype. Those
                of the coarsest scale are not read: the class embedding stands there.
            timestep (`int`, `Sequence[int]` or `torch.Tensor`, *optional*):
                The scales in `hidden_states`, as falling timesteps `K - 1 ... 0`; all of them by default (training).
                Only scales that are visited are in a history.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Class ids in `[0, num_classes]`; `num_classes` is the null class, the default.
            kv_cache ([`ScaleKVCache`], *optional*):
                Has what the scales in `hidden_states` look back at, which is their history whatever the pattern is,
                and receives theirs.
            modulation_cache ([`ModulationCache`], *optional*):
                Holds the AdaLN modulations of `class_labels` from call to call.
            guidance_weight (`float` or float32 `torch.Tensor` of shape `()`, *optional*):
                As in [`ScaleTransformer2DModel`]: the batch is then two halves, and the logits are of half of it.
            token_indices (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*):
                As in [`ScaleTransformer2DModel`]: the tokens of one scale to compute. Their part of the history is
                replaced, too.
            history_class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The classes that join the history, `class_labels` by default. Guidance tells both halves the image's
                class here; start and modulations of the unconditional half are those of the null class.
            return_dict (`bool`, defaults to `True`): Whether to return a `Transformer2DModelOutput`.

        Returns:
            `Transformer2DModelOutput` or `(sample,)`: Logits of shape `(batch, num_tokens, codebook_size)`.

        Raises:
            ValueError: As in [`ScaleTransformer2DModel`], of `history_class_labels`, too.
        """
        packed = self._check_inputs(hidden_states, timestep, kv_cache, guidance_weight, token_indices)
        class_embedding = self._embed_classes(hidden_states, class_labels, self.config.class_dropout_prob)  # (B, D)
        history_embedding = class_embedding
        if history_class_labels is not None:
            history_embedding = self._embed_classes(hidden_states, history_class_labels, name="history_class_labels")
        embedded = self.proj_in(hidden_states.to(self.start_pos_embed.dtype))  # (B, N, D)
        embedded = self._recall(embedded, history_embedding, packed)

        scale_sizes, theta = self.config.scale_sizes, self.config.rope_theta
        sizes = [scale_sizes[-1 - segment.timestep] for segment in packed.segments]
        rotary = history_rotary_embedding(
            sizes, scale_sizes[-1], self.config.attention_head_dim, theta, hidden_states.device
        )
        if token_indices is not None:
            rotary = tuple(part[0, token_indices] for part in rotary)  # each (B, N, 1, D/H)
        if kv_cache is not None and self.config.attention_pattern == "markov" and not kv_cache.keeps_own_scale:
            packed = packed._replace(kv_cache=None)
        condition = F.silu(class_embedding)
        logits = self._predict(
            packed,
            embedded,
            class_embedding,
            condition,
            HistoryConditioning(condition, rotary),
            modulation_cache,
            guidance_weight,
        )
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
