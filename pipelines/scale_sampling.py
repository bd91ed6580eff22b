"""The sampling loop that all SRDD pipelines share: scales outside, passes inside."""

from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import GuidedTransformer
from srdd.pipelines.refinement import RefinedScale
from srdd.scales import Scale
from srdd.schedulers import ScaleScheduler
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


# Called after every pass with (index, timestep, {"latents": ..., "token_ids": ...}); returns these, "guidance_scale",
# which holds from the next scale on, and "interrupt", which ends the run.
StepCallback = Callable[[int, int, dict[str, Any]], dict[str, Any]]

# Called with a scale and the latent state before it; returns the tokens that are known there, `(batch,
# num_scale_tokens)`, and -1 where one is to be drawn.
KnownTokens = Callable[[Scale, torch.Tensor], torch.LongTensor]


def sample_scales(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer2DModel,
    scheduler: ScaleScheduler,
    conditions: Conditions,
    latents: torch.Tensor,
    progress_bar: tqdm,
    guidance_scale: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    known_tokens: KnownTokens | None = None,
    on_step_end: StepCallback | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Run the reverse process over the scheduler's timesteps.

    Args:
        vqvae ([`MultiScaleVQModel`]): Turns tokens into latent states.
        transformer ([`ScaleTransformer2DModel`]): Predicts tokens.
        scheduler ([`ScaleScheduler`]): Says which scales, how tokens are drawn, and which are drawn again.
        conditions ([`Conditions`]): What to draw, one for each image.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The state to start from, float32.
        progress_bar (`tqdm`): Follows the passes, those that a scale does not need among them.
        guidance_scale (`float`, defaults to 1.0): Classifier-free guidance; 1 and below is off.
        generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
        known_tokens (`KnownTokens`, *optional*): What is known of the images; such tokens are not drawn.
        on_step_end (`StepCallback`, *optional*): Called after every pass.

    Returns:
        `tuple[torch.Tensor, torch.LongTensor]`: The last latent state, and the drawn pyramid of shape `(batch,
        num_tokens)`.
    """
    guided = GuidedTransformer(transformer, conditions, scheduler, guidance_scale)
    token_ids = torch.full((len(latents), scheduler.num_tokens), MASK_TOKEN_ID, device=latents.device)
    timesteps = scheduler.timesteps.tolist()
    for scale in scheduler.visits:
        before, known_mask, resample_mask = latents, None, None
        if known_tokens is not None:
            known_ids = known_tokens(scale, before)
            known_mask = known_ids >= 0
            token_ids = token_ids.clone()
            token_ids[:, scale.tokens] = known_ids
        weight = scheduler.guidance_weight(scale.timestep, guidance_scale)
        first, num_passes = timesteps.index(scale.timestep), timesteps.count(scale.timestep)
        several = num_passes > 1
        refined = RefinedScale(guided, scale, weight, scheduler.keeps_accepted_tokens) if several else None
        for index in range(first, first + num_passes):
            hidden_states = scheduler.scale_model_input(latents, scale.timestep)
            logits = refined(hidden_states, resample_mask) if several else guided(hidden_states, scale, weight)
            output = scheduler.step(logits, scale.timestep, token_ids, resample_mask, known_mask, generator)
            token_ids, resample_mask = output.prev_sample, output.resample_mask
            token_map = token_ids[:, scale.tokens].unflatten(1, scale.size)
            latents = before + vqvae.residual_map(token_map).float()
            progress_bar.update()
            if on_step_end is not None:
                changed = on_step_end(index, scale.timestep, {"latents": latents, "token_ids": token_ids})
                latents, token_ids = changed["latents"], changed["token_ids"]
                guidance_scale = changed["guidance_scale"]
                if changed["interrupt"]:
                    return latents, token_ids
            if several and not resample_mask.any():
                break
        progress_bar.update(first + num_passes - 1 - index)
    return latents, token_ids
