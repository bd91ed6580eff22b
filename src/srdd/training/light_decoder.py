"""Light decoders: fewer channels and layers in the place of a tokenizer's own, for the same tokens."""

import math
from argparse import Namespace

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel
from srdd.data.images import AugmentedImages, LabelledImages, training_transform, validation_images
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.training.pixel_losses import PixelLosses
from srdd.training.training_run import train_model


def light_tokenizer(
    teacher: MultiScaleVQModel,
    block_out_channels: list[int] | None = None,
    layers_per_block: int = 1,
    mid_block_add_attention: bool = False,
) -> MultiScaleVQModel:
    """
    A tokenizer with the tokens of another and a new, smaller decoder, the only part that is not frozen. Its blocks
    do not attend, but for the middle one if asked to.

    Args:
        teacher ([`MultiScaleVQModel`]): All but the decoder is copied from it.
        block_out_channels (`list[int]`, *optional*): Channels of the decoder, finest first; by default a quarter of
            the teacher's, rounded down to multiples of 8, and 8 at least.
        layers_per_block (`int`, defaults to 1): Residual layers per resolution, and one more.
        mid_block_add_attention (`bool`, defaults to `False`): Whether the middle block attends.

    Returns:
        [`MultiScaleVQModel`]: On the CPU.

    Raises:
        ValueError: If these are no sizes of a decoder.
    """
    config = teacher.config
    if block_out_channels is None:
        channels = config.decoder_block_out_channels or config.block_out_channels
        block_out_channels = [max(8, width // 32 * 8) for width in channels]
    light = MultiScaleVQModel.from_config(
        config,
        up_block_types=["UpDecoderBlock2D"] * len(config.block_out_channels),
        decoder_block_out_channels=block_out_channels,
        decoder_layers_per_block=layers_per_block,
        decoder_mid_block_add_attention=mid_block_add_attention,
        decoder_norm_num_groups=math.gcd(config.norm_num_groups, *block_out_channels),
    )
    for name, part in light.named_children():
        if name != "decoder":
            part.load_state_dict(teacher.get_submodule(name).state_dict())
            part.requires_grad_(False)
    return light


def distill_decoder(
    args: Namespace,
    accelerator: Accelerator,
    light: MultiScaleVQModel,
    teacher: MultiScaleVQModel,
    images: LabelledImages,
) -> MultiScaleVQModel:
    """
    Train a light decoder on the latent states of images, towards the images and the teacher's pictures of them.

    Args:
        args (`Namespace`): The arguments of the script.
        accelerator (`Accelerator`): Nothing prepared yet.
        light ([`MultiScaleVQModel`]): What [`light_tokenizer`] made of the teacher.
        teacher ([`MultiScaleVQModel`]): The teacher, frozen and on its device.
        images ([`LabelledImages`]): The images.

    Returns:
        [`MultiScaleVQModel`]: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the losses.
    """
    pixel_losses = PixelLosses(args, accelerator.device)
    resolution = teacher.config.scale_sizes[-1][0] * teacher.spatial_compression_ratio
    augmented = AugmentedImages(images, resolution, not args.center_crop, args.random_flip, args.seed)
    validation = validation_images(images, 512).with_transform(training_transform(images, resolution))
    validation_loader = DataLoader(validation, batch_size=args.train_batch_size)

    def compute_values(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
        sample = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        output, losses = model(sample), {}
        if args.image_weight > 0:
            for name, value in pixel_losses(output.sample, sample).items():
                losses[f"image_{name}"] = args.image_weight * value
        if args.teacher_weight > 0:
            with torch.no_grad():
                wanted = teacher.decode_tokens(output.token_ids).sample.clamp(-1, 1)
            for name, value in pixel_losses(output.sample, wanted, with_perceptual=False).items():
                losses[f"teacher_{name}"] = args.teacher_weight * value
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}, {}

    return train_model(
        args,
        accelerator,
        light.to(memory_format=torch.channels_last),
        light.decoder.parameters(),
        augmented,
        compute_values,
        evaluate=lambda averaged: evaluate_reconstruction(
            averaged, validation_loader, args.num_validation_images, teacher=teacher
        ),
        count_items=lambda batch: len(batch["pixel_values"]),
        unit="img",
        picture="reconstruction",
    )
