#!/usr/bin/env python
"""
Draw a labelled grid of pictures with a trained pipeline: one row for each class.

    python training_scripts/sample_srdd.py --pretrained_model_name_or_path model_cards/srdd-fruits64
"""

import argparse

import torch
from PIL import Image

from srdd import SRDDPipeline
from srdd.evaluation.figures import labelled_grid, spread
from srdd.training.settings import HelpWithDefaults, add_scheduler_arguments, chosen_scheduler


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a pipeline.")
    parser.add_argument("--class_labels", nargs="*", help="Names or ids; default: eight classes spread over all.")
    parser.add_argument("--num_images_per_prompt", type=int, default=8, help="Pictures in a row.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the pipeline's own, 2.5 or none at all.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enlarge", type=int, default=2, help="Whole factor by which the pictures are enlarged.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="sample.png")
    add_scheduler_arguments(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    pipe = SRDDPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    pipe.scheduler = chosen_scheduler(args, pipe.scheduler)
    num_classes = pipe.transformer.config.num_classes
    labels = args.class_labels or spread(min(8, num_classes), num_classes)
    ids = pipe.get_label_ids(labels) if labels else [None]
    count = len(ids) * args.num_images_per_prompt
    images = pipe(
        ids if labels else None,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(count)],
    ).images
    size = (images[0].width * args.enlarge, images[0].height * args.enlarge)
    images = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    names = ["no class" if index is None else pipe.id2label.get(index, str(index)) for index in ids]
    labelled_grid(images, names, args.num_images_per_prompt).save(args.output)


if __name__ == "__main__":
    main(parse_args())
