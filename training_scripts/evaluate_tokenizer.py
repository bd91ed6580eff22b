#!/usr/bin/env python
"""
Measure a multi-scale tokenizer on images: PSNR, SSIM, and codebook usage and perplexity of every scale.

    python training_scripts/evaluate_tokenizer.py --pretrained_vqvae_name_or_path model_cards/srdd-fruits64/vqvae \
        --dataset_name fruits64 --split validation --output reconstructions.png

Prints one JSON object; the picture shows originals above their reconstructions.
"""

import argparse
import json
import sys

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel
from srdd.training.data import load_labelled_images, training_transform
from srdd.training.loop import picture_grid


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_vqvae_name_or_path", required=True, help="Folder or Hub id of the tokenizer.")
    parser.add_argument("--dataset_name", help="Hub id or folder for `datasets.load_dataset`.")
    parser.add_argument("--train_data_dir", help="Image folder with one subfolder per class.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--split", choices=["train", "validation"], default="validation")
    parser.add_argument("--max_samples", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_pictures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of images.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="PNG file for originals and reconstructions.")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    vqvae = MultiScaleVQModel.from_pretrained(args.pretrained_vqvae_name_or_path).to(args.device)
    images = load_labelled_images(
        args.dataset_name, args.train_data_dir, image_column=args.image_column, label_column=None
    )
    split = images.train if args.split == "train" else images.validation
    if split is None:
        raise ValueError(f"`split` must be one the data set has, got {args.split!r}.")
    split = split.shuffle(seed=args.seed).select(range(min(args.max_samples, len(split))))
    resolution = vqvae.config.scale_sizes[-1][0] * vqvae.spatial_compression_ratio
    split.set_transform(training_transform(images, resolution))
    psnr = PeakSignalNoiseRatio(data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3)).to(args.device)
    ssim = StructuralSimilarityIndexMeasure(data_range=2.0).to(args.device)
    token_ids, pictures = [], None
    for batch in tqdm(DataLoader(split, batch_size=args.batch_size)):
        sample = batch["pixel_values"].to(args.device)
        ids = vqvae.tokenize(sample)
        reconstruction = vqvae.decode_tokens(ids).sample.clamp(-1, 1)
        psnr.update(reconstruction, sample)
        ssim.update(reconstruction, sample)
        token_ids.append(ids)
        if pictures is None:
            pictures = [sample[: args.num_pictures], reconstruction[: args.num_pictures]]
    usage = vqvae.codebook_usage(torch.cat(token_ids))
    report = {
        "num_images": len(split),
        "psnr": round(psnr.compute().item(), 3),
        "ssim": round(ssim.compute().item(), 4),
        "usage": [round(value, 4) for value in usage["usage"]],
        "perplexity": [round(value, 1) for value in usage["perplexity"]],
        "codes_used": len(torch.cat(token_ids).unique()),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    if args.output:
        Image.fromarray(picture_grid(pictures)).save(args.output)


if __name__ == "__main__":
    main(parse_args())
