"""The sampling loop that all SRDD pipelines share, and the checks that make their parts fit each other."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch

from srdd.models import ModulationCache, MultiScaleVQModel, ScaleKVCache, ScaleTransformer2DModel, TokenCritic
from srdd.pipelines.known_region import KnownRegion
from srdd.schedulers import ScaleScheduler
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


# Called after every pass with (index, timestep, {"latents": ..., "token_ids": ...}); what it returns replaces them,
# and a "guidance_scale" in it holds from the next pass on.
StepCallback = Callable[[int, int, dict[str, Any]], dict[str, Any]]


def check_components(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer2DModel,
    scheduler: ScaleScheduler,
    token_critic: TokenCritic | None = None,
) -> None:
    """
    Make sure that tokenizer, transformer, schedule and critic belong together.

    Raises:
        ValueError: If the scheduler is of another kind, its scales are not the transformer's, tokenizer and
            transformer differ in latent grid, codebook size or channels, the critic reads another width or other codes
            than the transformer's, or the schedule needs one and there is none.
    """
    if not isinstance(scheduler, ScaleScheduler):
        raise ValueError(f"`scheduler` must be a ScaleScheduler, got {type(scheduler).__name__}.")
    if scheduler.config.scale_sizes != transformer.config.scale_sizes:
        raise ValueError(
            "`scheduler.config.scale_sizes` must be the scales of the transformer,"
            f" {transformer.config.scale_sizes}, got {scheduler.config.scale_sizes}. For fewer steps keep"
            " `scale_sizes` and set `scales`."
        )
    facts = [
        ("latent grid", vqvae.config.scale_sizes[-1], transformer.config.scale_sizes[-1]),
        ("codebook_size", vqvae.config.codebook_size, transformer.config.codebook_size),
        ("latent_channels", vqvae.config.latent_channels, transformer.config.latent_channels),
    ]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise ValueError(f"`vqvae` and `transformer` must have the same {name}, got {ours} and {theirs}.")
    if token_critic is not None and token_critic.config.dim != transformer.dim:
        raise ValueError(
            f"`token_critic` must read hidden states of the transformer's width, {transformer.dim}, got"
            f" {token_critic.config.dim}."
        )
    if token_critic is not None and token_critic.config.codebook_size != transformer.config.codebook_size:
        raise ValueError(
            f"`token_critic` must know the transformer's {transformer.config.codebook_size} codes, got"
            f" {token_critic.config.codebook_size}."
        )
    if token_critic is None and scheduler.config.resampling_policy == "learned":
        raise ValueError("`token_critic` must be a TokenCritic with the resampling policy 'learned', got None.")


def label_ids(class_labels, num_classes: int, id2label: dict[int, str]) -> list[int]:
    """
    Class ids of labels given by id or by name.

    Args:
        class_labels (`int`, `str`, `torch.Tensor` or a list of `int` and `str`): One label or many. A name may be any
            of the comma-separated synonyms of a class.
        num_classes (`int`): Ids lie in `[0, num_classes - 1]`.
        id2label (`dict[int, str]`): Names of the classes.

    Returns:
        `list[int]`

    Raises:
        ValueError: If a label is out of range, unknown or names several classes, or there is none.
    """
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.flatten().tolist()
    labels = [class_labels] if isinstance(class_labels, (Integral, str)) else list(class_labels)
    if not labels:
        raise ValueError(f"`class_labels` must hold at least one label, got {class_labels!r}.")
    by_name: dict[str, set[int]] = {}
    for index, names in id2label.items():
        for name in {names, *names.split(", ")}:
            by_name.setdefault(name, set()).add(index)
    ids = []
    for label in labels:
        if isinstance(label, str):
            found = sorted(by_name.get(label, ()))
            if not found:
                known = sorted(set(id2label.values()))
                shown = ", ".join(known[:10]) + (f" … ({len(known)} in all)" if len(known) > 10 else "")
                raise ValueError(f"`class_labels` must be names of classes ({shown or 'none'}) or ids, got {label!r}.")
            if len(found) > 1:
                raise ValueError(f"`class_labels` must name one class each, but {label!r} names the classes {found}.")
            label = found[0]
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            allowed = f"lie in [0, {num_classes - 1}]" if num_classes else "be None for an unconditional model"
            raise ValueError(f"`class_labels` must {allowed}, got {label!r}.")
        ids.append(int(label))
    return ids


class GuidedTransformer:
    """
    A transformer under classifier-free guidance, `cond + w (cond - uncond)` (paper Section 3.3 a), for one sampling
    run and its class labels.

    Args:
        transformer ([`ScaleTransformer2DModel`]): The model.
        class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids.
    """

    def __init__(self, transformer: ScaleTransformer2DModel, class_labels: torch.LongTensor):
        self.transformer = transformer
        null_labels = torch.full_like(class_labels, transformer.config.num_classes)
        # What the transformer is given without and with an unconditional half.
        self.class_labels = {False: class_labels, True: torch.cat([class_labels, null_labels])}
        self.modulation_caches = {False: ModulationCache(), True: ModulationCache()}

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: int | list[int],
        guidance_weight: float,
        kv_cache: ScaleKVCache | None = None,
        keep_unconditional: bool = False,
        rows: torch.LongTensor | None = None,
        token_indices: torch.LongTensor | None = None,
        return_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, latent_channels)`): Inputs of one scale, or of
                several packed ones, of the whole batch.
            timestep (`int` or `list[int]`): Their timesteps.
            guidance_weight (`float`): The weight `w`; at 0 the unconditional half is not computed.
            kv_cache ([`ScaleKVCache`], *optional*): Cache for patterns that look back.
            keep_unconditional (`bool`, defaults to `False`): Compute the unconditional half even at weight 0, because
                later scales will look back at it.
            rows (`torch.LongTensor` of shape `(num_rows,)`, *optional*): The images to compute, by their places in the
                batch; all by default.
            token_indices (`torch.LongTensor` of shape `(num_rows, num_indices)`, *optional*): The tokens of the scale
                to compute; all by default.
            return_hidden_states (`bool`, defaults to `False`): Also return the last hidden states of the conditional
                half.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Logits of the images and tokens asked for, of shape `(num_rows,
            num_tokens, codebook_size)`, and the hidden states, of shape `(num_rows, num_tokens, dim)`, or `None`.
        """
        two_halves = guidance_weight != 0 or keep_unconditional
        class_labels, modulation_cache = self.class_labels[two_halves], self.modulation_caches[two_halves]
        if rows is not None:
            hidden_states = hidden_states[rows]
            rows = torch.cat([rows, rows + len(class_labels) // 2]) if two_halves else rows
            class_labels, modulation_cache = class_labels[rows], modulation_cache.select(rows)
            kv_cache = kv_cache.select(rows) if kv_cache is not None else None
        if token_indices is not None:
            hidden_states = hidden_states.take_along_dim(token_indices.unsqueeze(-1), dim=1)
            token_indices = torch.cat([token_indices, token_indices]) if two_halves else token_indices
        output = self.transformer(
            torch.cat([hidden_states, hidden_states]) if two_halves else hidden_states,
            timestep,
            class_labels,
            kv_cache=kv_cache,
            modulation_cache=modulation_cache,
            guidance_weight=guidance_weight if two_halves else None,
            token_indices=token_indices,
            return_hidden_states=return_hidden_states,
        )
        last_hidden_states = output.hidden_states[: len(hidden_states)] if return_hidden_states else None
        return output.sample, last_hidden_states


def sample_scales(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer2DModel,
    scheduler: ScaleScheduler,
    class_labels: torch.LongTensor,
    guidance_scale: float,
    token_ids: torch.LongTensor,
    latents: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    known: KnownRegion | None = None,
    on_step_end: StepCallback | None = None,
    token_critic: TokenCritic | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Run the reverse process over the scheduler's timesteps.

    Args:
        vqvae ([`MultiScaleVQModel`]): Turns tokens into latent states.
        transformer ([`ScaleTransformer2DModel`]): Predicts tokens.
        scheduler ([`ScaleScheduler`]): Says which scales, how tokens are drawn, and which are drawn again.
        class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids.
        guidance_scale (`float`): Classifier-free guidance; 1 and below is off.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The pyramid to fill.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The state to start from, float32.
        generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
        known ([`KnownRegion`], *optional*): What is known of the images; tokens that follow from it are not drawn.
        on_step_end (`StepCallback`, *optional*): Called after every pass.
        token_critic ([`TokenCritic`], *optional*): Judges the tokens of the pass before, for the resampling policy
            "learned".

    Returns:
        `tuple[torch.Tensor, torch.LongTensor]`: The last latent state and the drawn pyramid.
    """
    timesteps = scheduler.timesteps.tolist()
    grid_size = latents.shape[-2:]
    guided = GuidedTransformer(transformer, class_labels)
    kv_cache = ScaleKVCache(scheduler.num_tokens) if transformer.needs_kv_cache else None
    guided_from_start = guidance_scale > 1
    last_guided = min([t for t in timesteps if scheduler.guidance_weight(t, 2.0) > 0], default=timesteps[0])
    time_travel = scheduler.resampling_feedback == "time_travel"
    learned = scheduler.config.resampling_policy == "learned" and token_critic is not None
    start, state_before, model_state, resample_mask, logits = latents, latents, latents, None, None
    scale_cache, was_guided = None, False
    known_ids = torch.full_like(token_ids, MASK_TOKEN_ID)
    for index, timestep in enumerate(timesteps):
        tokens, size = scheduler.token_slice(timestep), scheduler.scale_size(timestep)
        weight = scheduler.guidance_weight(timestep, guidance_scale)
        pass_cache, rows, token_indices = kv_cache, None, None
        # Guided scales look back at what the unconditional half has seen of all scales before.
        keep_unconditional = kv_cache is not None and guided_from_start and timestep >= last_guided
        if index == 0 or timesteps[index - 1] != timestep:
            state_before, model_state, resample_mask = latents, latents, None
            scale_cache, was_guided = None, weight != 0
            if scheduler.has_partial_passes and kv_cache is None and timesteps.count(timestep) > 1:
                pass_cache = scale_cache = ScaleKVCache()
            if known is not None:
                found = known.token_ids(vqvae, state_before - start, scheduler.coarser_scales(timestep), size)
                known_ids[:, tokens] = found
                token_ids = torch.where(known_ids >= 0, known_ids, token_ids)
        elif not resample_mask.any():
            continue
        elif time_travel and (coarser := scheduler.coarser_scales(timestep)):
            travels = resample_mask.any(dim=1)
            coarse_ids = vqvae.quantize_latents(latents - start, coarser)
            drawn = travels[:, None] & (known_ids[:, : tokens.start] < 0)
            coarse_ids = torch.where(drawn, coarse_ids, token_ids[:, : tokens.start])
            token_ids = torch.cat([coarse_ids, token_ids[:, tokens.start :]], dim=1)
            revised = start + vqvae.latent_states(coarse_ids, coarser, grid_size)[-1]
            state_before = model_state = torch.where(travels[:, None, None, None], revised, state_before)
            if kv_cache is not None:
                refill_cache(vqvae, guided, scheduler, coarse_ids, timestep, kv_cache, keep_unconditional, grid_size)
        elif scheduler.has_partial_passes and (kv_cache is not None or was_guided == (weight != 0)):
            # Only what is drawn again is computed. It sees all other tokens as the pass did that accepted them.
            scale_cache = kv_cache.clone() if scale_cache is None else scale_cache
            pass_cache, token_indices = scale_cache, indices_of(resample_mask[resample_mask.any(dim=1)])
        elif kv_cache is not None:
            # Later scales look back at what the model was trained to see of this one: its first pass.
            pass_cache = kv_cache.read_only()
        if resample_mask is not None and (kv_cache is None or pass_cache is not kv_cache):
            # Images that are finished at this scale are not computed again.
            unfinished = resample_mask.any(dim=1)
            rows = None if unfinished.all() else unfinished.nonzero().squeeze(1)
        known_mask = known_ids[:, tokens] >= 0 if known is not None else None
        hidden_states = scheduler.scale_model_input(model_state, timestep).to(transformer.dtype)
        judged = learned and resample_mask is not None
        computed, last_hidden_states = guided(
            hidden_states,
            timestep,
            weight,
            pass_cache,
            keep_unconditional,
            rows,
            token_indices,
            return_hidden_states=judged,
        )
        if token_indices is not None:
            images = torch.arange(len(computed), device=computed.device) if rows is None else rows
            logits[images.unsqueeze(1), token_indices] = computed
        else:
            logits = computed if rows is None else logits.index_copy(0, rows, computed)
        confidence = None
        if judged:
            # What the transformer made of the tokens fed back tells which of them are wrong.
            judged_ids = token_ids[:, tokens] if rows is None else token_ids[rows, tokens]
            confidence = token_critic(last_hidden_states.to(token_critic.dtype), judged_ids).logits.float().sigmoid()
            if rows is not None:
                trusted = torch.ones(resample_mask.shape, device=confidence.device)
                confidence = trusted.index_copy(0, rows, confidence)
        output = scheduler.step(
            logits,
            timestep,
            token_ids,
            resample_mask=resample_mask,
            known_mask=known_mask,
            confidence=confidence,
            generator=generator,
        )
        token_ids, resample_mask = output.prev_sample, output.resample_mask
        token_map = token_ids[:, tokens].unflatten(1, size)
        latents = state_before + vqvae.residual_map(token_map, grid_size).float()
        if on_step_end is not None:
            changed = on_step_end(index, timestep, {"latents": latents, "token_ids": token_ids})
            latents, token_ids = changed["latents"], changed["token_ids"]
            guidance_scale = changed.get("guidance_scale", guidance_scale)
            if guidance_scale > 1 and kv_cache is not None and not guided_from_start:
                raise ValueError(
                    "`guidance_scale` must be above 1 from the start to be so later with the attention pattern"
                    f" {transformer.config.attention_pattern!r}, which looks back, got {guidance_scale} in a callback."
                )
        model_state = latents
        if output.feedback_mask is not None:
            kept = vqvae.residual_map(token_map, grid_size, mask=output.feedback_mask.unflatten(1, size))
            model_state = state_before + kept.float()
    return latents, token_ids


def indices_of(mask: torch.BoolTensor) -> torch.LongTensor:
    """
    Where a mask `(batch, num_tokens)` is true, row by row in order, as `(batch, num_indices)`. Rows with fewer places
    than others repeat their first one.
    """
    counts = mask.sum(dim=1, keepdim=True)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
    return torch.where(torch.arange(order.shape[1], device=mask.device) < counts, order, order[:, :1])


def refill_cache(
    vqvae: MultiScaleVQModel,
    guided: GuidedTransformer,
    scheduler: ScaleScheduler,
    coarse_ids: torch.LongTensor,
    timestep: int,
    kv_cache: ScaleKVCache,
    keep_unconditional: bool,
    grid_size: Sequence[int],
) -> None:
    """Replace the cached scales before `timestep` by those of other tokens, in one forward over all of them."""
    inputs = vqvae.teacher_forcing_inputs(coarse_ids, scheduler.coarser_scales(timestep), grid_size)
    earlier = [t for t in scheduler.scale_timesteps() if t > timestep]
    guided(inputs.to(guided.transformer.dtype), earlier, 0.0, kv_cache, keep_unconditional)
