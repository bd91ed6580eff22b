#!/usr/bin/env python
"""
Train a multi-scale tokenizer (`MultiScaleVQModel`) on images.

    accelerate launch training_scripts/train_tokenizer.py --preset 64px --train_data_dir my_images \
        --output_dir my-tokenizer

The finished model, with averaged (EMA) weights, lies in `output_dir`; `MultiScaleVQModel.from_pretrained` loads it.
"""

import argparse
import sys

import torch
from accelerate.utils import set_seed
from diffusers.utils import logging
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel
from srdd.data.images import AugmentedImages, training_transform, validation_images
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.scales import default_scale_sizes, num_tokens_per_scale
from srdd.training.accelerator import make_accelerator
from srdd.training.adversarial_loss import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from srdd.training.averaged_weights import AveragedWeights
from srdd.training.codebook_upkeep import CodebookTracker, low_usage
from srdd.training.optimizer import make_optimizer
from srdd.training.pixel_losses import PixelLosses
from srdd.training.publishing import finish_tokenizer
from srdd.training.settings import add_pixel_loss_arguments, add_training_arguments, int_list, positive_int
from srdd.training.training_data import load_images, make_loader
from srdd.training.training_run import TrainingRun, evaluation_copy


logger = logging.get_logger(__name__)

# Sizes that work. The latent grid is the resolution over `patch_size * 2 ** (len(block_out_channels) - 1)`, and the
# scales follow from the grid (`srdd.scales.default_scale_sizes`). 256px is the tokenizer of VAR.
PRESETS = {
    "32px": {
        "resolution": 32, "patch_size": 1, "block_out_channels": [64, 96, 128], "layers_per_block": 1,
        "latent_channels": 16, "codebook_size": 1024,
    },
    "64px": {
        "resolution": 64, "patch_size": 2, "block_out_channels": [64, 128, 160], "layers_per_block": 1,
        "latent_channels": 16, "codebook_size": 2048,
    },
    "128px": {
        "resolution": 128, "patch_size": 1, "block_out_channels": [64, 128, 192, 256], "layers_per_block": 1,
        "latent_channels": 16, "codebook_size": 4096,
    },
    "256px": {
        "resolution": 256, "patch_size": 1, "block_out_channels": [160, 160, 320, 320, 640], "layers_per_block": 2,
        "latent_channels": 32, "codebook_size": 4096,
    },
}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--center_crop", action="store_true", help="Crop in the centre instead of at random.")
    model = parser.add_argument_group("model", "Starting from a tokenizer, its own configuration holds.")
    model.add_argument("--pretrained_model_name_or_path", help="Start from this tokenizer instead of from nothing.")
    model.add_argument("--preset", choices=PRESETS, default="64px", help="Defaults of the following six arguments.")
    model.add_argument("--resolution", type=int, help="Side of the training images.")
    model.add_argument("--patch_size", type=int, help="Pixels folded into channels before the encoder.")
    model.add_argument("--block_out_channels", type=int_list, help="Finest resolution first.")
    model.add_argument("--layers_per_block", type=int)
    model.add_argument("--latent_channels", type=int)
    model.add_argument("--codebook_size", type=int)
    model.add_argument("--scale_sizes", type=int_list, help="Sides, coarse to fine; default: from the latent grid.")
    losses = parser.add_argument_group("losses")
    add_pixel_loss_arguments(losses)
    losses.add_argument("--codebook_weight", type=float, default=1.0)
    losses.add_argument("--commitment_weight", type=float, default=0.25)
    losses.add_argument("--adversarial_weight", type=float, default=0.0, help="0 trains without a discriminator.")
    losses.add_argument(
        "--adversarial_start_step", type=int, default=0, help="Step at which the discriminator enters."
    )
    losses.add_argument(
        "--fixed_adversarial_weight",
        action="store_true",
        help="Take `--adversarial_weight` as it is, not relative to the gradient of the reconstruction.",
    )
    losses.add_argument("--discriminator_learning_rate", type=float, help="Default: `--learning_rate`.")
    losses.add_argument("--discriminator_layers", type=positive_int, default=3, help="Halvings of the resolution.")
    codebook = parser.add_argument_group("codebook")
    codebook.add_argument("--codebook_update", choices=["gradient", "ema"], default="gradient")
    codebook.add_argument(
        "--revive_steps", type=positive_int, default=100, help="Steps between revivals of dead codes."
    )
    codebook.add_argument("--revive_until", type=float, default=0.7, help="Share of training with revivals.")
    codebook.add_argument(
        "--usage_warning", type=float, default=0.1, help="Warn of scales that use less of what they could."
    )
    codebook.add_argument("--scale_dropout_prob", type=float, default=0.0, help="Images decoded without fine scales.")
    codebook.add_argument(
        "--train_decoder_only", action="store_true", help="Tokens stay as they are, and transformers stay valid."
    )
    parser.set_defaults(adam_weight_decay=0.0)  # decay would pull codes and norms to zero
    preset = PRESETS[parser.parse_known_args(arguments)[0].preset]
    parser.set_defaults(**preset)
    args = parser.parse_args(arguments)
    args.command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    if args.train_decoder_only and not args.pretrained_model_name_or_path:
        parser.error("`--train_decoder_only` needs `--pretrained_model_name_or_path`.")
    return args


