#!/usr/bin/env python
"""
Train a diffusion baseline on diffusers' own classes: latent diffusion with a DiT or with a UNet (LDM), and before it
the autoencoder that makes the latents.

    accelerate launch training_scripts/train_baseline.py --model vae --train_data_dir my_images \
        --output_dir my-autoencoder
    accelerate launch training_scripts/train_baseline.py --model dit --train_data_dir my_images \
        --pretrained_vae_name_or_path my-autoencoder --output_dir my-dit

Data, steps, averaged (EMA) weights and evaluation are those of `train_tokenizer.py` and `train_srdd.py`.
`AutoencoderKL.from_pretrained` loads the first folder, `DiTPipeline.from_pretrained` that of a DiT, and
`srdd.evaluation.latent_diffusion.LatentDiffusionPipeline.from_pretrained` that of a DiT or an LDM.
"""

import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from tqdm.auto import tqdm

from srdd.data.images import LabelledImages
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline
from srdd.evaluation.paired_metrics import peak_signal_to_noise, structural_similarity
from srdd.training.accelerator import make_accelerator
from srdd.training.condition_dropout import drop_conditions
from srdd.training.denoisers import DIT_NULL_CLASS, describe_size, new_dit, new_unet
from srdd.training.graceful_end import ends_gracefully
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.pixel_losses import PixelLosses
from srdd.training.pretrained import find_model
from srdd.training.publishing import finish_latent_diffusion, finish_tokenizer
from srdd.training.settings import (
    PixelSettings,
    TokenSettings,
    flag,
    make_parser,
    non_negative_float,
    parse_settings,
    positive_int,
    probability,
    refuse_given,
)
from srdd.training.training_data import load_images, load_latents, load_pixels, make_loader, make_validation_loader
from srdd.training.training_run import TrainingRun, evaluation_copy
from srdd.training.validation import draw


# The noise schedules of the papers.
NOISE = {
    "dit": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "ldm": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
}


@dataclass(kw_only=True)
class ModelSettings:
    """The model. Which of these it has depends on its kind; others are refused."""

    model: str = flag(MISSING, "The autoencoder, or latent diffusion on one.", choices=["vae", "dit", "ldm"])
    resolution: int | None = flag(help="Side of the images; default: 64, or the autoencoder's.", type=positive_int)
    block_out_channels: list[int] | None = flag(
        help="Of vae and ldm, finest resolution first, multiples of 32; default: 32,64,128,160 and 64,128,160."
    )
    layers_per_block: int = flag(1, "Of vae and ldm.", type=positive_int)
    num_layers: int = flag(4, "Of dit.", type=positive_int)
    num_attention_heads: int = flag(4, "Of dit.", type=positive_int)
    patch_size: int = flag(1, "Of dit.", type=positive_int)
    attention_head_dim: int | None = flag(help="Of dit and ldm; default: 64 and 32.", type=positive_int)


@dataclass(kw_only=True)
class AutoencoderSettings:
    """The autoencoder."""

    latent_channels: int = flag(4, type=positive_int)
    kl_weight: float = flag(
        1e-6, "Of the latents' divergence from a normal distribution, per value of a picture.", type=non_negative_float
    )


@dataclass(kw_only=True)
class DiffusionSettings:
    """Latent diffusion."""

    pretrained_vae_name_or_path: str | None = flag(
        help="Folder or Hub id of an `AutoencoderKL`, or of a pipeline that has one."
    )
    prediction_type: str = flag("epsilon", choices=["epsilon", "v_prediction"])
    class_dropout_prob: float = flag(0.1, type=probability)
    validation_guidance_scale: float | None = flag(help="Of the pictures at validations; default: the pipeline's own.")


@dataclass(kw_only=True)
class BaselineSettings(PixelSettings, TokenSettings, ModelSettings, AutoencoderSettings, DiffusionSettings):
    """A diffusion baseline."""

    learning_rate: float = flag(5e-4)

    def __post_init__(self):
        super().__post_init__()
        self.token_cache_dir = self.token_cache_dir or f"{self.output_dir}/latents"


# What only some kinds of models have.
OF_DIFFUSION = {
    *("pretrained_vae_name_or_path", "prediction_type", "class_dropout_prob", "validation_guidance_scale"),
    *("label_column", "random_crops", "attention_head_dim"),
}
OPTIONS = {
    "vae": {
        *("block_out_channels", "layers_per_block", "latent_channels", "kl_weight", "center_crop", "min_crop"),
        *("random_colors", "l1_weight", "l2_weight", "perceptual_weight"),
    },
    "dit": {*OF_DIFFUSION, "num_layers", "num_attention_heads", "patch_size"},
    "ldm": {*OF_DIFFUSION, "block_out_channels", "layers_per_block"},
}


def parse_args(arguments: list[str] | None = None) -> BaselineSettings:
    parser = make_parser(__doc__, BaselineSettings)
    args = parse_settings(parser, BaselineSettings, arguments)
    if args.model != "vae" and not args.pretrained_vae_name_or_path:
        parser.error(f"`--pretrained_vae_name_or_path` is needed with `--model {args.model}`.")
    return args


