from dataclasses import dataclass

import torch
from diffusers.guiders import BaseGuidance

from srdd.models import ModulationCache, ScaleKVCache, ScaleTransformer
from srdd.pipelines.conditions import Conditions
from srdd.scales import Scale
from srdd.schedulers import ScaleScheduler


@dataclass
class Guidance:
    """
    How strongly the scales of a run are guided.

    Args:
        is_guided (`dict[int, bool]`): Whether at all, by timestep: what the run computes depends on it.
        weights (`torch.Tensor` of shape `(num_scales,)`): The weights `w` of `cond + w (cond - uncond)` of all scales
            that the model knows, coarse to fine, float32. They lie on the device: a run does not look at them.
        guider (`BaseGuidance`, *optional*): What joins the two halves instead of the weights.
    """

    is_guided: dict[int, bool]
    weights: torch.Tensor
    guider: BaseGuidance | None = None

    @classmethod
    def of(
        cls,
        scheduler: ScaleScheduler,
        guidance_scale: float,
        device: torch.device | None = None,
        guider: BaseGuidance | None = None,
    ) -> "Guidance":
        """The guidance of a schedule; a scale of 1 and below is off. A guider's steps are the scales."""
        weights = [0.0] * len(scheduler.config.scale_sizes)
        for scale in scheduler.visits:
            weights[-1 - scale.timestep] = scheduler.guidance_weight(scale.timestep, guidance_scale)
        is_guided = {scale.timestep: weights[-1 - scale.timestep] > 0 for scale in scheduler.visits}
        guidance = cls(is_guided, torch.tensor(weights, device=device), guider)
        if guider is not None:
            guidance.is_guided = {timestep: guidance.guider_at(timestep).num_conditions > 1 for timestep in is_guided}
        return guidance

    def guider_at(self, timestep: int) -> BaseGuidance:
        """The guider, told where in the run it is."""
        self.guider.set_state(list(self.is_guided).index(timestep), len(self.is_guided), timestep)
        return self.guider


class GuidedTransformer:
    """
    A transformer under classifier-free guidance (paper, Section 3.3 a), for one sampling run: what it is told, and
    what one forward leaves for the next.

    Args:
        transformer ([`ScaleTransformer`]): The model.
        conditions ([`Conditions`]): What it is told.
        guidance ([`Guidance`]): Of the run as it begins; it may be replaced later.
        num_tokens (`int`): Tokens of all scales of the run.

    `kv_cache` is the run's cache where the model looks back, `None` elsewhere. It keeps what finer scales see.
    """

    def __init__(
        self,
        transformer: ScaleTransformer,
        conditions: Conditions,
        guidance: Guidance,
        num_tokens: int,
    ):
        self.transformer = transformer
        self.guidance = guidance
        self.batch_size = conditions.batch_size
        looks_back = transformer.config.attention_pattern not in transformer.patterns_without_cache
        self.kv_cache = ScaleKVCache(num_tokens, keeps_own_scale=False) if looks_back else None
        guided = [timestep for timestep, is_guided in guidance.is_guided.items() if is_guided]
        # Guided scales look back at what the unconditional half has seen of all scales before.
        self.last_guided = guided[-1] if guided and self.kv_cache is not None else None
        # Without and with an unconditional half.
        self.told = {False: conditions.conditional}
        if conditions.unconditional is not None:
            halves = conditions.conditional, conditions.unconditional
            self.told[True] = {name: torch.cat([half[name] for half in halves]) for name in conditions.conditional}
        self.modulation_caches = {False: ModulationCache(), True: ModulationCache()}

    def __call__(
        self,
        hidden_states: torch.Tensor,
        scale: Scale,
        kv_cache: ScaleKVCache | None = None,
        image_indices: torch.LongTensor | None = None,
        token_indices: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_scale_tokens, latent_channels)`): Inputs of one scale,
                of the whole batch.
            scale ([`Scale`]): The scale. Where it is not guided, the unconditional half is not computed, unless guided
                scales will look back at it.
            kv_cache ([`ScaleKVCache`], *optional*): Keys and values; by default the run's.
            image_indices (`torch.LongTensor` of shape `(num_images,)`, *optional*): The images to compute, by their
                places in the batch; all by default.
            token_indices (`torch.LongTensor` of shape `(num_images, num_indices)`, *optional*): The tokens of the
                scale to compute; all by default.

        Returns:
            `torch.Tensor` of shape `(num_images, num_indices, codebook_size)`: Logits.

        Raises:
            ValueError: If guidance begins after the run has, and the model looks back.
        """
        is_guided, weight = self.guidance.is_guided[scale.timestep], self.guidance.weights[-1 - scale.timestep]
        if is_guided and self.kv_cache is not None and self.last_guided is None:
            raise ValueError(
                "`guidance_scale` must be above 1 from the start to be so later with a transformer that looks back"
                f" ({type(self.transformer).__name__}, {self.transformer.config.attention_pattern!r}), got a weight of"
                f" {weight.item()} at timestep {scale.timestep}."
            )
        looked_back_at = self.last_guided is not None and scale.timestep >= self.last_guided
        two_halves = True in self.told and (is_guided or looked_back_at)
        told, modulation_cache = self.told[two_halves], self.modulation_caches[two_halves]
        kv_cache = self.kv_cache if kv_cache is None else kv_cache
        if image_indices is not None:
            hidden_states = hidden_states[image_indices]
            if two_halves:
                image_indices = torch.cat([image_indices, image_indices + self.batch_size])
            told = {name: tensor[image_indices] for name, tensor in told.items()}
            modulation_cache = modulation_cache.select(image_indices)
            kv_cache = kv_cache.select(image_indices) if kv_cache is not None else None
        if token_indices is not None:
            hidden_states = hidden_states.take_along_dim(token_indices.unsqueeze(-1), dim=1)
            token_indices = torch.cat([token_indices, token_indices]) if two_halves else token_indices
        has_guider = two_halves and self.guidance.guider is not None
        logits = self.transformer(
            torch.cat([hidden_states, hidden_states]) if two_halves else hidden_states,
            scale.timestep,
            **told,
            kv_cache=kv_cache,
            modulation_cache=modulation_cache,
            guidance_weight=weight if two_halves and not has_guider else None,
            token_indices=token_indices,
        ).sample
        return self.guidance.guider_at(scale.timestep).forward(*logits.chunk(2)).pred if has_guider else logits
