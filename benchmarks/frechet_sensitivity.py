#!/usr/bin/env python
"""
What moves a Fréchet distance though no model has changed? Compares the training images of a data set with its
validation images, for several numbers of images, and its validation images with copies that were stored otherwise.

    python benchmarks/frechet_sensitivity.py --dataset_name fruits64

Prints Markdown rows.
"""

import argparse
import io
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from srdd.data.images import load_labelled_images
from srdd.evaluation.distances import FeatureStatistics, bootstrap_interval, frechet_distance
from srdd.evaluation.features import load_features
from srdd.evaluation.image_sources import DataSetImages


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Data set with a validation split.")
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num_images", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--num_copies", type=int, default=1000, help="Images of the comparison with their copies.")
    return parser.parse_args(arguments)


def as_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """An image as it comes back from a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def halved(images: torch.Tensor, **options) -> torch.Tensor:
    """Images of half the size."""
    small = F.interpolate(images.float(), scale_factor=0.5, mode="bicubic", **options)
    return small.clamp(0, 255).round().to(torch.uint8)


def main(args: argparse.Namespace) -> None:
    extractor = load_features(args.features)
    data = load_labelled_images(args.dataset_name, label_column=None)
    train, validation = (
        DataSetImages(data, split, max(args.num_images), args.resolution) for split in ("train", "validation")
    )

    @torch.no_grad()
    def features_of(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([extractor(part) for part in tqdm(images.split(64))])

    real, images = features_of(train.read(range(train.count))), validation.read(range(validation.count))
    features = features_of(images)
    statistics = FeatureStatistics.from_features(features)
    sys.stdout.write(f"| training images against {validation.count} others | {extractor.distance_name} | 95 % |\n")
    sys.stdout.write("|---|---|---|\n")
    for count in args.num_images:
        part = real[:count]
        low, high = bootstrap_interval(lambda replicate: frechet_distance(statistics, replicate), part, 50)
        sys.stdout.write(f"| {len(part)} | {frechet_distance(statistics, part):.1f} | {low:.1f} to {high:.1f} |\n")
    images, features = images[: args.num_copies], features[: args.num_copies]
    copies = {
        "JPEG, quality 95": torch.stack([as_jpeg(image, 95) for image in images]),
        "JPEG, quality 75": torch.stack([as_jpeg(image, 75) for image in images]),
        "one grey level brighter": images.clamp(max=254) + 1,
    }
    rows = {"none": frechet_distance(features, features)}
    rows |= {name: frechet_distance(features, features_of(copy)) for name, copy in copies.items()}
    sizes = [features_of(halved(images, antialias=antialias)) for antialias in (True, False)]
    rows["both halved, one without antialiasing"] = frechet_distance(*sizes)
    sys.stdout.write(f"\n| change to {len(images)} images | {extractor.distance_name} |\n|---|---|\n")
    for name, value in rows.items():
        sys.stdout.write(f"| {name} | {value:.1f} |\n")


if __name__ == "__main__":
    main(parse_args())
