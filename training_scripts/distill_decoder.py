#!/usr/bin/env python
"""
Distil a light decoder for a pipeline or a tokenizer: smaller and faster, for the same tokens.

    accelerate launch training_scripts/distill_decoder.py --teacher my-model --train_data_dir my_images \
        --output_dir my-light-model

Encoder, quantizer and codebook are the teacher's, bit for bit, so that transformers stay valid. The new decoder learns
from the latent states of the images to draw the images (L1, L2, perceptual) and what the teacher makes of them (L1,
L2). `output_dir` holds what the teacher is, a whole pipeline or a tokenizer, with averaged (EMA) weights.
"""

from dataclasses import MISSING, dataclass

import torch
from accelerate.utils import set_seed

from srdd import MultiScaleVQModel, SRDDPipeline
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.training.accelerator import make_accelerator
from srdd.training.graceful_end import ends_gracefully
from srdd.training.light_decoder import light_tokenizer
from srdd.training.optimizer import make_optimizer
from srdd.training.pixel_losses import PixelLosses
from srdd.training.pretrained import find_model
from srdd.training.publishing import finish_pipeline, finish_tokenizer
from srdd.training.settings import PipelineSettings, PixelSettings, flag, make_parser, parse_settings, refuse_given
from srdd.training.training_data import load_images, load_pixels, make_loader, make_validation_loader
from srdd.training.training_run import TrainingRun, evaluation_copy


@dataclass(kw_only=True)
class DecoderSettings(PixelSettings, PipelineSettings):
    """The decoder and its losses."""

    teacher: str = flag(MISSING, "Folder or Hub id of a pipeline or of a tokenizer.")
    decoder_block_out_channels: list[int] | None = flag(help="Finest resolution first; default: a quarter.")
    decoder_layers_per_block: int = flag(1, "One more is made, as everywhere.")
    decoder_mid_block_add_attention: bool = flag(False)
    image_weight: float = flag(1.0, "Of all distances to the images.")
    teacher_weight: float = flag(1.0, "Of L1 and L2 to the teacher's pictures.")


def parse_args(arguments: list[str] | None = None) -> DecoderSettings:
    parser = make_parser(__doc__, DecoderSettings)
    args = parse_settings(parser, DecoderSettings, arguments)
    if min(args.image_weight, args.teacher_weight) < 0 or args.image_weight + args.teacher_weight == 0:
        parser.error("`--image_weight` and `--teacher_weight` must not be negative, nor both be zero.")
    return args


def load_teacher(name: str) -> tuple[SRDDPipeline | None, MultiScaleVQModel]:
    """
    A pipeline and its tokenizer, or a tokenizer that is in none.

    Raises:
        ValueError: If there is neither.
    """
    _, subfolder = find_model("teacher", name, "vqvae", (MultiScaleVQModel,), "a tokenizer")
    if subfolder is None:
        return None, MultiScaleVQModel.from_pretrained(name)
    pipe = SRDDPipeline.from_pretrained(name)
    return pipe, pipe.vqvae


@ends_gracefully
def main(args: DecoderSettings) -> None:
    accelerator = make_accelerator(args)
    teacher_pipe, teacher = load_teacher(args.teacher)
    if teacher_pipe is None:
        refuse_given(args, ["with_code"], "with a `teacher` that is a tokenizer without a pipeline")
    teacher.requires_grad_(False).eval().to(accelerator.device)
    set_seed(args.seed)  # the new weights must be the same in every process
    model = light_tokenizer(
        teacher, args.decoder_block_out_channels, args.decoder_layers_per_block, args.decoder_mid_block_add_attention
    ).to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    with accelerator.main_process_first():
        images = load_images(args, None, args.max_train_samples, args.seed)
    set_seed(args.seed, device_specific=True)
    pixels, validation_pixels = load_pixels(args, teacher.resolution, images)
    loader = make_loader(args, pixels, accelerator.num_processes)
    validation_loader = make_validation_loader(args, validation_pixels)

    averaged = evaluation_copy(model, accelerator)
    optimizer, schedule = make_optimizer(
        args, model.decoder.parameters(), accelerator.num_processes, accelerator.device
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pixel_losses = PixelLosses(args, accelerator.device)
    run = TrainingRun(args, accelerator, model, schedule, images=images, frozen={"teacher": teacher})
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            sample = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
            output, losses = model(sample), {}
            if args.image_weight > 0:
                for name, value in pixel_losses(output.sample, sample).items():
                    losses[f"image_{name}"] = args.image_weight * value
            if args.teacher_weight > 0:
                with torch.no_grad():
                    target = teacher.decode_tokens(output.token_ids).sample.clamp(-1, 1)
                for name, value in pixel_losses(output.sample, target, with_perceptual=False).items():
                    losses[f"teacher_{name}"] = args.teacher_weight * value
            losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
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
                metrics, pictures = evaluate_reconstruction(
                    averaged, validation_loader, args.num_validation_images, teacher=teacher
                )
                run.record_validation(metrics, "reconstruction", pictures)
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        if teacher_pipe is None:
            finish_tokenizer(args, averaged, images, trained_part="decoder", resumed=run.resumed)
        else:
            pipe = SRDDPipeline(averaged, teacher_pipe.transformer, teacher_pipe.scheduler)
            finish_pipeline(
                args, pipe, images, teacher_pipe.default_guidance_scale, trained_part="decoder", resumed=run.resumed
            )
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
