#!/usr/bin/env python
"""
Train a multi-scale tokenizer (`MultiScaleVQModel`) on images.

    accelerate launch training_scripts/train_tokenizer.py --train_data_dir my_images --resolution 64 \
        --scale_sizes 1,2,3,4,5,6,8 --output_dir my-tokenizer

The finished model, with averaged (EMA) weights, lies in `output_dir`; `MultiScaleVQModel.from_pretrained` loads it.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel
from srdd.training.arguments import add_common_arguments
from srdd.training.checkpoints import resume, save_checkpoint
from srdd.training.codebook import CodebookTracker
from srdd.training.data import AugmentedImages, training_transform
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
from srdd.training.perceptual import EfficientNetPerceptualLoss


def int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", help="Start from this tokenizer instead of from nothing.")
    model.add_argument("--resolution", type=int, default=64, help="Side of the training images.")
    model.add_argument("--scale_sizes", type=int_list, default=[1, 2, 3, 4, 5, 6, 8], help="Sides, coarse to fine.")
    model.add_argument("--codebook_size", type=int, default=2048)
    model.add_argument("--latent_channels", type=int, default=16)
    model.add_argument("--block_out_channels", type=int_list, default=[64, 128, 160], help="Finest resolution first.")
    model.add_argument("--layers_per_block", type=int, default=1)
    model.add_argument("--patch_size", type=int, default=2, help="Pixels folded into channels before the encoder.")
    losses = parser.add_argument_group("losses")
    losses.add_argument("--l1_weight", type=float, default=1.0)
    losses.add_argument("--l2_weight", type=float, default=1.0)
    losses.add_argument("--perceptual_weight", type=float, default=0.1, help="0 needs no EfficientNet.")
    losses.add_argument("--codebook_weight", type=float, default=1.0)
    losses.add_argument("--commitment_weight", type=float, default=0.25)
    losses.add_argument("--revive_steps", type=int, default=100, help="Steps between revivals of dead codes.")
    losses.add_argument("--revive_until", type=float, default=0.7, help="Share of training with revivals.")
    parser.set_defaults(adam_weight_decay=0.0)  # decay would pull codes and norms to zero
    return parser.parse_args(arguments)


def build_model(args: argparse.Namespace) -> MultiScaleVQModel:
    if args.pretrained_model_name_or_path:
        return MultiScaleVQModel.from_pretrained(args.pretrained_model_name_or_path)
    levels = len(args.block_out_channels)
    return MultiScaleVQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        codebook_size=args.codebook_size,
        scale_sizes=args.scale_sizes,
        sample_size=args.resolution,
        patch_size=args.patch_size,
    )


@torch.no_grad()
def validate(model: MultiScaleVQModel, loader: torch.utils.data.DataLoader, device: torch.device) -> dict:
    """PSNR in dB, usage and perplexity per scale, and the first batch beside its reconstruction."""
    model.eval()
    squared, pixels, token_ids, pictures = 0.0, 0, [], None
    for batch in loader:
        sample = batch["pixel_values"].to(device)
        output = model(sample)
        errors = (output.sample.clamp(-1, 1) - sample).float().square().sum(dim=(1, 2, 3)) / sample[0].numel()
        squared += (10 * torch.log10(4 / errors)).sum().item()
        pixels += len(sample)
        token_ids.append(output.token_ids)
        if pictures is None:
            pictures = (sample, output.sample)
    usage = model.codebook_usage(torch.cat(token_ids))
    model.train()
    return {"psnr": squared / pixels, **usage, "pictures": pictures}


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    images = load_images(args, None)
    validation = validation_images(images, 512)
    augmented = AugmentedImages(images, args.resolution, not args.center_crop, args.random_flip, args.seed)
    validation.set_transform(training_transform(images, args.resolution))
    loader = make_loader(args, augmented)
    validation_loader = torch.utils.data.DataLoader(validation, batch_size=args.train_batch_size)

    model = build_model(args).to(memory_format=torch.channels_last)
    perceptual = EfficientNetPerceptualLoss().to(accelerator.device) if args.perceptual_weight > 0 else None
    optimizer, schedule = make_optimizer(args, model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    tokenizer = accelerator.unwrap_model(model)
    ema = EMAModel(tokenizer.parameters(), decay=args.ema_decay)
    ema.to(accelerator.device)
    tracker = CodebookTracker(tokenizer.config.codebook_size, device=accelerator.device)
    accelerator.register_for_checkpointing(schedule, ema, tracker)

    step = resume(accelerator, args.output_dir, args.resume_from_checkpoint)
    started, first_step = time.perf_counter(), step
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    log_file = Path(args.output_dir) / "train_log.jsonl"
    model.train()
    fresh = step == 0 and not args.pretrained_model_name_or_path
    for batch in batches_from(accelerator, loader, step, args.max_train_steps):
        with accelerator.accumulate(model):
            sample = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
            if fresh:  # all codes start on features of the first batch
                revive(accelerator, tokenizer, tracker, ema, sample, seed=args.seed)
                fresh = False
            output = model(sample)
            error = output.sample.float() - sample
            losses = {
                "l1": args.l1_weight * error.abs().mean(),
                "l2": args.l2_weight * error.square().mean(),
                "codebook": args.codebook_weight * output.codebook_loss,
                "commitment": args.commitment_weight * output.commitment_loss,
            }
            if perceptual is not None:
                losses["perceptual"] = args.perceptual_weight * perceptual(output.sample, sample)
            loss = torch.stack([value.float() for value in losses.values()]).sum()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss.item()} at step {step + 1}: {losses}.")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        tracker.update(accelerator.gather(output.token_ids))
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        step += 1
        ema.step(tokenizer.parameters())
        progress.update()
        if step % args.revive_steps == 0 and step <= args.revive_until * args.max_train_steps:
            revived = revive(accelerator, tokenizer, tracker, ema, sample, seed=args.seed + step)
            losses["revived"] = torch.tensor(float(revived))
        if step % 10 == 0:
            values = {name: value.item() for name, value in losses.items()}
            accelerator.log({**values, "lr": schedule.get_last_lr()[0]}, step=step)
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if (step % args.validation_steps == 0 or step == args.max_train_steps) and accelerator.is_main_process:
            ema.store(tokenizer.parameters())
            ema.copy_to(tokenizer.parameters())
            metrics = validate(tokenizer, validation_loader, accelerator.device)
            ema.restore(tokenizer.parameters())
            rows = [row[: args.num_validation_images] for row in metrics.pop("pictures")]
            log_images(accelerator, args.output_dir, "reconstruction", picture_grid(rows), step)
            speed = (step - first_step) / (time.perf_counter() - started)
            record = {"step": step, "steps_per_second": round(speed, 3), **metrics}
            record.update({f"loss_{name}": value.item() for name, value in losses.items()})
            append_json_line(log_file, record)
            accelerator.log({"psnr": metrics["psnr"]}, step=step)
            tqdm.write(f"step {step}: PSNR {metrics['psnr']:.2f} dB, usage {min(metrics['usage']):.3f} at the least")
    if accelerator.is_main_process:
        ema.copy_to(tokenizer.parameters())
        tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


@torch.no_grad()
def revive(
    accelerator, tokenizer: MultiScaleVQModel, tracker: CodebookTracker, ema: EMAModel, sample, seed: int
) -> int:
    """Revive dead codes alike on all processes, in the averaged weights too."""
    latents = accelerator.gather(tokenizer.encode(sample).latents)
    generator = torch.Generator().manual_seed(seed)
    revived = tracker.revive(tokenizer.quantize, latents, tokenizer.config.scale_sizes, generator=generator)
    names = [name for name, _ in tokenizer.named_parameters()]
    averaged = ema.shadow_params[names.index("quantize.codebook.weight")]
    averaged[revived] = tokenizer.quantize.codebook.weight[revived]
    return len(revived)


if __name__ == "__main__":
    main(parse_args())
