#!/usr/bin/env python
"""
Measure what a pipeline draws, or any folder of pictures: Frechet distance, KID, IS, precision, recall, density and
coverage, and for pairs of pictures PSNR, SSIM, perceptual distance and LPIPS.

    python training_scripts/evaluate_srdd.py --pretrained_model_name_or_path model_cards/srdd-fruits64 \
        --dataset_name fruits64 --num_samples 490 --output_dir evaluation

Writes evaluation.json, evaluation.md and samples.png, and with `--save_npz` all images for OpenAI's evaluator, whose
reference batches `--reference_dir` reads in turn. Distances have those between real images beside them. Numbers carry
the name of the network that looked at the images: only Inception's are called FID, KID and IS. Features are kept in
the output folder, so that the same command goes on where it was interrupted. `accelerate launch` shares the work
between processes, with the same result. benchmarks/WHY_YOUR_NUMBER_DIFFERS.md tells what to compare.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from PIL import Image

import srdd
from srdd.console import write_text
from srdd.data.images import picture_grid
from srdd.evaluation.feature_cache import collect
from srdd.evaluation.features import load_features
from srdd.evaluation.image_sources import DataSetImages, ImageSource, PipelineImages, RealImages, open_pictures
from srdd.evaluation.latent_diffusion import DrawingPipeline, LatentDiffusionPipeline, load_drawing_pipeline
from srdd.evaluation.npz_images import NpzImages, save_npz
from srdd.evaluation.paired_metrics import load_lpips
from srdd.evaluation.pipeline_variants import PipelineVariant
from srdd.evaluation.real_images import other_real_images
from srdd.evaluation.report import METRIC_SETTINGS, NUM_NEIGHBOURS, check_pairs, compare, compare_pairs, report_tables
from srdd.training.accelerator import check_processes, use_all_cores
from srdd.training.settings import (
    SCHEDULER_OPTIONS,
    DataSettings,
    HelpWithDefaults,
    add_arguments,
    add_scheduler_arguments,
    chosen_scheduler,
    from_args,
    positive_int,
    scheduler_options,
)
from srdd.training.training_data import load_images


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--pretrained_model_name_or_path", help="Folder or Hub id of a pipeline, or of what train_baseline.py makes."
    )
    samples.add_argument("--samples_dir", help="Folder or .npz of square pictures, drawn by whatever, to measure.")
    samples.add_argument(
        "--num_samples", type=positive_int, help="Default: 5000, or all pictures of the folder. Papers take 50000."
    )
    samples.add_argument("--guidance_scale", type=float, help="Default: the pipeline's own.")
    samples.add_argument("--num_inference_steps", type=positive_int, help="Steps of latent diffusion; default: 50.")
    samples.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    samples.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    samples.add_argument("--batch_size", type=positive_int, default=64, help="Images at once, per process.")
    samples.add_argument("--save_npz", metavar="FILE", help="Write all images to this .npz (`arr_0`), not compressed.")
    add_scheduler_arguments(parser)
    add_arguments(parser, DataSettings)
    reference = parser.add_argument_group("reference")
    reference.add_argument("--split", choices=["train", "validation"], default="validation")
    reference.add_argument("--reference_dir", help="Folder or .npz of square pictures, instead of a data set.")
    reference.add_argument("--num_reference_images", type=positive_int, default=10_000, help="At most.")
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--features",
        nargs="+",
        default=["efficientnet-lite0"],
        help="efficientnet-lite0 (default), inception, or vision models of transformers like facebook/dinov2-large.",
    )
    metrics.add_argument("--features_weights", help="File with Inception's weights, for use without a network.")
    metrics.add_argument("--paired", action="store_true", help="Compare pictures of equal names in both folders.")
    metrics.add_argument("--lpips", action="store_true", help="With --paired: LPIPS as well; needs torchvision.")
    metrics.add_argument("--num_bootstrap", type=int, default=200, help="Replicates of the intervals; 0 for none.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--feature_cache_dir", help="Features are kept here; default: `output_dir/features`.")
    args = parser.parse_args(arguments)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    if (args.pretrained_model_name_or_path is None) == (args.samples_dir is None):
        raise ValueError(
            "Give either `pretrained_model_name_or_path` or `samples_dir`, got"
            f" {args.pretrained_model_name_or_path!r} and {args.samples_dir!r}."
        )
    sources = {name: getattr(args, name) for name in ("dataset_name", "train_data_dir", "reference_dir")}
    if sum(value is not None for value in sources.values()) != 1:
        raise ValueError(f"Give one of `dataset_name`, `train_data_dir` and `reference_dir`, got {sources}.")
    if args.paired and (args.samples_dir is None or args.reference_dir is None):
        raise ValueError("`paired` must come with `samples_dir` and `reference_dir`, got no such folders.")
    for name in ("samples_dir", "reference_dir"):
        if args.paired and getattr(args, name).endswith(".npz"):
            raise ValueError(f"`{name}` must be a folder with `paired`, got {getattr(args, name)!r}: it has no names.")
    if args.save_npz is not None and (not args.save_npz.endswith(".npz") or Path(args.save_npz).is_dir()):
        raise ValueError(f"`save_npz` must be a file whose name ends in .npz, got {args.save_npz!r}.")
    if args.lpips and not args.paired:
        raise ValueError("`lpips` must come with `paired`: it compares a picture with what it should be.")
    if args.features_weights is not None and "inception" not in args.features:
        raise ValueError(f"`features_weights` must come with `features` inception, got {args.features}.")
    if args.num_bootstrap < 0:
        raise ValueError(f"`num_bootstrap` must be at least 0, got {args.num_bootstrap}.")
    if args.samples_dir is not None:
        names = ("scheduler", "guidance_scale", "num_inference_steps", *SCHEDULER_OPTIONS)
        given = [name for name in names if getattr(args, name) is not None]
        if given:
            raise ValueError(f"`{given[0]}` must come with a pipeline: pictures of a folder are drawn already.")


def load_pipeline(args: argparse.Namespace) -> DrawingPipeline:
    """The pipeline that draws, with what is asked for of its schedule."""
    pipe = load_drawing_pipeline(args.pretrained_model_name_or_path, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe, LatentDiffusionPipeline):
        given = ["scheduler"] * (args.scheduler is not None) + list(scheduler_options(args))
        if given:
            raise ValueError(
                f"`{given[0]}` must come with a pipeline that draws scale by scale, not latent diffusion."
            )
        steps = {} if args.num_inference_steps is None else {"num_inference_steps": args.num_inference_steps}
        return PipelineVariant(scheduler=steps).pipeline(pipe)
    if args.num_inference_steps is not None:
        raise ValueError(f"`num_inference_steps` must come with latent diffusion, not {type(pipe).__name__}.")
    pipe.scheduler = chosen_scheduler(args, pipe.scheduler)
    return pipe


def load_samples(args: argparse.Namespace, accelerator: Accelerator) -> tuple[ImageSource, dict[str, Any]]:
    """The images to be measured, and what the report says of them."""
    if args.samples_dir is not None:
        source = open_pictures(args.samples_dir, args.num_samples, argument="samples_dir")
        if source.count < (args.num_samples or 1):
            raise ValueError(
                f"`num_samples` must be at most {source.count}, the number of pictures, got {args.num_samples}."
            )
        return source, {"folder": args.samples_dir}
    pipe = load_pipeline(args).to(accelerator.device)
    source = PipelineImages(pipe, args.num_samples or 5000, args.guidance_scale, args.seed)
    key, own_rows, latent = source.key, ("scale_sizes", "guidance_scale"), isinstance(pipe, LatentDiffusionPipeline)
    settings = {
        "model": args.pretrained_model_name_or_path,
        "weights_sha256": key["weights"],
        "num_classes": source.num_classes,
        "guidance_scale": source.guidance_scale,
        **{name: value for name, value in key["scheduler"].items() if name not in own_rows},
        **({"num_inference_steps": key["num_inference_steps"]} if latent else {"scales": pipe.scheduler.scales}),
        "seed": args.seed,
        "dtype": args.dtype,
    }
    return source, settings


def load_reference(args: argparse.Namespace, resolution: int) -> tuple[RealImages, dict[str, Any]]:
    """The images to compare with, and what the report says of them."""
    if args.reference_dir is not None:
        count = None if args.paired else args.num_reference_images
        source = open_pictures(args.reference_dir, count, resolution, argument="reference_dir")
        return source, {"folder": args.reference_dir}
    images = load_images(from_args(args, DataSettings), None)
    source = DataSetImages(images, args.split, args.num_reference_images, resolution)
    return source, {"data_set": args.dataset_name or args.train_data_dir, "split": args.split}


def check_images(args: argparse.Namespace, samples: ImageSource, reference: ImageSource) -> None:
    for name, source in (("num_samples", samples), ("num_reference_images", reference)):
        if source.count <= NUM_NEIGHBOURS:
            raise ValueError(f"`{name}` must be at least {NUM_NEIGHBOURS + 1}, got {source.count} images.")
    if args.paired:
        check_pairs(samples, reference)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    check_processes(accelerator)
    use_all_cores(accelerator.device)
    lpips = load_lpips() if args.lpips else None
    extractors = [
        load_features(name, args.features_weights if name == "inception" else None) for name in args.features
    ]
    extractors = [extractor.to(accelerator.device) for extractor in extractors]
    samples, sample_settings = load_samples(args, accelerator)
    with accelerator.main_process_first():
        reference, reference_settings = load_reference(args, samples.resolution)
    check_images(args, samples, reference)
    cache = args.feature_cache_dir or Path(args.output_dir, "features")
    statistics = reference.inception_statistics if isinstance(reference, NpzImages) else None
    reference_features = collect(reference, extractors, cache, accelerator, args.batch_size, "Reference")
    others = other_real_images(reference, samples.count)
    other_features = None
    if others is not None:
        other_features = collect(others, extractors, cache, accelerator, args.batch_size, "Real images")
    sample_features = collect(
        samples, extractors, cache, accelerator, args.batch_size, "Samples", keep_images=args.save_npz is not None
    )
    if not accelerator.is_main_process:
        return
    metrics = {}
    if args.paired:
        metrics = compare_pairs(
            samples, reference, lpips, accelerator.device, args.batch_size, args.num_bootstrap, show_progress=True
        )
    real = {"others": other_features, "inception_statistics": statistics}
    metrics |= compare(reference_features, sample_features, extractors, args.num_bootstrap, show_progress=True, **real)
    report = {
        "metrics": {name: {key: _json(value) for key, value in metric.items()} for name, metric in metrics.items()},
        "settings": {
            "samples": {"count": samples.count, "sha256": sample_features.image_hash, **sample_settings},
            "reference": {"count": reference.count, "sha256": reference_features.image_hash, **reference_settings},
            "resolution": samples.resolution,
            "extractors": {extractor.name: extractor.weights_hash() for extractor in extractors},
            "metrics": METRIC_SETTINGS,
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, srdd)},
        },
    }
    if others is not None:
        report["settings"]["real_images"] = {"count": others.count, "sha256": other_features.image_hash}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = report_tables(report)
    (output / "evaluation.md").write_text(table, encoding="utf-8")
    columns = min(8, len(sample_features.pictures))
    lines = sample_features.pictures[: len(sample_features.pictures) // columns * columns].split(columns)
    Image.fromarray(picture_grid([line / 127.5 - 1 for line in lines])).save(output / "samples.png")
    write_text(table)
    if args.save_npz is not None:
        save_npz(args.save_npz, sample_features.images(), samples.count)
        sample_features.forget_images()


def _json(value: Any) -> Any:
    """Infinite numbers, which JSON has not, as words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main(parse_args())
