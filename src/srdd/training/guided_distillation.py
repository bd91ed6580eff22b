"""What a student learns from its teacher's guidance."""

import torch
import torch.nn.functional as F

from srdd import ScaleScheduler, ScaleTransformer2DModel
from srdd.models.guidance import guide


def guided_distribution(
    teacher: ScaleTransformer2DModel,
    inputs: torch.Tensor,
    class_labels: torch.LongTensor,
    scheduler: ScaleScheduler,
    guidance_scale: float,
) -> torch.Tensor:
    """
    Log-probabilities of a teacher under guidance (paper, Section 3.3 a), for all scales of a schedule at once.

    Args:
        teacher ([`ScaleTransformer2DModel`]): The teacher.
        inputs (`torch.Tensor` of shape `(batch, num_tokens, latent_channels)`): Packed inputs of its scales.
        class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids; the null class gets no guidance.
        scheduler ([`ScaleScheduler`]): Its scales and its guidance ramp.
        guidance_scale (`float`): diffusers' `g`; 1 and below is off.

    Returns:
        `torch.Tensor` of shape `(batch, num_tokens, codebook_size)`, float32.
    """
    timesteps = [scale.timestep for scale in scheduler.visits]
    logits = teacher(inputs, timestep=timesteps, class_labels=class_labels).sample.float()
    if guidance_scale > 1:
        told = dict.fromkeys(teacher.labels_of_both_halves, class_labels)
        unconditional = teacher(inputs, timestep=timesteps, **told).sample.float()
        weights = scheduler.guidance_weights(guidance_scale).to(logits, non_blocking=True)
        logits = guide(logits, unconditional, weights[:, None])
    return logits.log_softmax(dim=-1)


def guided_divergence(
    logits: torch.Tensor,
    teacher: ScaleTransformer2DModel,
    inputs: torch.Tensor,
    class_labels: torch.LongTensor,
    scheduler: ScaleScheduler,
    guidance_scale: float,
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of a student from its teacher under guidance, in nats per token; the arguments are
    those of [`guided_distribution`] and the student's `logits` of shape `(batch, num_tokens, codebook_size)`.

    Returns:
        `torch.Tensor`: Scalar, float32; only the student has gradients.
    """
    with torch.no_grad():
        target = guided_distribution(teacher, inputs, class_labels, scheduler, guidance_scale)
    log_probabilities = logits.float().log_softmax(dim=-1)
    return F.kl_div(log_probabilities.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