def check_multiple(name: str, value: int, factor: int, what: str) -> None:
    if value % factor:
        raise ValueError(f"`{name}` must be a multiple of {factor}, {what}, got {value}.")


def channels_of(args: ModelSettings, default: list[int]) -> list[int]:
    """Channels of the levels, which groups of 32 are normalised in."""
    channels = args.block_out_channels or default
    if min(channels) < 1 or any(width % 32 for width in channels):
        raise ValueError(f"`block_out_channels` must be positive multiples of 32, got {channels}.")
    return channels


class Autoencoder(nn.Module):
    """An `AutoencoderKL` whose forward tells the divergence of its latents, too."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae, self.config = vae, vae.config

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels from latents that are drawn at random, and the mean divergence in nats per value of a picture."""
        posterior = self.vae.encode(sample).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean() / sample[0].numel()


class AutoencoderTraining:
    """What the loop trains with `--model vae`: pictures are to come back from latents."""

    def __init__(self, args: BaselineSettings, accelerator: Accelerator, images: LabelledImages):
        self.args, self.images = args, images
        channels, resolution = channels_of(args, [32, 64, 128, 160]), args.resolution or 64
        check_multiple("resolution", resolution, 2 ** (len(channels) - 1), "by which the autoencoder divides it")
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            block_out_channels=channels,
            layers_per_block=args.layers_per_block,
            latent_channels=args.latent_channels,
            sample_size=resolution,
        )
        if args.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.model, self.frozen = Autoencoder(vae).to(memory_format=torch.channels_last), {}
        self.pixel_losses = PixelLosses(args, accelerator.device)
        self.size, self.latent_deviation = describe_size(vae), None

    def load_data(self, accelerator: Accelerator) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
        return load_pixels(self.args, self.model.config.sample_size, self.images)

    def losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All terms by name, `"loss"` being their sum."""
        sample = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        reconstruction, divergence = model(sample)
        losses = self.pixel_losses(reconstruction, sample)
        losses["divergence"] = self.args.kl_weight * divergence.float()
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def validate(self, averaged: Autoencoder, loader: Iterable) -> tuple[dict, str, list[torch.Tensor]]:
        """PSNR and SSIM of held-out images, the deviation of their latents, and some of them."""
        psnr, ssim, pictures, means, squares = [], [], [], [], []
        for batch in loader:
            sample = batch["pixel_values"].to(averaged.vae.device)
            posterior = averaged.vae.encode(sample).latent_dist
            reconstruction = averaged.vae.decode(posterior.mean).sample.float().clamp(-1, 1)
            pair = reconstruction / 2 + 0.5, sample / 2 + 0.5
            psnr.append(peak_signal_to_noise(*pair))
            ssim.append(structural_similarity(*pair))
            means.append(posterior.mean.float().mean(dim=(1, 2, 3)))
            squares.append((posterior.mean.float() ** 2 + posterior.var.float()).mean(dim=(1, 2, 3)))
            pictures = pictures or [images[: self.args.num_validation_images] for images in (sample, reconstruction)]
        variance = torch.cat(squares).mean() - torch.cat(means).mean() ** 2
        self.latent_deviation = variance.sqrt().item()
        metrics = {"psnr": torch.cat(psnr).mean().item(), "ssim": torch.cat(ssim).mean().item()}
        return {**metrics, "latent_deviation": self.latent_deviation}, "reconstruction", pictures

    def finish(self, averaged: Autoencoder, loader: Iterable, resumed: list[dict]) -> None:
        if self.latent_deviation is None:  # the run was finished before
            self.validate(averaged, loader)
        averaged.vae.register_to_config(scaling_factor=1 / self.latent_deviation)
        finish_tokenizer(self.args, averaged.vae, self.images, resumed=resumed)


class DiffusionTraining:
    """What the loop trains with `--model dit` and `ldm`: what noise was added to latents is to be told."""

    def __init__(self, args: BaselineSettings, accelerator: Accelerator, images: LabelledImages):
        self.args, self.images = args, images
        name, argument = args.pretrained_vae_name_or_path, "pretrained_vae_name_or_path"
        _, subfolder = find_model(argument, name, "vae", (AutoencoderKL,), "an `AutoencoderKL`")
        self.vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder).requires_grad_(False).eval()
        self.vae.to(accelerator.device)
        ratio = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = args.resolution or self.vae.config.sample_size
        check_multiple("resolution", self.resolution, ratio, "by which the autoencoder divides it")
        self.model = build_denoiser(
            args, self.resolution // ratio, self.vae.config.latent_channels, len(images.id2label)
        )
        if args.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.scheduler = DDIMScheduler(
            **NOISE[args.model],
            prediction_type=args.prediction_type,
            clip_sample=False,  # latents have no bounds
            timestep_spacing="trailing",  # draws start where there is nothing but noise, as training has it
        )
        null_class = DIT_NULL_CLASS if args.model == "dit" else len(images.id2label)
        self.null_class = torch.tensor(null_class, device=accelerator.device)  # the id that says nothing
        self.frozen, self.size = {"autoencoder": self.vae}, describe_size(self.model, len(images.id2label))

    def load_data(self, accelerator: Accelerator) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
        return load_latents(self.args, accelerator, self.vae, self.images, self.resolution)

    def pipeline(self, model: DiTTransformer2DModel | UNet2DModel) -> LatentDiffusionPipeline:
        """The pipeline of a model."""
        part = "transformer" if self.args.model == "dit" else "unet"
        return LatentDiffusionPipeline(
            self.vae,
            self.scheduler,
            id2label={str(index): name for index, name in self.images.id2label.items()},
            **{part: model},
        )

    def losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss of noise drawn at random, with some labels dropped."""
        latents = DiagonalGaussianDistribution(batch["moments"]).sample()
        noise, labels = torch.randn_like(latents), batch["class_labels"]
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, labels.shape, device=labels.device)
        if self.images.id2label:
            told, nothing = {"class_labels": labels}, {"class_labels": self.null_class}
            labels = drop_conditions(told, nothing, self.args.class_dropout_prob)["class_labels"]
        return {"loss": self.loss(model, latents, noise, timesteps, labels)}

    def loss(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.LongTensor,
        labels: torch.LongTensor,
    ) -> torch.Tensor:
        """Mean square of what the model says less what it should say, float32."""
        latents = latents * self.vae.config.scaling_factor
        if not self.images.id2label:
            labels = self.null_class.expand_as(labels) if self.args.model == "dit" else None
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = model(noisy, timesteps, class_labels=labels).sample
        is_noise = self.args.prediction_type == "epsilon"
        target = noise if is_noise else self.scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target)

    @torch.no_grad()
    def validate(self, averaged: nn.Module, loader: Iterable) -> tuple[dict, str, list[torch.Tensor]]:
        """The loss of held-out latents, always with the same noise, and pictures."""
        generator, total, count = torch.Generator().manual_seed(self.args.seed), 0.0, 0
        for batch in loader:
            latents, labels = DiagonalGaussianDistribution(batch["moments"]).mode(), batch["class_labels"]
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, labels.shape, generator=generator)
            told = send_to_device([latents, noise, timesteps, labels], averaged.device)
            total += self.loss(averaged, *told).item() * len(labels)
            count += len(labels)
        args = self.args
        pictures = draw(self.pipeline(averaged), args.num_validation_images, args.validation_guidance_scale, args.seed)
        return {"loss": total / count}, "samples", pictures

    def finish(self, averaged: nn.Module, loader: Iterable, resumed: list[dict]) -> None:
        guidance_scale = self.args.validation_guidance_scale
        finish_latent_diffusion(self.args, self.pipeline(averaged), self.images, guidance_scale, resumed)


