#!/usr/bin/env python
"""
Measure a multi-scale tokenizer on images: rFD, PSNR, SSIM, and codebook usage and perplexity of every scale.

    python training_scripts/evaluate_tokenizer.py --pretrained_vqvae_name_or_path model_cards/srdd-tokenizer-64 \
        --dataset_name fruits64 --split validation --output reconstructions.png

Prints one JSON object. rFD is the Frechet distance between the images and their reconstructions on EfficientNet-Lite0
features: not an FID, and comparable only at the same number of images. The picture shows originals above
reconstructions. With `--teacher_vqvae_name_or_path` a light decoder is compared with the one it was distilled from,
whose pictures come between.
"""

import argparse
import json
import sys

import torch
from PIL import Image
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel
from srdd.data.images import picture_grid, training_transform
from srdd.evaluation.features import EfficientNetLite0Features
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.training.pretrained import load_tokenizer
from srdd.training.settings import DataSettings, HelpWithDefaults, add_arguments, from_args
from srdd.training.training_data import load_images


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--pretrained_vqvae_name_or_path", required=True, help="Folder or Hub id, or a pipeline's.")
    parser.add_argument("--teacher_vqvae_name_or_path", help="A tokenizer with the same tokens and another decoder.")
    add_arguments(parser, DataSettings)
    parser.add_argument("--split", choices=["train", "validation"], default="validation")
    parser.add_argument("--max_samples", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--no_rfd", action="store_true", help="Leave out the Frechet distance (no EfficientNet).")
    parser.add_argument("--num_pictures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of images.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="PNG file for originals and reconstructions.")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    vqvae = load_tokenizer("pretrained_vqvae_name_or_path", args.pretrained_vqvae_name_or_path).to(args.device)
    teacher = None
    if args.teacher_vqvae_name_or_path:
        teacher = load_tokenizer("teacher_vqvae_name_or_path", args.teacher_vqvae_name_or_path).to(args.device)
        check_teacher(vqvae, teacher)
    images = load_images(from_args(args, DataSettings), None)
    split = images.train if args.split == "train" else images.validation
    if split is None:
        raise ValueError(f"`split` must be one the data set has, got {args.split!r}.")
    split = split.shuffle(seed=args.seed).select(range(min(args.max_samples, len(split))))
    resolution = vqvae.resolution
    loader = DataLoader(split.with_transform(training_transform(images, resolution)), batch_size=args.batch_size)
    features = None if args.no_rfd else EfficientNetLite0Features()
    metrics, pictures = evaluate_reconstruction(
        vqvae, loader, args.num_pictures, features, show_progress=True, teacher=teacher
    )
    sys.stdout.write(json.dumps({name: _rounded(value) for name, value in metrics.items()}) + "\n")
    if args.output:
        Image.fromarray(picture_grid(pictures)).save(args.output)


def check_teacher(vqvae: MultiScaleVQModel, teacher: MultiScaleVQModel) -> None:
    """
    Make sure that two tokenizers have the same tokens, which both decode.

    Raises:
        ValueError: If sizes, scales or codebooks differ.
    """
    for tokenizer in (vqvae, teacher):
        if tokenizer.config.codebook_fingerprint is None:
            tokenizer.sign_codebook()
    for name in ("sample_size", "scale_sizes", "codebook_fingerprint"):
        ours, theirs = vqvae.config[name], teacher.config[name]
        if ours != theirs:
            raise ValueError(
                f"`teacher_vqvae_name_or_path` must be a tokenizer with the same tokens, whose `{name}` is {ours}, got"
                f" {theirs}."
            )


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main(parse_args())
