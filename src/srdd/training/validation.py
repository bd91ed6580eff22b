"""What a scale transformer is worth in the middle of its training: the loss of held-out tokens, and pictures."""

from argparse import Namespace

import torch
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.training.token_loss import token_loss


@torch.no_grad()
def validate(
    model: ScaleTransformer2DModel, vqvae: MultiScaleVQModel, loader: DataLoader, scheduler: ScaleScheduler
) -> dict:
    """
    Cross-entropy of held-out pyramids.

    Returns:
        `dict`: `"loss"` in nats per token, `"per_scale"` and `"accuracy"` per scale, and the `"scales"` themselves.
    """
    scale_sizes, timesteps = scheduler.scales, [scale.timestep for scale in scheduler.visits]
    totals, count = 0.0, 0
    for batch in loader:
        token_ids, labels = batch["token_ids"].to(model.device), batch["labels"].to(model.device)
        inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes).to(model.dtype)
        result = token_loss(model(inputs, timestep=timesteps, class_labels=labels).sample, token_ids, scale_sizes)
        totals = totals + torch.cat([result.loss[None], result.per_scale, result.accuracy]) * len(token_ids)
        count += len(token_ids)
    loss, *rest = (totals / count).tolist()
    return {
        "loss": loss,
        "per_scale": rest[: len(scale_sizes)],
        "accuracy": rest[len(scale_sizes) :],
        "scales": scale_sizes,
    }


def draw(
    args: Namespace, model: ScaleTransformer2DModel, vqvae: MultiScaleVQModel, scheduler: ScaleScheduler
) -> list[torch.Tensor]:
    """Pictures of classes spread over all from fixed seeds, in rows of up to eight, pixels in [-1, 1]."""
    pipe = SRDDPipeline(vqvae, model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    num_classes, count = model.config.num_classes, args.num_validation_images
    labels = [index * num_classes // count % num_classes for index in range(count)] if num_classes else None
    images = pipe(
        labels,
        guidance_scale=None if model.config.guidance_distilled else args.validation_guidance_scale,
        num_images_per_prompt=1 if num_classes else count,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(count)],
        output_type="pt",
    ).images
    return [row * 2 - 1 for row in images.split(8) if len(row) == min(8, count)]
