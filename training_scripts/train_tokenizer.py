#!/usr/bin/env python
"""
Train a multi-scale tokenizer (`MultiScaleVQModel`) on images.

    accelerate launch training_scripts/train_tokenizer.py --preset 64px --train_data_dir my_images \
        --output_dir my-tokenizer

The finished model, with averaged (EMA) weights, lies in `output_dir`; `MultiScaleVQModel.from_pretrained` loads it.
"""

import argparse
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils import logging

from srdd import MultiScaleVQModel
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.scales import default_scale_sizes, num_tokens_per_scale
from srdd.training.accelerator import make_accelerator
from srdd.training.adversarial_loss import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from srdd.training.averaged_weights import AveragedWeights
from srdd.training.codebook_upkeep import CodebookTracker, low_usage
from srdd.training.graceful_end import ends_gracefully
from srdd.training.optimizer import is_fused, make_optimizer
from srdd.training.pixel_losses import PixelLosses
from srdd.training.pretrained import load_tokenizer
from srdd.training.publishing import finish_tokenizer
from srdd.training.settings import PixelSettings, flag, make_parser, parse_settings, positive_int
from srdd.training.training_data import load_images, load_pixels, make_loader, make_validation_loader
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


@dataclass(kw_only=True)
class ModelSettings:
    """The tokenizer. Starting from one, its own configuration holds."""

    pretrained_model_name_or_path: str | None = flag(
        help="Start from this tokenizer, or that of a pipeline, instead of from nothing."
    )
    preset: str = flag("64px", "Defaults of the following six arguments.", choices=PRESETS)
    resolution: int | None = flag(help="Side of the training images.")
    patch_size: int | None = flag(help="Pixels folded into channels before the encoder.")
    block_out_channels: list[int] | None = flag(help="Finest resolution first.")
    layers_per_block: int | None = flag()
    latent_channels: int | None = flag()
    codebook_size: int | None = flag()
    scale_sizes: list[int] | None = flag(help="Sides, coarse to fine; default: from the latent grid.")


@dataclass(kw_only=True)
class LossSettings:
    """What the other losses weigh."""

    codebook_weight: float = flag(1.0)
    commitment_weight: float = flag(0.25)
    adversarial_weight: float = flag(0.0, "0 trains without a discriminator.")
    adversarial_start_step: int = flag(0, "Step at which the discriminator enters.")
    fixed_adversarial_weight: bool = flag(
        False, "Take `--adversarial_weight` as it is, not relative to the gradient of the reconstruction."
    )
    discriminator_learning_rate: float | None = flag(help="Default: `--learning_rate`.")
    discriminator_layers: int = flag(3, "Halvings of the resolution.", type=positive_int)


@dataclass(kw_only=True)
class CodebookSettings:
    """How the codebook is kept in use."""

    codebook_update: str = flag("gradient", choices=["gradient", "ema"])
    revive_steps: int = flag(100, "Steps between revivals of dead codes.", type=positive_int)
    revive_until: float = flag(0.7, "Share of training with revivals.")
    usage_warning: float = flag(0.1, "Warn of scales that use less of what they could.")


@dataclass(kw_only=True)
class TokenizerSettings(PixelSettings, ModelSettings, LossSettings, CodebookSettings):
    """How the tokenizer is trained."""

    learning_rate: float = flag(5e-4)
    scale_dropout_prob: float = flag(0.0, "Images decoded without fine scales.")
    train_decoder_only: bool = flag(False, "Tokens stay as they are, and transformers stay valid.")


def parse_args(arguments: list[str] | None = None) -> TokenizerSettings:
    parser = make_parser(__doc__, TokenizerSettings)
    preset = argparse.ArgumentParser(add_help=False)  # of its own: `--help` shows what follows from it
    preset.add_argument("--preset", default=ModelSettings.preset, choices=PRESETS)
    parser.set_defaults(**PRESETS[preset.parse_known_args(arguments)[0].preset])
    args = parse_settings(parser, TokenizerSettings, arguments)
    if args.train_decoder_only and not args.pretrained_model_name_or_path:
        parser.error("`--train_decoder_only` needs `--pretrained_model_name_or_path`.")
    return args


def build_model(args: ModelSettings) -> MultiScaleVQModel:
    if args.pretrained_model_name_or_path:
        return load_tokenizer("pretrained_model_name_or_path", args.pretrained_model_name_or_path)
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


