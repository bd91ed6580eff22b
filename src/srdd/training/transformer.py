"""How scale transformers are trained and distilled: one loop over cached token pyramids."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.data.images import LabelledImages, validation_images
from srdd.data.token_cache import TokenDataset, cached_tokens
from srdd.models.guidance import guide
from srdd.models.transformer_scale_2d import ScaleAttnProcessor
from srdd.training.loop import ComputeValues, train_model
from srdd.training.losses import TokenLoss, token_loss


# Called with the transformer and a batch of `"token_ids"` and `"labels"`; returns terms by name, `"loss"` being their
# sum, and the cross-entropy's statistics.
ComputeLoss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], TokenLoss]]

# Called with the averaged model and batches of held-out pyramids; returns metrics, a `"loss"` among them, and rows of
# pictures in [-1, 1].
Evaluate = Callable[[torch.nn.Module, DataLoader], tuple[dict, list[torch.Tensor]]]


@dataclass
class TokenData:
    """Cached pyramids of a run: `train` and `validation`."""

    train: TokenDataset
    validation: TokenDataset


def load_tokens(
    args: Namespace,
    accelerator: Accelerator,
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    scale_sizes: list[list[int]],
) -> TokenData:
    """Tokenise the images once, as the arguments say."""
    options = {
        "cache_dir": args.token_cache_dir,
        "scale_sizes": scale_sizes,
        "num_workers": args.dataloader_num_workers,
        "accelerator": accelerator,
    }
    train = cached_tokens(
        vqvae,
        images,
        images.train,
        random_crops=args.random_crops,
        random_flip=args.random_flip,
        seed=args.seed,
        **options,
    )
    return TokenData(train, cached_tokens(vqvae, images, validation_images(images, 1024), **options))


def load_tokens_of(
    args: Namespace,
    accelerator: Accelerator,
    name: str,
    pipe: SRDDPipeline,
    images: LabelledImages,
    scale_sizes: list[list[int]],
) -> TokenData:
    """
    [`load_tokens`] for a pipeline that is trained already and knows its classes. Images without labels are of the null
    class.

    Raises:
        ValueError: If the images have other classes; names the argument `name`.
    """
    id2label = pipe.transformer.id2label
    if images.id2label and images.id2label != id2label:
        raise ValueError(
            f"`{name}` must know the classes of the data, {sorted(images.id2label.values())}, got"
            f" {sorted(id2label.values())}."
        )
    tokens = load_tokens(args, accelerator, pipe.vqvae, images, scale_sizes)
    if not images.id2label:
        for part in (tokens.train, tokens.validation):
            part.labels[:] = pipe.transformer.config.num_classes
    return tokens


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay the matrices of linear layers only, as VAR does: not biases, embeddings and tables."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return [group for group in groups if group["params"]]


def train_transformer(
    args: Namespace,
    accelerator: Accelerator,
    model: ScaleTransformer2DModel,
    vqvae: MultiScaleVQModel,
    tokens: TokenData,
    scheduler: ScaleScheduler,
    compute_loss: ComputeLoss,
) -> ScaleTransformer2DModel:
    """
    Train on cached pyramids, with averaged weights, logs, pictures and checkpoints.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): Nothing prepared yet.
        model ([`ScaleTransformer2DModel`]): The transformer.
        vqvae ([`MultiScaleVQModel`]): The tokenizer, frozen and on its device.
        tokens ([`TokenData`]): Pyramids over the scheduler's scales.
        scheduler ([`ScaleScheduler`]): The scales to train.
        compute_loss (`ComputeLoss`): The loss of a batch.

    Returns:
        [`ScaleTransformer2DModel`]: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the scales.
    """
    scale_sizes = inference_scales(scheduler)

    def compute_values(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
        losses, statistics = compute_loss(model, batch)
        losses = {**losses, **by_scale("loss", scale_sizes, statistics.per_scale)}
        return losses, by_scale("accuracy", scale_sizes, statistics.accuracy)

    def evaluate(averaged: torch.nn.Module, loader: DataLoader):
        # A backend for training may want what the copy does not have: compiled blocks.
        averaged.set_attn_processor(ScaleAttnProcessor())
        return validate(averaged, vqvae, loader, scheduler), draw(args, averaged, vqvae, scheduler)

    return train_on_tokens(args, accelerator, model, tokens, compute_values, evaluate)


def by_scale(name: str, scale_sizes: list[list[int]], values: torch.Tensor) -> dict[str, torch.Tensor]:
    """One value for each scale, named as in the loss log."""
    return {f"{name}/{height}x{width}": value for (height, width), value in zip(scale_sizes, values)}


def train_on_tokens(
    args: Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokens: TokenData,
    compute_values: ComputeValues,
    evaluate: Evaluate,
) -> torch.nn.Module:
    """
    The loop of [`train_transformer`], for any model that learns from cached pyramids.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): Nothing prepared yet.
        model (`torch.nn.Module`): The model.
        tokens ([`TokenData`]): The pyramids.
        compute_values (`ComputeValues`): The loss of a batch.
        evaluate (`Evaluate`): Validation.

    Returns:
        `torch.nn.Module`: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the losses.
    """
    validation_loader = DataLoader(tokens.validation, batch_size=args.train_batch_size)
    return train_model(
        args,
        accelerator,
        model,
        parameter_groups(model, args.adam_weight_decay),
        tokens.train,
        compute_values,
        evaluate=lambda averaged: evaluate(averaged, validation_loader),
        count_items=lambda batch: batch["token_ids"].numel(),
        unit="tok",
        picture="samples",
    )


def inference_scales(scheduler: ScaleScheduler) -> list[list[int]]:
    """The `[height, width]` of the scales that a schedule visits, coarse to fine."""
    return [list(scheduler.scale_size(timestep)) for timestep in scheduler.scale_timesteps()]


def cross_entropy(
    args: Namespace, vqvae: MultiScaleVQModel, scheduler: ScaleScheduler
) -> Callable[[torch.nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, TokenLoss]]:
    """A function of the transformer and a batch that returns logits and their [`TokenLoss`] (paper, Equation 7)."""
    scale_sizes, timesteps = inference_scales(scheduler), scheduler.scale_timesteps()

    def compute(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, TokenLoss]:
        inputs = vqvae.teacher_forcing_inputs(batch["token_ids"], scale_sizes)
        logits = model(inputs, timestep=timesteps, class_labels=batch["labels"]).sample
        return logits, token_loss(
            logits, batch["token_ids"], scale_sizes, args.label_smoothing, args.scale_loss_weights
        )

    return compute


@torch.no_grad()
def validate(
    model: ScaleTransformer2DModel, vqvae: MultiScaleVQModel, loader: DataLoader, scheduler: ScaleScheduler
) -> dict:
    """
    Cross-entropy of held-out pyramids.

    Returns:
        `dict`: `"loss"` in nats per token, `"per_scale"` and `"accuracy"` per scale, and the `"scales"` themselves.
    """
    scale_sizes, timesteps = inference_scales(scheduler), scheduler.scale_timesteps()
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
    timesteps = scheduler.scale_timesteps()
    logits = teacher(inputs, timestep=timesteps, class_labels=class_labels).sample.float()
    if guidance_scale > 1:
        unconditional = teacher(inputs, timestep=timesteps).sample.float()
        weights = scheduler.guidance_weights(guidance_scale).to(logits)
        logits = guide(logits, unconditional, weights[:, None])
    return logits.log_softmax(dim=-1)
