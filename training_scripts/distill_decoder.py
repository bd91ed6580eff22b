#!/usr/bin/env python
"""
Distil a light decoder for a pipeline or a tokenizer: smaller and faster, for the same tokens.

    accelerate launch training_scripts/distill_decoder.py --teacher my-model --train_data_dir my_images \
        --output_dir my-light-model

Encoder, quantizer and codebook are the teacher's, bit for bit, so that transformers stay valid. The new decoder learns
from the latent states of the images to draw the images (L1, L2, perceptual) and what the teacher makes of them (L1,
L2). `output_dir` holds what the teacher is, a whole pipeline or a tokenizer, with averaged (EMA) weights.
"""

import argparse
import sys

from accelerate.utils import set_seed

from srdd import MultiScaleVQModel, SRDDPipeline
from srdd.training.accelerator import make_accelerator
from srdd.training.light_decoder import distill_decoder, light_tokenizer
from srdd.training.publishing import finish_pipeline, finish_tokenizer
from srdd.training.settings import add_pixel_loss_arguments, add_training_arguments, int_list
from srdd.training.training_data import load_images


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--center_crop", action="store_true", help="Crop in the centre instead of at random.")
    decoder = parser.add_argument_group("decoder")
    decoder.add_argument("--teacher", required=True, help="Folder or Hub id of a pipeline or of a tokenizer.")
    decoder.add_argument(
        "--decoder_block_out_channels", type=int_list, help="Finest resolution first; default: a quarter."
    )
    decoder.add_argument("--decoder_layers_per_block", type=int, default=1, help="One more is made, as everywhere.")
    decoder.add_argument("--decoder_mid_block_add_attention", action="store_true")
    losses = parser.add_argument_group("losses")
    add_pixel_loss_arguments(losses)
    losses.add_argument("--image_weight", type=float, default=1.0, help="Of all distances to the images.")
    losses.add_argument("--teacher_weight", type=float, default=1.0, help="Of L1 and L2 to the teacher's pictures.")
    parser.set_defaults(adam_weight_decay=0.0)
    args = parser.parse_args(arguments)
    args.command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    if min(args.image_weight, args.teacher_weight) < 0 or args.image_weight + args.teacher_weight == 0:
        parser.error("`--image_weight` and `--teacher_weight` must not be negative, nor both be zero.")
    return args


def load_teacher(name: str) -> tuple[SRDDPipeline | None, MultiScaleVQModel]:
    """
    A pipeline and its tokenizer, or a tokenizer that is in none.

    Raises:
        ValueError: If there is neither.
    """
    for cls in (SRDDPipeline, MultiScaleVQModel):
        try:
            config = cls.load_config(name)
        except OSError:
            continue
        if cls is SRDDPipeline:
            pipe = SRDDPipeline.from_pretrained(name)
            return pipe, pipe.vqvae
        if config.get("_class_name") == "MultiScaleVQModel":
            return None, MultiScaleVQModel.from_pretrained(name)
    raise ValueError(f"`teacher` must be a folder or Hub id of a pipeline or of a `MultiScaleVQModel`, got {name!r}.")


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    pipe, teacher = load_teacher(args.teacher)
    set_seed(args.seed)  # the new weights must be the same in every process
    light = light_tokenizer(
        teacher, args.decoder_block_out_channels, args.decoder_layers_per_block, args.decoder_mid_block_add_attention
    )
    teacher.requires_grad_(False).eval().to(accelerator.device)
    with accelerator.main_process_first():
        images = load_images(args, None, args.max_train_samples)
    set_seed(args.seed, device_specific=True)
    averaged = distill_decoder(args, accelerator, light, teacher, images)
    if accelerator.is_main_process:
        if pipe is None:
            finish_tokenizer(args, averaged, images, part="decoder")
        else:
            args.validation_guidance_scale = pipe.default_guidance_scale
            finished = SRDDPipeline(averaged, pipe.transformer, pipe.scheduler)
            finish_pipeline(args, finished, images, part="decoder")
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