def latent_grid(args: ModelSettings) -> int:
    ratio = args.patch_size * 2 ** (len(args.block_out_channels) - 1)
    if args.resolution % ratio:
        raise ValueError(f"`resolution` must be a multiple of the compression ratio {ratio}, got {args.resolution}.")
    return args.resolution // ratio


def freeze(model: MultiScaleVQModel, args: TokenizerSettings) -> None:
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

    def __init__(self, args: TokenizerSettings, accelerator: Accelerator, last_layer: torch.Tensor):
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
            discriminator = self.accelerator.unwrap_model(discriminator)
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
    args: TokenizerSettings, model: MultiScaleVQModel, device: torch.device
) -> tuple[PatchDiscriminator | None, torch.optim.Optimizer | None]:
    """A discriminator of the model's images and its optimizer, if the adversarial loss weighs anything."""
    if args.adversarial_weight <= 0:
        return None, None
    resolution = model.resolution
    deepest = (resolution // 3).bit_length() - 1
    if args.discriminator_layers > deepest:
        raise ValueError(
            f"`discriminator_layers` must be at most {deepest} for images of {resolution} pixels, got"
            f" {args.discriminator_layers}."
        )
    discriminator = PatchDiscriminator(model.config.out_channels, num_layers=args.discriminator_layers)
    rate = args.discriminator_learning_rate or args.learning_rate
    optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=rate, betas=(0.5, 0.9), weight_decay=0.0, fused=is_fused(device)
    )
    return discriminator, optimizer


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


def track_codebook(args: TokenizerSettings, tokenizer: MultiScaleVQModel) -> CodebookTracker:
    """Counts the uses of every code, those of a pretrained tokenizer as in use."""
    config = tokenizer.config
    latent_channels = config.latent_channels if args.codebook_update == "ema" else None
    tracker = CodebookTracker(config.codebook_size, latent_channels, device=tokenizer.device)
    if args.pretrained_model_name_or_path:
        tracker.start_from(tokenizer.quantize)
    return tracker


def revives_after(args: TokenizerSettings, step: int) -> bool:
    """Whether dead codes are revived at the end of a step."""
    is_early = step <= args.revive_until * args.max_train_steps
    return is_early and step % args.revive_steps == 0 and not args.train_decoder_only


def kept_scales(args: TokenizerSettings, num_scales: int, sample: torch.Tensor) -> torch.LongTensor | None:
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


def report_usage(args: TokenizerSettings, run: TrainingRun, model: MultiScaleVQModel, metrics: dict) -> None:
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


@ends_gracefully
def main(args: TokenizerSettings) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    with accelerator.main_process_first():
        images = load_images(args, None, args.max_train_samples, args.seed)
    model = build_model(args).to(memory_format=torch.channels_last)
    freeze(model, args)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    discriminator, discriminator_optimizer = build_discriminator(args, model, accelerator.device)
    scale_sizes = model.config.scale_sizes
    pixels, validation_pixels = load_pixels(args, model.resolution, images)
    loader = make_loader(args, pixels, accelerator.num_processes)
    validation_loader = make_validation_loader(args, validation_pixels)

    averaged = evaluation_copy(model, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if discriminator is not None:
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    modules = [module for module in (model, discriminator) if module is not None]
    tokenizer = accelerator.unwrap_model(model)
    tracker = track_codebook(args, tokenizer)
    compute_losses = TokenizerLosses(args, accelerator, tokenizer.decoder.conv_out.weight)
    run = TrainingRun(args, accelerator, model, schedule, [tracker], images=images)
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
            run.add_batch(losses)
            continue
        if revives_after(args, run.step + 1):
            losses["revived_codes"] = revive(tokenizer, tracker, run.ema, latents, args.seed + run.step + 1)
        run.finish_step(losses)
        if run.is_due(args.validation_steps):
            run.copy_averages_to(averaged)
            if accelerator.is_main_process:
                metrics, pictures = evaluate_reconstruction(averaged, validation_loader, args.num_validation_images)
                run.record_validation(metrics, "reconstruction", pictures)
                report_usage(args, run, averaged, metrics)
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        trained_part = "decoder" if args.train_decoder_only else None
        finish_tokenizer(args, averaged, images, trained_part, resumed=run.resumed)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
