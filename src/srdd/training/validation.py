"""What a scale transformer is worth in the middle of its training: the loss of held-out tokens, and pictures."""

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, default_collate

from srdd import SRDDPipeline, SRDDTextPipeline
from srdd.data.text_cache import EncodedTexts
from srdd.training.token_loss import token_loss


@torch.no_grad()
def validate(pipe: SRDDPipeline | SRDDTextPipeline, loader: DataLoader) -> dict:
    """
    Cross-entropy of held-out pyramids over the scheduler's scales.

    Args:
        pipe ([`SRDDPipeline`] or [`SRDDTextPipeline`]): With the averaged transformer.
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


def spread(num_images: int, count: int) -> list[int]:
    """Which of `count` classes or texts each picture shows, so that pictures are spread over all."""
    return [index * count // num_images % count for index in range(num_images)]


def draw(
    pipe: SRDDPipeline | SRDDTextPipeline,
    num_images: int,
    guidance_scale: float | None,
    seed: int,
    prompts: EncodedTexts | None = None,
) -> list[torch.Tensor]:
    """
    Pictures of classes spread over all, or of texts, in rows of up to eight.

    Args:
        pipe ([`SRDDPipeline`] or [`SRDDTextPipeline`]): Draws them; it shows no progress any more.
        num_images (`int`): How many; those beyond full rows are left out.
        guidance_scale (`float`, *optional*): diffusers' `g`, the pipeline's own by default; a guidance-distilled
            transformer needs none.
        seed (`int`): Seed of the first picture; each has the next one.
        prompts ([`EncodedTexts`], *optional*): The text to guide away from, and then that of each picture.

    Returns:
        `list[torch.Tensor]`: Rows of shape `(num_columns, 3, height, width)`, pixels in [-1, 1].
    """
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    if prompts is not None:
        told = _prompt_arguments(prompts)
    elif config.num_classes:
        told = {"class_labels": spread(num_images, config.num_classes)}
    else:
        told = {"num_images_per_prompt": num_images}
    images = pipe(
        **told,
        guidance_scale=None if config.guidance_distilled else guidance_scale,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(num_images)],
        output_type="pt",
    ).images
    return [row * 2 - 1 for row in images.split(8) if len(row) == min(8, num_images)]


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
