#!/usr/bin/env python
"""
Measure many settings of one or several models and write tables, figures and pictures: the paper's ablations on your
data.

    python training_scripts/ablate_srdd.py --config benchmarks/bundled.json --table schedules --dataset_name fruits64 \
        --model bundled=model_cards/srdd-fruits64 --output_dir runs/bundled

The configuration names tables, rows and models (`srdd.evaluation.ablations.read_tables`); `--model` says where the
models lie. What is measured goes to `ablations.json` at once; a second call goes on where the first was stopped and
measures only what was changed, be it a row or a model; other data wants another folder. Tables of drawn images end
with a row of as many real ones. Frechet distances and perceptual distances are on EfficientNet-Lite0 features: neither
FID nor LPIPS.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from srdd.console import write_text
from srdd.data.images import image_to_tensor, picture_grid, validation_images
from srdd.evaluation.ablation_cells import AblationCells
from srdd.evaluation.ablation_report import ablation_markdown, save_sweep
from srdd.evaluation.ablations import check_num_images, load_pipelines, model_keys, read_tables
from srdd.evaluation.features import load_features
from srdd.evaluation.image_sources import DataSetImages
from srdd.evaluation.measurements import Measurements
from srdd.training.run_identity import images_fingerprint
from srdd.training.settings import DataSettings, HelpWithDefaults, add_arguments, from_args
from srdd.training.training_data import load_images


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--config", required=True, help="JSON file of the tables.")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="Where a model of the configuration lies, a folder or Hub id; repeat it for all.",
    )
    parser.add_argument("--table", action="append", help="Measure these tables only.")
    add_arguments(parser, DataSettings)
    parser.add_argument(
        "--label_column", default="auto", help="Column of the labels; 'auto' is 'label' if there is one, '' is none."
    )
    parser.add_argument("--num_reference_images", type=int, default=2048, help="Held-out images to compare with.")
    parser.add_argument("--batch_size", type=int, default=49)
    parser.add_argument("--num_bootstrap", type=int, default=50, help="Replicates of the confidence intervals.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    tables = read_tables(args.config, args.table)
    pipelines = load_pipelines(args.model, tables, args.device)
    data = load_images(from_args(args, DataSettings), args.label_column or None)
    num_held_out = max([table.num_images for table in tables if table.kind != "samples"], default=0)
    split = validation_images(data, max(args.num_reference_images, num_held_out))
    check_num_images(tables, len(split))
    side = next(iter(pipelines.values())).sample_size[0]
    # The same images, in the same order.
    split_name = "train" if data.validation is None else "validation"
    reference = DataSetImages(data, split_name, args.num_reference_images, side)
    images = torch.stack([image_to_tensor(image, side) for image in split[data.image_column]]).add(1).div(2)
    settings = {
        "data": Path(args.dataset_name or args.train_data_dir).name,
        "images": {
            name: images_fingerprint(pictures, data.image_column, data.label_column)[:12]
            for name, pictures in (("train", data.train), ("validation", data.validation))
            if pictures is not None
        },
        "resolution": side,
        "num_reference_images": reference.count,
        "features": "efficientnet-lite0",
        "num_bootstrap": args.num_bootstrap,
        "torch": torch.__version__,
    }
    output = Path(args.output_dir)
    measurements = Measurements(output / "ablations.json", settings, model_keys(pipelines))
    cells = AblationCells(
        pipelines,
        images,
        labels=list(split[data.label_column]) if data.label_column is not None else None,
        extractor=load_features("efficientnet-lite0").to(args.device),
        reference=reference,
        batch_size=args.batch_size,
        num_bootstrap=args.num_bootstrap,
    )
    for table in tables:
        results = {
            row.name: {
                column: measurements.measure(table.cell(row, column), partial(cells.measure, table, row, column))
                for column in table.columns
            }
            for row in table.rows
        }
        if table.kind == "samples":
            results["real images"] = {"all": measurements.measure(table.real_cell, partial(cells.real_images, table))}
        text = ablation_markdown(table, results)
        (output / f"{table.name}.md").write_text(text, encoding="utf-8")
        write_text(text + "\n")
        if table.axis is not None:
            save_sweep(output / f"{table.name}.png", table, results)
        elif table.kind in ("samples", "editing"):
            pictures = [line * 2 - 1 for line in cells.pictures(table)]
            Image.fromarray(picture_grid(pictures)).save(output / f"{table.name}.png")


if __name__ == "__main__":
    main(parse_args())