def build_model(args: argparse.Namespace) -> MultiScaleVQModel:
    if args.pretrained_model_name_or_path:
        return MultiScaleVQModel.from_pretrained(args.pretrained_model_name_or_path)
    levels = len(args.block_out_channels)
    attention = args.preset == "256px"  # in the coarsest blocks, as VAR's
    return MultiScaleVQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1)
        + ("AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D",)
        + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        codebook_size=args.codebook_size,
        scale_sizes=args.scale_sizes or default_scale_sizes(latent_grid(args)),
        sample_size=args.resolution,
        patch_size=args.patch_size,
    )


def latent_grid(args: argparse.Namespace) -> int:
    ratio = args.patch_size * 2 ** (len(args.block_out_channels) - 1)
    if args.resolution % ratio:
        raise ValueError(f"`resolution` must be a multiple of the compression ratio {ratio}, got {args.resolution}.")
    return args.resolution // ratio


def image_side(model: MultiScaleVQModel) -> int:
    """Pixels of a side of the images that a tokenizer is trained on."""
    return model.config.scale_sizes[-1][0] * model.spatial_compression_ratio


def freeze(model: MultiScaleVQModel, args: argparse.Namespace) -> None:
    """Leave out what this run does not train by gradients, and what no scale uses."""
    quantizer, grid = model.quantize, model.config.scale_sizes[-1]
    used = {id(quantizer.residual_conv(size, grid)) for size in model.config.scale_sizes}
    for conv in quantizer.residual_convs:
        conv.requires_grad_(id(conv) in used)
    if args.codebook_update == "ema":
        quantizer.codebook.requires_grad_(False)
    if args.train_decoder_only:
        for module in (model.encoder, model.quant_conv, quantizer):
            module.requires_grad_(False)


