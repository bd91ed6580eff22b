"""What a scale transformer is worth in the middle of its training: the loss of held-out tokens, and pictures."""

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from srdd import SRDDPipeline
from srdd.training.token_loss import token_loss


@torch.no_grad()
def validate(pipe: SRDDPipeline, loader: DataLoader) -> dict:
    """
    Cross-entropy of held-out pyramids over the scheduler's scales.

    Args:
        pipe ([`SRDDPipeline`]): With the averaged transformer.
        loader (`DataLoader`): Batches of `"token_ids"` and `"conditions"`.

    Returns:
        `dict`: `"loss"` in nats per token, `"per_scale"` and `"accuracy"` per scale, and the `"scales"` themselves.
    """
    model, vqvae, scale_sizes = pipe.transformer, pipe.vqvae, pipe.scheduler.scales
    timesteps = [scale.timestep for scale in pipe.scheduler.visits]
    totals, count = 0.0, 0
    for batch in loader:
        batch = send_to_device(batch, model.device)
        token_ids = batch["token_ids"]
        inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes).to(model.dtype)
        logits = model(inputs, timestep=timesteps, **batch["conditions"]).sample
        result = token_loss(logits, token_ids, scale_sizes)
        totals = totals + torch.cat([result.loss[None], result.per_scale, result.accuracy]) * len(token_ids)
        count += len(token_ids)
    loss, *of_scales = (totals / count).tolist()
    return {
        "loss": loss,
        "per_scale": of_scales[: len(scale_sizes)],
        "accuracy": of_scales[len(scale_sizes) :],
        "scales": scale_sizes,
    }


def draw(pipe: SRDDPipeline, num_images: int, guidance_scale: float, seed: int) -> list[torch.Tensor]:
    """
    Pictures of classes spread over all, in rows of up to eight.

    Args:
        pipe ([`SRDDPipeline`]): Draws them; it shows no progress any more.
        num_images (`int`): How many; those beyond full rows are left out.
        guidance_scale (`float`): diffusers' `g`; a guidance-distilled transformer needs none.
        seed (`int`): Seed of the first picture; each has the next one.

    Returns:
        `list[torch.Tensor]`: Rows of shape `(num_columns, 3, height, width)`, pixels in [-1, 1].
    """
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    classes = config.num_classes
    images = pipe(
        [index * classes // num_images % classes for index in range(num_images)] if classes else None,
        guidance_scale=None if config.guidance_distilled else guidance_scale,
        num_images_per_prompt=1 if classes else num_images,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(num_images)],
        output_type="pt",
    ).images
    return [row * 2 - 1 for row in images.split(8) if len(row) == min(8, num_images)]
