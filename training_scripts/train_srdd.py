#!/usr/bin/env python
"""
Train a scale transformer (`ScaleTransformer2DModel`) on the tokens of a multi-scale tokenizer.

    accelerate launch training_scripts/train_srdd.py --train_data_dir my_images \
        --pretrained_vqvae_name_or_path my-tokenizer --output_dir my-model

The finished pipeline, with averaged (EMA) weights, lies in `output_dir`; `SRDDPipeline.from_pretrained` loads it.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.models.transformer_scale_2d import ATTENTION_PATTERNS
from srdd.training.arguments import add_common_arguments
from srdd.training.checkpoints import resume, save_checkpoint
from srdd.training.loop import (
    append_json_line,
    batches_from,
    load_images,
    log_images,
    make_accelerator,
    make_loader,
    make_optimizer,
    picture_grid,
    validation_images,
)
from srdd.training.losses import token_loss
from srdd.training.token_cache import cached_tokens


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--label_column", default="label", help="Column of the labels; '' trains without labels.")
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_vqvae_name_or_path", required=True, help="Folder or Hub id of the tokenizer.")
    model.add_argument("--pretrained_model_name_or_path", help="Start from this transformer.")
    model.add_argument("--attention_pattern", choices=ATTENTION_PATTERNS, default="markov")
    model.add_argument("--num_layers", type=int, default=6)
    model.add_argument("--num_attention_heads", type=int, default=4)
    model.add_argument("--attention_head_dim", type=int, default=64)
    model.add_argument("--per_block_adaln", action="store_true", help="VAR's AdaLN up to 256px: three times the size.")
    model.add_argument("--class_dropout_prob", type=float, default=0.1)
    model.add_argument("--drop_path_rate", type=float, default=0.0)
    model.add_argument("--label_smoothing", type=float, default=0.0)
    model.add_argument("--gradient_checkpointing", action="store_true")
    model.add_argument("--validation_guidance_scale", type=float, default=2.5)
    args = parser.parse_args(arguments)
    if args.center_crop:
        parser.error("`--center_crop` is how cached tokens are always made; leave it out.")
    return args


def build_model(args: argparse.Namespace, vqvae: MultiScaleVQModel, id2label: dict) -> ScaleTransformer2DModel:
    if args.pretrained_model_name_or_path:
        return ScaleTransformer2DModel.from_pretrained(args.pretrained_model_name_or_path)
    return ScaleTransformer2DModel(
        codebook_size=vqvae.config.codebook_size,
        latent_channels=vqvae.config.latent_channels,
        scale_sizes=vqvae.config.scale_sizes,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(id2label),
        attention_pattern=args.attention_pattern,
        shared_adaln=not args.per_block_adaln,
        class_dropout_prob=args.class_dropout_prob,
        drop_path_rate=args.drop_path_rate,
        id2label=id2label,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay the matrices of linear layers only, as VAR does: not biases, embeddings and tables."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def validate(model: ScaleTransformer2DModel, vqvae: MultiScaleVQModel, loader, device: torch.device) -> dict:
    """Loss over all tokens, and loss and accuracy per scale."""
    model.eval()
    totals, count = None, 0
    for batch in loader:
        token_ids = batch["token_ids"].to(device)
        logits = model(vqvae.teacher_forcing_inputs(token_ids), class_labels=batch["labels"].to(device)).sample
        result = token_loss(logits, token_ids, vqvae.config.scale_sizes)
        values = torch.cat([result.loss[None], result.per_scale, result.accuracy]) * len(token_ids)
        totals = values if totals is None else totals + values
        count += len(token_ids)
    model.train()
    loss, *rest = (totals / count).tolist()
    return {"val_loss": loss, "val_per_scale": rest[: len(rest) // 2], "val_accuracy": rest[len(rest) // 2 :]}


def draw(args: argparse.Namespace, model: ScaleTransformer2DModel, vqvae: MultiScaleVQModel) -> list[torch.Tensor]:
    """Pictures of the first classes from fixed seeds, in rows of up to eight, pixels in [-1, 1]."""
    pipe = SRDDPipeline(vqvae, model, ScaleScheduler(scale_sizes=model.config.scale_sizes))
    pipe.set_progress_bar_config(disable=True)
    num_classes, count = model.config.num_classes, args.num_validation_images
    labels = [index * num_classes // count % num_classes for index in range(count)] if num_classes else None
    model.eval()
    images = pipe(
        labels,
        guidance_scale=args.validation_guidance_scale,
        num_images_per_prompt=1 if num_classes else count,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(count)],
        output_type="pt",
    ).images
    model.train()
    return [row * 2 - 1 for row in images.split(8) if len(row) == min(8, count)]


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    images = load_images(args, args.label_column or None)
    vqvae = MultiScaleVQModel.from_pretrained(args.pretrained_vqvae_name_or_path)
    vqvae.requires_grad_(False).eval().to(accelerator.device)
    scale_sizes = vqvae.config.scale_sizes
    resolution = scale_sizes[-1][0] * vqvae.spatial_compression_ratio
    with accelerator.main_process_first():
        token_dir = Path(args.output_dir) / "tokens"
        train_tokens = cached_tokens(vqvae, images, images.train, resolution, token_dir, args.random_flip)
        validation = validation_images(images, 1024)
        validation_tokens = cached_tokens(vqvae, images, validation, resolution, token_dir)
    loader = make_loader(args, train_tokens)
    validation_loader = torch.utils.data.DataLoader(validation_tokens, batch_size=args.train_batch_size)

    model = build_model(args, vqvae, images.id2label)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer, schedule = make_optimizer(args, parameter_groups(model, args.adam_weight_decay))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    transformer = accelerator.unwrap_model(model)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(schedule, ema)

    step = resume(accelerator, args.output_dir, args.resume_from_checkpoint)
    started, first_step = time.perf_counter(), step
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    log_file = Path(args.output_dir) / "train_log.jsonl"
    model.train()
    for batch in batches_from(accelerator, loader, step, args.max_train_steps):
        with accelerator.accumulate(model):
            inputs = vqvae.teacher_forcing_inputs(batch["token_ids"])
            logits = model(inputs, class_labels=batch["labels"]).sample
            result = token_loss(logits, batch["token_ids"], scale_sizes, args.label_smoothing)
            if not torch.isfinite(result.loss):
                worst = [tuple(size) for size, loss in zip(scale_sizes, result.per_scale) if not loss.isfinite()]
                raise FloatingPointError(
                    f"The loss is {result.loss.item()} at step {step + 1}, at the scales {worst}."
                )
            accelerator.backward(result.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        step += 1
        ema.step(transformer.parameters())
        progress.update()
        if step % 10 == 0:
            values = {"loss": result.loss.item(), "lr": schedule.get_last_lr()[0]}
            for size, loss, accuracy in zip(scale_sizes, result.per_scale.tolist(), result.accuracy.tolist()):
                name = f"{size[0]}x{size[1]}"
                values.update({f"loss/{name}": loss, f"accuracy/{name}": accuracy})
            accelerator.log(values, step=step)
            progress.set_postfix(loss=f"{values['loss']:.4f}")
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if (step % args.validation_steps == 0 or step == args.max_train_steps) and accelerator.is_main_process:
            ema.store(transformer.parameters())
            ema.copy_to(transformer.parameters())
            metrics = validate(transformer, vqvae, validation_loader, accelerator.device)
            log_images(accelerator, args.output_dir, "samples", picture_grid(draw(args, transformer, vqvae)), step)
            ema.restore(transformer.parameters())
            speed = (step - first_step) / (time.perf_counter() - started)
            record = {"step": step, "steps_per_second": round(speed, 3), "train_loss": result.loss.item(), **metrics}
            append_json_line(log_file, record)
            accelerator.log({"val_loss": metrics["val_loss"]}, step=step)
            tqdm.write(f"step {step}: validation loss {metrics['val_loss']:.4f}")
    if accelerator.is_main_process:
        ema.copy_to(transformer.parameters())
        scheduler = ScaleScheduler(scale_sizes=scale_sizes)
        SRDDPipeline(vqvae, transformer.eval(), scheduler).save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