def build_denoiser(
    args: ModelSettings, sample_size: int, num_channels: int, num_classes: int
) -> DiTTransformer2DModel | UNet2DModel:
    """What `--model` names, for latents of that size."""
    sizes = sample_size, num_channels, num_classes
    if args.model == "ldm":
        channels = channels_of(args, [64, 128, 160])
        return new_unet(*sizes, channels, args.layers_per_block, args.attention_head_dim or 32)
    return new_dit(*sizes, args.num_layers, args.num_attention_heads, args.attention_head_dim or 64, args.patch_size)


@ends_gracefully
def main(args: BaselineSettings) -> None:
    others = set().union(*OPTIONS.values()) - OPTIONS[args.model]
    refuse_given(args, others, f"with `model` {args.model!r}")
    accelerator = make_accelerator(args)
    set_seed(args.seed)  # the new weights must be the same in every process
    with accelerator.main_process_first():
        label_column = None if args.model == "vae" else args.label_column or None
        images = load_images(args, label_column, args.max_train_samples, args.seed)
    training = (AutoencoderTraining if args.model == "vae" else DiffusionTraining)(args, accelerator, images)
    if accelerator.is_main_process:
        tqdm.write(training.size, file=sys.stderr)
    set_seed(args.seed, device_specific=True)
    data, validation_data = training.load_data(accelerator)
    loader = make_loader(args, data, accelerator.num_processes)
    validation_loader = make_validation_loader(args, validation_data)

    model = training.model
    averaged = evaluation_copy(model, accelerator)
    parameters = parameter_groups(model, args.adam_weight_decay)
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = TrainingRun(args, accelerator, model, schedule, images=images, frozen=training.frozen)
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            losses = training.losses(model, batch)
            run.check_finite(losses)
            accelerator.backward(losses["loss"])
            run.clip_gradients(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            run.add_batch(losses)
            continue
        run.finish_step(losses)
        if run.is_due(args.validation_steps):
            run.copy_averages_to(averaged)
            if accelerator.is_main_process:
                run.record_validation(*training.validate(averaged, validation_loader))
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        training.finish(averaged, validation_loader, resumed=run.resumed)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
