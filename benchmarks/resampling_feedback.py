#!/usr/bin/env python
"""
Which feedback makes resampling worth its passes? Draws the same classes from the same seeds under every policy and
prints, as Markdown, a Fréchet distance to a validation split (EfficientNet-Lite0 features, not an FID) and the time.

    python benchmarks/resampling_feedback.py --dataset_name fruits64 --num_images_per_class 10

With few samples the distance is biased upwards: compare rows, not tables.
"""

import argparse
import sys
import time

import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from srdd import ScaleScheduler, SRDDPipeline
from srdd.evaluation.features import EfficientNetLite0Features
from srdd.training.data import load_labelled_images, training_transform


ROWS = {
    "none (SDD)": {},
    "simple, full, 1 pass": {"resampling_policy": "simple", "num_resampling_passes": 1},
    "masked, full": {"resampling_policy": "masked", "resampling_feedback": "full"},
    "masked, kept": {"resampling_policy": "masked", "resampling_feedback": "kept"},
    "masked, time travel": {"resampling_policy": "masked", "resampling_feedback": "time_travel"},
    "masked, redraw": {"resampling_policy": "masked", "resampling_feedback": "redraw"},
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="model_cards/srdd-fruits64")
    parser.add_argument("--dataset_name", required=True, help="Data set with a validation split.")
    parser.add_argument("--num_reference_images", type=int, default=2048)
    parser.add_argument("--num_images_per_class", type=int, default=10)
    parser.add_argument("--num_resampling_passes", type=int, default=5)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--batch_size", type=int, default=49)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    pipe = SRDDPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    images = load_labelled_images(args.dataset_name, label_column=None)
    reference = images.validation.shuffle(seed=0).select(range(min(args.num_reference_images, len(images.validation))))
    resolution = pipe.vqvae.config.scale_sizes[-1][0] * pipe.vqvae.spatial_compression_ratio
    reference.set_transform(training_transform(images, resolution))
    distance = FrechetInceptionDistance(feature=EfficientNetLite0Features(), reset_real_features=False)
    for batch in torch.utils.data.DataLoader(reference, batch_size=64):
        distance.update(batch["pixel_values"].add(1).mul(127.5).round().to(torch.uint8), real=True)
    labels = list(range(pipe.transformer.config.num_classes)) * args.num_images_per_class
    base = pipe.scheduler.config
    sys.stdout.write("| policy | Fréchet distance | seconds |\n|---|---|---|\n")
    for name, options in ROWS.items():
        options = {"num_resampling_passes": args.num_resampling_passes, **options}
        pipe.scheduler = ScaleScheduler.from_config(base, **options)
        distance.reset()
        started = time.perf_counter()
        for start in tqdm(range(0, len(labels), args.batch_size), desc=name):
            batch = labels[start : start + args.batch_size]
            generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))]
            drawn = pipe(batch, guidance_scale=args.guidance_scale, generator=generators, output_type="pt").images
            distance.update(drawn.mul(255).round().to(torch.uint8), real=False)
        seconds = time.perf_counter() - started
        sys.stdout.write(f"| {name} | {distance.compute().item():.1f} | {seconds:.0f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(parse_args())
