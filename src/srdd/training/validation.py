"""What a scale transformer is worth in the middle of its training: the loss of held-out tokens, and pictures."""

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, default_collate

from srdd import ScaleScheduler, SRDDPipeline, SRDDTextPipeline
from srdd.data.text_cache import EncodedTexts
from srdd.evaluation.figures import spread
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline
from srdd.training.token_loss import token_loss
from srdd.training.trained_schedules import TrainedSchedules, schedule_name


@torch.no_grad()
def validate(
    pipe: SRDDPipeline | SRDDTextPipeline, loader: DataLoader, schedules: TrainedSchedules | None = None
) -> dict:
    """
    Cross-entropy of held-out pyramids.

    Args:
        pipe ([`SRDDPipeline`] or [`SRDDTextPipeline`]): With the averaged transformer.
        loader (`DataLoader`): Batches of `"token_ids"` and `"conditions"`.
        schedules ([`TrainedSchedules`], *optional*): Whose pyramids these are; the scheduler's own by default.

    Returns:
        `dict`: Of the first schedule `"loss"` in nats per token, `"per_scale"` and `"accuracy"` per scale, and the
        `"scales"` themselves. Where there are several, the loss of each, as `"loss/1-2-4"`.
    """
    schedules = schedules or TrainedSchedules([pipe.scheduler])
    totals, count = [0.0 for _ in schedules.schedulers], 0
    for batch in loader:
        batch = send_to_device(batch, pipe.transformer.device)
        for index, (scheduler, token_ids) in enumerate(schedules.split(batch["token_ids"])):
            means = _means(pipe, scheduler, token_ids, batch["conditions"])
            totals[index] = totals[index] + means * len(token_ids)
        count += len(batch["token_ids"])
    scale_sizes = schedules.first.scales
    (loss, *of_scales), *others = [(total / count).tolist() for total in totals]
    metrics = {
        "loss": loss,
        "per_scale": of_scales[: len(scale_sizes)],
        "accuracy": of_scales[len(scale_sizes) :],
        "scales": scale_sizes,
    }
    if others:
        names = [f"loss/{schedule_name(scheduler.scales)}" for scheduler in schedules.schedulers]
        metrics.update(zip(names, [loss, *(means[0] for means in others)]))
    return metrics


def _means(
    pipe: SRDDPipeline | SRDDTextPipeline, scheduler: ScaleScheduler, token_ids: torch.LongTensor, conditions: dict
) -> torch.Tensor:
    """Of a batch over the scales of one schedule: the loss, then that of every scale, then their accuracy."""
    model, timesteps = pipe.transformer, [scale.timestep for scale in scheduler.visits]
    inputs = pipe.vqvae.teacher_forcing_inputs(token_ids, scheduler.scales).to(model.dtype)
    logits = model(inputs, timestep=timesteps, **conditions).sample
    result = token_loss(logits, token_ids, scheduler.scales)
    return torch.cat([result.loss[None], result.per_scale, result.accuracy])


def whole_rows(num_images: int) -> int:
    """How many of so many pictures are shown: rows of up to eight are equally long."""
    return num_images if num_images < 8 else num_images // 8 * 8


def draw(
    pipe: SRDDPipeline | SRDDTextPipeline | LatentDiffusionPipeline,
    num_images: int,
    guidance_scale: float | None,
    seed: int,
    prompts: EncodedTexts | None = None,
) -> list[torch.Tensor]:
    """
    Pictures of classes spread over all, or of texts, in rows of up to eight.

    Args:
        pipe ([`SRDDPipeline`], [`SRDDTextPipeline`] or
            [`~srdd.evaluation.latent_diffusion.LatentDiffusionPipeline`]): Draws them; it shows no progress any more.
        num_images (`int`): How many; of more than eight, full rows alone are drawn.
        guidance_scale (`float`, *optional*): diffusers' `g`, the pipeline's own by default; a guidance-distilled
            transformer needs none.
        seed (`int`): Seed of the first picture; each has the next one.
        prompts ([`EncodedTexts`], *optional*): The text to guide away from, and then that of each picture.

    Returns:
        `list[torch.Tensor]`: Rows of shape `(num_columns, 3, height, width)`, pixels in [-1, 1].
    """
    num_images = whole_rows(num_images)
    pipe.set_progress_bar_config(disable=True)
    if prompts is not None:
        told = _prompt_arguments(prompts)
    elif pipe.num_classes:
        told = {"class_labels": spread(num_images, pipe.num_classes)}
    else:
        told = {"num_images_per_prompt": num_images}
    needs_none = not isinstance(pipe, LatentDiffusionPipeline) and pipe.transformer.config.guidance_distilled
    images = pipe(
        **told,
        guidance_scale=None if needs_none else guidance_scale,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(num_images)],
        output_type="pt",
    ).images
    return [row * 2 - 1 for row in images.split(8)]


def _prompt_arguments(prompts: EncodedTexts) -> dict[str, torch.Tensor]:
    """What a pipeline is told of the first text, which is guided away from, and of the others."""
    told = default_collate([prompts[index] for index in range(1, len(prompts))])
    negative = default_collate([prompts[0]])
    names = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
        "prompt_attention_mask": "encoder_attention_mask",
    }
    arguments = {name: told[ours] for name, ours in names.items()}
    return arguments | {f"negative_{name}": negative[ours] for name, ours in names.items()}
