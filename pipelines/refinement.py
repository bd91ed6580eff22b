"""Further passes at one scale: what they compute of it, and what they see (paper, Section 4.2)."""

import torch

from srdd.models import ScaleKVCache
from srdd.pipelines.guided_transformer import GuidedTransformer
from srdd.scales import Scale


class RefinedScale:
    """
    The logits of a scale over several passes.

    Later scales look back at what the model was trained to see of this one, its first pass: further ones leave the
    run's cache as it is.

    Args:
        guided ([`GuidedTransformer`]): The model.
        scale ([`Scale`]): The scale.
        keeps_accepted (`bool`): Whether further passes compute nothing but the tokens that they draw again. These see
            the others as the pass did that accepted them.
    """

    def __init__(self, guided: GuidedTransformer, scale: Scale, keeps_accepted: bool):
        self.guided = guided
        self.scale = scale
        self.keeps_accepted = keeps_accepted
        self.kv_cache: ScaleKVCache | None = None
        self.logits: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor, resample_mask: torch.BoolTensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_scale_tokens, latent_channels)`): Inputs of the scale:
                of the state before it, then of the state with the tokens of the pass before.
            resample_mask (`torch.BoolTensor` of shape `(batch, num_scale_tokens)`, *optional*): The tokens that a
                further pass draws, at least one; all by default. Images without any are finished at this scale, and
                not computed.

        Returns:
            `torch.Tensor` of shape `(batch, num_scale_tokens, codebook_size)`: Logits, those of an earlier pass where
            nothing was computed.
        """
        if self.logits is None:
            return self.first_pass(hidden_states)
        if resample_mask is None:
            return self.guided(hidden_states, self.scale, self.kv_cache)
        unfinished = resample_mask.any(dim=1).nonzero().squeeze(1)
        image_indices = None if len(unfinished) == len(resample_mask) else unfinished
        token_indices = indices_of(resample_mask[unfinished]) if self.keeps_accepted else None
        computed = self.guided(hidden_states, self.scale, self.kv_cache, image_indices, token_indices)
        if token_indices is not None:
            self.logits[unfinished.unsqueeze(1), token_indices] = computed
        else:
            self.logits = computed if image_indices is None else self.logits.index_copy(0, image_indices, computed)
        return self.logits

    def first_pass(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens, and the cache that further passes are given."""
        run_cache, own_cache = self.guided.kv_cache, None
        if self.keeps_accepted:
            own_cache = ScaleKVCache() if run_cache is None else run_cache.keeping_own_scale()
        self.logits = self.guided(hidden_states, self.scale, own_cache)
        if run_cache is not None:
            own_cache = run_cache.read_only() if own_cache is None else own_cache.clone()
        self.kv_cache = own_cache
        return self.logits


def indices_of(mask: torch.BoolTensor) -> torch.LongTensor:
    """
    Where a mask `(batch, num_tokens)` is true, image by image in order, as `(batch, num_indices)`. Images with fewer
    places than others repeat their first one.
    """
    counts = mask.sum(dim=1, keepdim=True)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
    return torch.where(torch.arange(order.shape[1], device=mask.device) < counts, order, order[:, :1])