class TokenizerLosses:
    """The weighted losses of a batch, the discriminator's apart."""

    def __init__(self, args: argparse.Namespace, accelerator, last_layer: torch.Tensor):
        self.args = args
        self.accelerator = accelerator
        self.last_layer = last_layer
        self.pixel_losses = PixelLosses(args, accelerator.device)

    def __call__(self, output, sample: torch.Tensor, discriminator: torch.nn.Module | None) -> dict[str, torch.Tensor]:
        """All terms by name, `"loss"` being their sum; without a discriminator there is no adversarial term."""
        args, reconstruction = self.args, self.pixel_losses(output.sample, sample)
        losses = {
            **reconstruction,
            "codebook": args.codebook_weight * output.codebook_loss,
            "commitment": args.commitment_weight * output.commitment_loss,
        }
        if discriminator is not None:
            discriminator.requires_grad_(False)  # it learns from its own loss
            adversarial = generator_loss(discriminator(output.sample).float())
            discriminator.requires_grad_(True)
            weight = args.adversarial_weight
            if not args.fixed_adversarial_weight:
                total = torch.stack(list(reconstruction.values())).sum()
                weight = weight * adaptive_weight(total, adversarial, self.last_layer, self.accelerator)
            losses["adversarial"] = weight * adversarial
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def build_discriminator(
    args: argparse.Namespace, model: MultiScaleVQModel
) -> tuple[PatchDiscriminator | None, torch.optim.Optimizer | None]:
    """A discriminator of the model's images and its optimizer, if the adversarial loss weighs anything."""
    if args.adversarial_weight <= 0:
        return None, None
    resolution = image_side(model)
    deepest = (resolution // 3).bit_length() - 1
    if args.discriminator_layers > deepest:
        raise ValueError(
            f"`discriminator_layers` must be at most {deepest} for images of {resolution} pixels, got"
            f" {args.discriminator_layers}."
        )
    discriminator = PatchDiscriminator(model.config.out_channels, num_layers=args.discriminator_layers)
    rate = args.discriminator_learning_rate or args.learning_rate
    return discriminator, torch.optim.AdamW(discriminator.parameters(), lr=rate, betas=(0.5, 0.9), weight_decay=0.0)


def train_discriminator(
    run: TrainingRun,
    discriminator: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    sample: torch.Tensor,
    reconstruction: torch.Tensor,
) -> torch.Tensor:
    """Take a step of the discriminator, and return its loss."""
    logits = discriminator(torch.cat([sample, reconstruction]))
    loss = discriminator_loss(*logits.float().chunk(2))
    run.check_finite({"discriminator": loss})
    run.accelerator.backward(loss)
    run.clip_gradients(discriminator.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return loss


def track_codebook(args: argparse.Namespace, tokenizer: MultiScaleVQModel) -> CodebookTracker:
    """Counts the uses of every code, those of a pretrained tokenizer as in use."""
    config = tokenizer.config
    latent_channels = config.latent_channels if args.codebook_update == "ema" else None
    tracker = CodebookTracker(config.codebook_size, latent_channels, device=tokenizer.device)
    if args.pretrained_model_name_or_path:
        tracker.start_from(tokenizer.quantize)
    return tracker


def revives_after(args: argparse.Namespace, step: int) -> bool:
    """Whether dead codes are revived at the end of a step."""
    is_early = step <= args.revive_until * args.max_train_steps
    return is_early and step % args.revive_steps == 0 and not args.train_decoder_only


def kept_scales(args: argparse.Namespace, num_scales: int, sample: torch.Tensor) -> torch.LongTensor | None:
    """Of how many scales each image is decoded: all, or, for a share of the images, a random number of them."""
    if args.scale_dropout_prob == 0:
        return None
    shape, device = (len(sample),), sample.device
    fewer = torch.randint(1, num_scales + 1, shape, device=device)
    return torch.where(torch.rand(shape, device=device) < args.scale_dropout_prob, fewer, num_scales)


@torch.no_grad()
def revive(
    tokenizer: MultiScaleVQModel, tracker: CodebookTracker, ema: AveragedWeights, latents: torch.Tensor, seed: int
) -> torch.Tensor:
    """Revive dead codes alike on all processes, in the averaged weights too, and return their number."""
    generator = torch.Generator().manual_seed(seed)
    revived = tracker.revive(tokenizer.quantize, latents, tokenizer.config.scale_sizes, generator=generator)
    names = [name for name, _ in tokenizer.named_parameters()]
    averaged_codes = ema.shadow_params[names.index("quantize.codebook.weight")]
    averaged_codes[revived] = tokenizer.quantize.codebook.weight[revived]
    return torch.tensor(float(len(revived)), device=latents.device)


def report_usage(args: argparse.Namespace, run: TrainingRun, model: MultiScaleVQModel, metrics: dict) -> None:
    """Hand the usage of every scale to the tracker, and warn where it is low."""
    sizes = model.config.scale_sizes
    for (height, width), usage, perplexity in zip(sizes, metrics["usage"], metrics["perplexity"]):
        scale = f"{height}x{width}"
        run.accelerator.log({f"usage/{scale}": usage, f"perplexity/{scale}": perplexity}, step=run.step)
    token_counts = [count * metrics["num_images"] for count in num_tokens_per_scale(sizes)]
    low = low_usage(metrics["usage"], token_counts, model.config.codebook_size, args.usage_warning)
    if low:
        scales = ", ".join(f"{sizes[k][0]}x{sizes[k][1]} (perplexity {metrics['perplexity'][k]:.0f})" for k in low)
        logger.warning(
            f"Step {run.step}: the scales {scales} use less than {args.usage_warning:.0%} of the codes they could. A"
            " smaller `--codebook_size`, more frequent `--revive_steps` or fewer `--scale_sizes` help; early in"
            " training it may pass."
        )


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    with accelerator.main_process_first():
        images = load_images(args, None, args.max_train_samples)
    model = build_model(args).to(memory_format=torch.channels_last)
    freeze(model, args)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    discriminator, discriminator_optimizer = build_discriminator(args, model)
    scale_sizes, resolution = model.config.scale_sizes, image_side(model)
    augmented = AugmentedImages(images, resolution, not args.center_crop, args.random_flip, args.seed)
    loader = make_loader(args, augmented, accelerator.num_processes)
    validation = validation_images(images, 512).with_transform(training_transform(images, resolution))
    validation_loader = DataLoader(validation, batch_size=args.train_batch_size)

    averaged = evaluation_copy(model, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if discriminator is not None:
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    modules = [module for module in (model, discriminator) if module is not None]
    tokenizer = accelerator.unwrap_model(model)
    tracker = track_codebook(args, tokenizer)
    compute_losses = TokenizerLosses(args, accelerator, tokenizer.decoder.conv_out.weight)
    run = TrainingRun(args, accelerator, model, schedule, [tracker])
    needs_codes = run.step == 0 and not args.pretrained_model_name_or_path
    for batch in run.batches(loader):
        with accelerator.accumulate(*modules):
            sample = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
            if needs_codes:  # all start on features of the first batch
                with torch.no_grad():
                    latents = accelerator.gather(tokenizer.encode(sample).latents)
                revive(tokenizer, tracker, run.ema, latents, args.seed)
                needs_codes = False
            adversary = discriminator if run.step >= args.adversarial_start_step else None
            output = model(sample, num_scales=kept_scales(args, len(scale_sizes), sample))
            losses = compute_losses(output, sample, adversary)
            run.check_finite(losses)
            accelerator.backward(losses["loss"])
            run.clip_gradients(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            if adversary is not None:
                losses["discriminator"] = train_discriminator(
                    run, adversary, discriminator_optimizer, sample, output.sample.detach()
                )
        latents = accelerator.gather(output.latents.detach())
        if args.codebook_update == "ema" and not args.train_decoder_only:
            tracker.move_codes(tokenizer.quantize, latents, scale_sizes)
        else:
            tracker.update(accelerator.gather(output.token_ids))
        if not accelerator.sync_gradients:
            continue
        if revives_after(args, run.step + 1):
            losses["revived_codes"] = revive(tokenizer, tracker, run.ema, latents, args.seed + run.step + 1)
        run.finish_step(losses)
        if run.is_due(args.validation_steps):
            run.averaged_model(averaged)
            if accelerator.is_main_process:
                metrics, pictures = evaluate_reconstruction(averaged, validation_loader, args.num_validation_images)
                run.record_validation(metrics, "reconstruction", pictures)
                report_usage(args, run, averaged, metrics)
        run.checkpoint()

    run.averaged_model(averaged)
    run.close()
    if accelerator.is_main_process:
        finish_tokenizer(args, averaged, images)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
