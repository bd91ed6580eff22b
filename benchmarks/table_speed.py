#!/usr/bin/env python
"""
What the rows of an ablation table cost, next to what they are worth: seconds per image, measured in turn, and the
Fréchet distances that `ablate_srdd.py` found.

    python benchmarks/table_speed.py --config benchmarks/ablations.json --table opt_in --batch_size 1 \
        --model bundled=model_cards/srdd-fruits64 --measurements runs/ablations/ablations.json

Rows run round by round, all in one process, from labels to pixels. Prints medians, and the ratios' median and range
over the rounds, the table's first row being 1, as Markdown.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from measuring import device_name, ratio_text, seconds_of
from tqdm.auto import tqdm

from srdd.evaluation.ablation_report import mean_and_interval
from srdd.evaluation.ablations import AblationTable, load_pipelines, read_tables
from srdd.evaluation.image_sources import PipelineImages
from srdd.training.settings import positive_int


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file of the tables.")
    parser.add_argument("--table", required=True, help="One that draws samples.")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="Repeat it for all.")
    parser.add_argument("--measurements", type=Path, help="What `ablate_srdd.py` found, for the Fréchet distances.")
    parser.add_argument("--batch_size", type=positive_int, default=1)
    parser.add_argument("--num_rounds", type=positive_int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, table: AblationTable) -> dict[str, list[float]]:
    """Seconds per image of every round, by row."""
    device = torch.device(args.device)
    pipelines = load_pipelines(args.model, [table], device)
    sources = {
        row.name: PipelineImages(row.pipeline(pipelines[row.model]), table.num_images, row.guidance_scale)
        for row in table.rows
    }
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for index in tqdm(range(args.num_rounds + 1)):
        images = range(index * args.batch_size, (index + 1) * args.batch_size)
        for name, source in sources.items():
            spent = seconds_of(partial(source.read, images), device)
            if index > 0:  # the first warms up
                seconds[name].append(spent / args.batch_size)
    return seconds


def distances(path: Path | None, table: AblationTable) -> dict[str, str]:
    """Fréchet distances with their intervals, by row."""
    if path is None:
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["cells"].get(table.name, {})
    found = {}
    for name, cells in rows.items():
        metrics = {column: cell["metrics"] for column, cell in cells.items()}
        mean, interval = mean_and_interval(metrics, "frechet_distance")
        found[name] = f"{mean:.0f}" + (f" ({interval[0]:.0f}–{interval[1]:.0f})" if interval else "")
    return found


def report(args: argparse.Namespace, table: AblationTable, seconds: dict[str, list[float]]) -> str:
    """Markdown."""
    first, values = next(iter(seconds.values())), distances(args.measurements, table)
    lines = [
        f"{table.title}. Batch {args.batch_size}, {device_name(torch.device(args.device))}, torch {torch.__version__},"
        f" {args.num_rounds} rounds.",
        "",
        "| row | ms an image | speed (min–max) | FD |",
        "|---|---|---|---|",
    ]
    for name, times in seconds.items():
        milliseconds = 1000 * statistics.median(times)
        lines.append(f"| {name} | {milliseconds:.1f} | {ratio_text(first, times)} | {values.get(name, '')} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    [table] = read_tables(args.config, [args.table])
    if table.kind != "samples":
        raise ValueError(f"`table` must be one that draws samples, got {args.table!r}, whose kind is {table.kind!r}.")
    sys.stdout.write(report(args, table, measure(args, table)))


if __name__ == "__main__":
    main(parse_args())
