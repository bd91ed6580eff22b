"""What ablations show, for people: Markdown tables and curves."""

import re
import statistics
from pathlib import Path
from typing import Any

from srdd.evaluation.ablations import AblationRow, AblationTable
from srdd.evaluation.figures import save_curves
from srdd.evaluation.tables import markdown_table, with_range


# Metrics that tables show, with their titles and digits; tables of other kinds show all they have.
METRICS = {
    "samples": {
        "frechet_distance": ("FD", 1),
        "kernel_distance": ("KD", 3),
        "precision": ("precision", 3),
        "recall": ("recall", 3),
        "density": ("density", 3),
        "coverage": ("coverage", 3),
        "seconds_per_image": ("s per image", 3),
    },
    "editing": {
        "perceptual_distance": ("perceptual distance", 3),
        "frechet_distance": ("FD", 1),
        "psnr": ("PSNR, dB", 2),
        "ssim": ("SSIM", 3),
    },
}

# Metrics of which tables show the interval: the first, whatever the kind.
WITH_INTERVAL = ("frechet_distance", "all")

# Student's t for 95 %, by the number of values less one.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

# By row and column, the metrics of a cell.
Results = dict[str, dict[str, dict[str, Any]]]


def mean_and_interval(columns: dict[str, dict[str, Any]], metric: str) -> tuple[float, tuple[float, float] | None]:
    """
    A metric over the seeds of a row, and its 95 % interval: Student's over seeds, or with one seed the bootstrap's, if
    there is one.
    """
    values = [metrics[metric] for metrics in columns.values()]
    mean = statistics.fmean(values)
    if len(values) > 1:
        half = STUDENT_T.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5
        return mean, (mean - half, mean + half)
    interval = next(iter(columns.values())).get(f"{metric}_interval")
    return mean, tuple(interval) if interval is not None else None


def ablation_markdown(table: AblationTable, results: Results) -> str:
    """
    Markdown of a table, or of one for each metric where columns are tasks.

    Args:
        table ([`AblationTable`]): The table.
        results (`dict`): By row and column, the metrics of every cell.
    """
    title = f"## {table.title}\n"
    if table.kind == "editing":
        tables = [
            markdown_table(
                [name, *table.tasks],
                [
                    (row, *(f"{metrics[metric]:.{digits}f}" for metrics in columns.values()))
                    for row, columns in results.items()
                ],
            )
            for metric, (name, digits) in METRICS["editing"].items()
        ]
        return "\n".join([title, *tables])
    results = {**results, **_differences(table, results)}
    metrics = METRICS.get(table.kind) or {name: (name, 2) for name in _all_metrics(results)}
    lines = []
    for row, columns in results.items():
        texts = []
        for metric, (_, digits) in metrics.items():
            if not all(metric in values for values in columns.values()):
                texts.append("")  # real images take no time to draw, and not all models have all scales
                continue
            mean, interval = mean_and_interval(columns, metric)
            texts.append(with_range(mean, interval if metric in WITH_INTERVAL else None, digits))
        lines.append((_with_sizes(row, next(iter(columns.values()))), *texts))
    header = [table.kind.replace("_", " "), *(name for name, _ in metrics.values())]
    return "\n".join([title, markdown_table(header, lines)])


def _all_metrics(results: Results) -> list[str]:
    """What any row has, in their order, the numbers of scales after others and from coarse to fine."""
    names = dict.fromkeys(name for columns in results.values() for metrics in columns.values() for name in metrics)
    return sorted(names, key=_place)


def _place(metric: str) -> tuple:
    """Of a metric among others: that of "latent 4x4" is after "latent 2x2" and before "pixel 1x1"."""
    match = re.fullmatch(r"(?P<space>.*?) ?(?P<height>\d+)x(?P<width>\d+)", metric)
    return (False,) if match is None else (True, match["space"], int(match["height"]), int(match["width"]))


def _differences(table: AblationTable, results: Results) -> Results:
    """Rows of differences between two rows, seed by seed, of what both have."""
    return {
        f"{more} − {less}": {
            column: {
                metric: value - results[less][column][metric]
                for metric, value in metrics.items()
                if isinstance(value, float) and metric in results[less][column]
            }
            for column, metrics in results[more].items()
        }
        for more, less in table.differences
    }


def _with_sizes(row: str, metrics: dict[str, Any]) -> str:
    """The name of a row, with its numbers of images where they are not those of the table."""
    if "num_images" not in metrics:
        return row
    return f"{row} ({metrics['num_images']:,} against {metrics['num_reference_images']:,})"


def save_sweep(path: str | Path, table: AblationTable, results: Results) -> None:
    """Draw a sweep: for drawn images the Fréchet distance, for edited ones the perceptual distance of each task."""
    curves: dict[str, tuple[list, list, list]] = {}
    for row in table.rows:
        name, columns = row.name.rpartition(", ")[0], results[row.name]
        if table.kind == "editing":
            points = {f"{name}, {task}": (metrics["perceptual_distance"], None) for task, metrics in columns.items()}
        else:
            points = {name: mean_and_interval(columns, "frechet_distance")}
        for curve, (value, interval) in points.items():
            xs, ys, intervals = curves.setdefault(curve, ([], [], []))
            xs.append(_axis_value(table, row))
            ys.append(value)
            intervals.append(interval)
    label = "perceptual distance" if table.kind == "editing" else "Fréchet distance"
    save_curves(path, curves, table.axis.replace("_", " "), f"{label} (efficientnet-lite0)")


def _axis_value(table: AblationTable, row: AblationRow) -> Any:
    return {**row.scheduler, **row.options, "guidance_scale": row.guidance_scale}[table.axis]
