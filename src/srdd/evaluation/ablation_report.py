"""What ablations found, for people: Markdown tables and curves."""

import statistics
from pathlib import Path

from srdd.evaluation.ablations import AblationRow, AblationTable
from srdd.evaluation.figures import save_curves


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

# Student's t for 95 %, by the number of values less one.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

# By row and column, the metrics of a cell.
Cells = dict[str, dict[str, dict[str, float]]]


def mean_and_interval(cells: dict[str, dict[str, float]], metric: str) -> tuple[float, tuple[float, float] | None]:
    """
    A metric over the seeds of a row, and its 95 % interval: Student's over seeds, or with one seed the bootstrap's, if
    there is one.
    """
    values = [cell[metric] for cell in cells.values()]
    mean = statistics.fmean(values)
    if len(values) > 1:
        half = STUDENT_T.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5
        return mean, (mean - half, mean + half)
    interval = next(iter(cells.values())).get(f"{metric}_interval")
    return mean, tuple(interval) if interval is not None else None


def markdown(table: AblationTable, cells: Cells) -> str:
    """
    Markdown of a table.

    Args:
        table ([`AblationTable`]): The table.
        cells (`dict`): By row and column, the metrics of every cell.
    """
    lines = [f"## {table.title}", ""]
    if table.kind == "editing":
        for metric, (title, digits) in METRICS["editing"].items():
            lines += _table(
                [title, *table.tasks],
                {row: [f"{cell[metric]:.{digits}f}" for cell in found.values()] for row, found in cells.items()},
            )
        return "\n".join(lines)
    first = next(iter(next(iter(cells.values())).values()))
    metrics = METRICS.get(table.kind, {name: (name, 2) for name in first})
    rows = {}
    for row, found in cells.items():
        rows[row] = []
        for metric, (_, digits) in metrics.items():
            mean, interval = mean_and_interval(found, metric)
            shown = f" ({interval[0]:.{digits}f} – {interval[1]:.{digits}f})" if interval is not None else ""
            with_interval = metric == "frechet_distance"
            rows[row].append(f"{mean:.{digits}f}" + shown * with_interval)
    return "\n".join(
        [*lines, *_table([table.kind.replace("_", " "), *(title for title, _ in metrics.values())], rows)]
    )


def _table(header: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items()), ""]


def save_sweep(path: str | Path, table: AblationTable, cells: Cells) -> None:
    """Draw a sweep: for drawn images the Fréchet distance, for edited ones the perceptual distance of each task."""
    curves: dict[str, tuple[list, list, list]] = {}
    for row in table.rows:
        name = row.name.rpartition(", ")[0]
        found = cells[row.name]
        if table.kind == "editing":
            points = {f"{name}, {task}": (cell["perceptual_distance"], None) for task, cell in found.items()}
        else:
            points = {name: mean_and_interval(found, "frechet_distance")}
        for curve, (value, interval) in points.items():
            xs, ys, intervals = curves.setdefault(curve, ([], [], []))
            xs.append(_axis_value(table, row))
            ys.append(value)
            intervals.append(interval)
    label = "perceptual distance" if table.kind == "editing" else "Fréchet distance"
    save_curves(path, curves, table.axis.replace("_", " "), f"{label} (efficientnet-lite0)")


def _axis_value(table: AblationTable, row: AblationRow):
    values = {**row.scheduler, **row.options, "guidance_scale": row.guidance_scale}
    return values[table.axis]
