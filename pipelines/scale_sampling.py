"""The sampling loop that all SRDD pipelines share: scales outside, passes inside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from srdd.models import MultiScaleVQModel, ScaleTransformer
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import Guidance, GuidedTransformer
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


@dataclass
class SamplingInputs:
    """
    What a run reads, as tensors on its device.

    Args:
        conditions ([`Conditions`]): What to draw, one for each image.
        guidance ([`Guidance`]): How strongly the scales are guided.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The state to start from, float32.
        noise (`dict[int, torch.Tensor]`, defaults to `{}`): Noise that was drawn before, for each pass by its place in
            `scheduler.timesteps`. Passes without any take theirs from the generator.
    """

    conditions: Conditions
    guidance: Guidance
    latents: torch.Tensor
    noise: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class SamplingOutput:
    """
    What a run gives.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The last latent state, float32.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The drawn pyramids.
        is_finite (`torch.BoolTensor` of shape `(num_timesteps,)`): Whether the logits of each pass were finite; passes
            that were left out count as such.
    """

    latents: torch.Tensor
    token_ids: torch.LongTensor
    is_finite: torch.BoolTensor


def sample_scales(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer,
    scheduler: ScaleScheduler,
    inputs: SamplingInputs,
    progress_bar: tqdm,
    generator: torch.Generator | list[torch.Generator] | None = None,
    known_tokens: KnownTokens | None = None,
    on_step_end: StepCallback | None = None,
) -> SamplingOutput:
    """
    Run the reverse process over the scheduler's timesteps.

    Where nothing is known and every pass draws all tokens, the device is never looked at and given no constants, so
    that the whole run can be recorded as a CUDA graph.

    Args:
        vqvae ([`MultiScaleVQModel`]): Turns tokens into latent states.
        transformer ([`ScaleTransformer`]): Predicts tokens.
        scheduler ([`ScaleScheduler`]): Says which scales, how tokens are drawn, and which are drawn again.
        inputs ([`SamplingInputs`]): What to draw.
        progress_bar (`tqdm`): Follows the passes, those that a scale does not need among them.
        generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
        known_tokens (`KnownTokens`, *optional*): What is known of the images; such tokens are not drawn.
        on_step_end (`StepCallback`, *optional*): Called after every pass.

    Returns:
        [`SamplingOutput`]
    """
    guided = GuidedTransformer(transformer, inputs.conditions, inputs.guidance, scheduler.num_tokens)
    latents, guidance, device = inputs.latents, inputs.guidance, inputs.latents.device
    token_ids = torch.full((len(latents), scheduler.num_tokens), MASK_TOKEN_ID, device=device)
    is_finite = torch.ones(len(scheduler.timesteps), dtype=torch.bool, device=device)
    for scale, passes in scheduler.passes:
        before, guided.guidance, known_mask, resample_mask = latents, guidance, None, None
        if known_tokens is not None:
            known_ids = known_tokens(scale, before)
            known_mask = known_ids >= 0
            token_ids = token_ids.clone()
            token_ids[:, scale.tokens] = known_ids
        refined = RefinedScale(guided, scale, scheduler.keeps_accepted_tokens) if len(passes) > 1 else None
        for index in passes:
            hidden_states = scheduler.scale_model_input(latents, scale.timestep)
            logits = refined(hidden_states, resample_mask) if refined else guided(hidden_states, scale)
            noise = inputs.noise.get(index)
            output = scheduler.step(logits, scale.timestep, token_ids, resample_mask, known_mask, generator, noise)
            token_ids, is_finite[index] = output.prev_sample, output.is_finite
            resample_mask = None if scheduler.draws_all_tokens else output.resample_mask
            token_map = token_ids[:, scale.tokens].unflatten(1, scale.size)
            latents = before + vqvae.residual_map(token_map).float()
            progress_bar.update()
            if on_step_end is not None:
                changed = on_step_end(index, scale.timestep, {"latents": latents, "token_ids": token_ids})
                latents, token_ids = changed["latents"], changed["token_ids"]
                guidance = Guidance.of(scheduler, changed["guidance_scale"], device, guidance.guider)
                if changed["interrupt"]:
                    return SamplingOutput(latents, token_ids, is_finite)
            if resample_mask is not None and not resample_mask.any():
                break
        progress_bar.update(passes.stop - 1 - index)
    return SamplingOutput(latents, token_ids, is_finite)
