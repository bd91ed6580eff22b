#!/usr/bin/env python
"""
How the cost of an image grows: with the batch, the image size, the model's depth and further passes.

    python benchmarks/growth.py --reference /path/to/VAR --output growth.json --plot growth.png

Measures seconds per image and peak memory beyond the weights along one axis at a time. On the others a cell lies at
the base: batch 1, 128px, depth 8 and no further pass, unless `--batch_size`, `--image_size`, `--depth` and
`--num_passes` say otherwise. With the defaults all takes about a quarter of an hour on two CPU cores.

Reference and rows are those of `speed.py`, on random weights, from labels to pixels. A model's width is 64 times its
depth, 64 per head, as in VAR. Scales are `srdd.scales.default_scale_sizes`: VAR's own at 256 and 512px, and
beyond that each scale is 3/4 of the next finer one, as at 512px (1024px: 1 2 3 4 6 8 11 15 20 27 36 48 64). Further
passes have the policy "simple", which draws all tokens of a scale again, so that their number is exact; the reference
has none.

Every cell runs in a process of its own, which may take `--cell_timeout` seconds: one image warms up, a call is
measured for memory, and of the next ones the median time counts. What does not fit or fails is reported as such;
larger values of the same row are then not tried. With `--output` a run can be stopped and started again: cells in the
file are not measured again, those that failed only with `--retry`.

Prints Markdown, with the exponent `p` of cost = c * value ** p, by least squares on logarithms over all points and
over the last half of them; for further passes, what one costs as a share of none, by a straight line.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from measuring import device_name, peak_memory, process_memory, seconds_of
from samplers import GUIDANCE_SCALE, REFERENCE, add_model_arguments, build_sampler, row_of
from tqdm.auto import tqdm

from srdd.evaluation.figures import draw_curves
from srdd.scales import default_scale_sizes, num_tokens_per_scale


# By the name of its base value: the argument with its values, and how to say it.
AXES = {
    "batch_size": ("batch_sizes", "batch size"),
    "image_size": ("image_sizes", "image size"),
    "depth": ("depths", "depth"),
    "num_passes": ("pass_counts", "further passes"),
}
COSTS = {"seconds": "seconds per image", "mebibytes": "peak MiB beyond the weights"}
FITS = {"exponent": ("exponent", "last half"), "line": ("a pass, share of none",)}

OUT_OF_TIME, OUT_OF_MEMORY, KILLED, ERROR = "out of time", "out of memory", "killed", "error"


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    row: str
    batch_size: int
    image_size: int
    depth: int
    num_passes: int

    def __str__(self) -> str:
        passes = f", {self.num_passes} further passes" if self.num_passes else ""
        return f"{self.row}, batch {self.batch_size}, {self.image_size}px, depth {self.depth}{passes}"


# By cell: `seconds` of every round and `mebibytes`, or a `failure` and its `detail`.
Found = dict[Cell, dict]


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, got {text!r}.")
        return int(text)

    return parse


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}.")
    return value


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(depth=8, image_size=128, rows=["causal", "sdd"])
    parser.add_argument("--batch_size", type=at_least(1), default=1)
    parser.add_argument("--num_passes", type=at_least(0), default=0, help="Further passes at every scale.")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--image_sizes", type=at_least(1), nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--depths", type=at_least(1), nargs="+", default=[8, 12, 16, 20, 24, 30])
    parser.add_argument("--pass_counts", type=at_least(0), nargs="+", default=[0, 1, 2, 5, 10])
    parser.add_argument("--num_rounds", type=at_least(1), default=3)
    parser.add_argument("--round_seconds", type=positive, default=10.0, help="No further round beyond this many.")
    parser.add_argument("--cell_timeout", type=positive, default=600.0, help="Seconds for a cell, all included.")
    parser.add_argument(
        "--cell_memory", type=positive, help="GiB for a cell on a CPU, weights included; no limit by default."
    )
    parser.add_argument("--retry", action="store_true", help="Measure what failed again.")
    parser.add_argument("--plot", type=Path, help="PNG file for the curves.")
    args = parser.parse_args(arguments)
    for problem in problems_of(args):
        parser.error(problem)
    return args


def problems_of(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments."""
    problems = []
    for values, _ in AXES.values():
        given = getattr(args, values)
        if any(small >= large for small, large in zip(given, given[1:])):
            problems.append(f"`--{values}` must grow from value to value, got {given}.")
    if args.depth < 1:
        problems.append(f"`--depth` must be at least 1, got {args.depth}.")
    sizes = set(args.image_sizes if "image_size" in args.axes else ())
    if args.axes != ["image_size"]:
        sizes.add(args.image_size)
    for size in sorted(sizes):
        if size < 16 or size % 16:
            problems.append(f"Image sizes must be multiples of 16, got {size}.")
        elif any(row_of(row).kept for row in args.rows) and len(default_scale_sizes(size // 16)) != 10:
            problems.append(f"`--rows` with fewer scales need ten to choose from, which {size}px do not have.")
    if args.reference is not None and not (args.reference / "models").is_dir():
        problems.append(f"`--reference` must be a checkout of the official VAR code, got {args.reference}.")
    on_cpu = torch.device(args.device).type == "cpu"
    if on_cpu and sys.platform != "linux":
        problems.append(f"`--device` cpu needs Linux, where a process can tell its peak memory, got {sys.platform}.")
    if args.cell_memory is not None and not on_cpu:
        problems.append(f"`--cell_memory` must be left out unless `--device` is cpu, got {args.cell_memory}.")
    for name in ("output", "plot"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            problems.append(f"`--{name}` must lie in a folder that exists, got {path}.")
    if args.plot is not None and args.plot.suffix != ".png":
        problems.append(f"`--plot` must end in .png, got {args.plot}.")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        problems.append("`--plot` must be left out where matplotlib is not installed.")
    return problems


def cell_at(args: argparse.Namespace, axis: str, value: int, row: str) -> Cell | None:
    """The cell of a row at a value of an axis, the others at their base; none for further passes of the reference."""
    place = {name: getattr(args, name) for name in AXES} | {axis: value}
    if row == REFERENCE:
        if axis == "num_passes" and value:
            return None
        place["num_passes"] = 0
    return Cell(row, **place)


def cells_along(args: argparse.Namespace, axis: str, row: str) -> dict[int, Cell]:
    """The cells of a row by their value on an axis."""
    cells = {value: cell_at(args, axis, value, row) for value in getattr(args, AXES[axis][0])}
    return {value: cell for value, cell in cells.items() if cell is not None}


def measure(args: argparse.Namespace, cell: Cell) -> dict:
    """Seconds and peak memory of a cell, in this process."""
    device = torch.device(args.device)
    labels = torch.arange(cell.batch_size, device=device) % 1000
    model = argparse.Namespace(**{**vars(args), "depth": cell.depth, "image_size": cell.image_size})
    sampler = build_sampler(model, cell.row, cell.num_passes)
    sampler(labels[:1])  # libraries load themselves, and weights are packed where kernels want that
    call = partial(sampler, labels)
    mebibytes = peak_memory(call, device)
    seconds = [seconds_of(call, device)]
    while len(seconds) < args.num_rounds and sum(seconds) + seconds[-1] <= args.round_seconds:
        seconds.append(seconds_of(call, device))
    return {"seconds": seconds, "mebibytes": mebibytes}


def failure_of(error: Exception) -> dict[str, str]:
    """How a measurement failed."""
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    first_line = str(error).partition("\n")[0]
    return {"failure": OUT_OF_MEMORY if no_memory else ERROR, "detail": f"{type(error).__name__}: {first_line}"}


def end_with_parent() -> None:
    """Wait for the end of the process that asked for this one, and end with it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_cell(args: argparse.Namespace, cell: Cell, num_threads: int, sender: Connection) -> None:
    """Measure a cell and send what was found, from a process that nobody else needs."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go where memory runs out
    if args.cell_memory is not None:
        limit = int(process_memory("VmData") * 2**20 + args.cell_memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(num_threads)
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by those that are killed
    try:
        found = measure(args, cell)
    except Exception as error:
        traceback.print_exc()
        found = failure_of(error)
    sender.send(found)


def in_own_process(args: argparse.Namespace, cell: Cell) -> dict:
    """What a process that lives only for this cell finds."""
    # Forked from a server that has imported the libraries: a cell then starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["srdd.conversion", "srdd.pipelines"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_cell, args=(args, cell, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(args.cell_timeout):
            return {"failure": OUT_OF_TIME, "detail": f"more than {args.cell_timeout:g} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"failure": KILLED, "detail": f"exit code {process.exitcode} (-9 as a rule for want of memory)"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def settings_of(args: argparse.Namespace) -> dict:
    """All that cells of one file must have in common."""
    return {
        "reference": "recipe" if args.reference is None else "official",
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "vae_channels": args.vae_channels,
        "codebook_size": args.codebook_size,
    }


def load(path: Path | None, settings: dict) -> Found:
    """
    The cells of an earlier run.

    Raises:
        ValueError: If they were measured under other settings.
    """
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    earlier = stored.get("settings", {})
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ValueError(
                f"`--output` must be a new file, or one with the same {name}, {value!r}, got {path} with"
                f" {earlier.get(name)!r}."
            )
    return {Cell(**entry.pop("cell")): entry for entry in stored["cells"]}


def save(path: Path | None, settings: dict, found: Found, fits: dict | None = None) -> None:
    """Write all cells; a run that is stopped leaves the file as it was before or after."""
    if path is None:
        return
    cells = [{"cell": asdict(cell), **entry} for cell, entry in found.items()]
    temporary = path.with_name(path.name + ".part")
    text = json.dumps({"settings": settings, "fits": fits or {}, "cells": cells}, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def is_hopeless(args: argparse.Namespace, axis: str, value: int, row: str, found: Found) -> bool:
    """Whether something smaller on the same axis did not fit."""
    smaller = [found.get(cell, {}) for place, cell in cells_along(args, axis, row).items() if place < value]
    return any(entry.get("failure") in (OUT_OF_TIME, OUT_OF_MEMORY, KILLED) for entry in smaller)


def run(args: argparse.Namespace) -> tuple[dict, Found]:
    """Settings, and all cells, of which those in the file were there before."""
    settings = settings_of(args)
    found = load(args.output, settings)
    if args.retry:
        found = {cell: entry for cell, entry in found.items() if "failure" not in entry}
    places = [
        (axis, value, row)
        for axis in args.axes
        for value in getattr(args, AXES[axis][0])
        for row in (REFERENCE, *args.rows)
    ]
    progress = tqdm(places)
    for axis, value, row in progress:
        cell = cell_at(args, axis, value, row)
        if cell is None or cell in found or is_hopeless(args, axis, value, row, found):
            continue
        progress.set_postfix_str(str(cell))
        found[cell] = in_own_process(args, cell)
        save(args.output, settings, found)
    return settings, found


def cost_of(cell: Cell, entry: dict, cost: str) -> float:
    return statistics.median(entry["seconds"]) / cell.batch_size if cost == "seconds" else entry["mebibytes"]


def fit_exponent(values: Sequence[float], costs: Sequence[float]) -> float | None:
    """The `p` of cost = c * value ** p, by least squares on logarithms; `None` without two points above zero."""
    if len(values) < 2 or min(*values, *costs) <= 0:
        return None
    logarithms = (torch.tensor(list(numbers), dtype=torch.float64).log().tolist() for numbers in (values, costs))
    return statistics.linear_regression(*logarithms).slope


def fit_line(values: Sequence[float], costs: Sequence[float]) -> float | None:
    """The slope of a straight line as a share of its value at 0; `None` without two points or a value above zero."""
    if len(values) < 2:
        return None
    line = statistics.linear_regression(values, costs)
    return line.slope / line.intercept if line.intercept > 0 else None


def fit(axis: str, points: dict[int, float]) -> dict[str, float | None]:
    """What the points of a row say about its growth along an axis."""
    values, costs = list(points), list(points.values())
    if axis == "num_passes":
        return dict(zip(FITS["line"], [fit_line(values, costs)]))
    half = len(values) // 2
    exponents = [fit_exponent(values, costs), fit_exponent(values[half:], costs[half:])]
    return dict(zip(FITS["exponent"], exponents))


def points_of(args: argparse.Namespace, axis: str, row: str, found: Found, cost: str) -> dict[int, float]:
    """What was measured along an axis, by its value there."""
    cells = cells_along(args, axis, row)
    return {
        value: cost_of(cell, found[cell], cost)
        for value, cell in cells.items()
        if cell in found and "failure" not in found[cell]
    }


def fits_of(args: argparse.Namespace, found: Found) -> dict:
    """All fits, by axis, cost and row."""
    return {
        axis: {
            cost: {row: fit(axis, points_of(args, axis, row, found, cost)) for row in (REFERENCE, *args.rows)}
            for cost in COSTS
        }
        for axis in args.axes
    }


def readable(cost: str, value: float) -> str:
    return f"{value:.0f}" if cost == "mebibytes" or value >= 1000 else f"{value:.3g}"


def table(args: argparse.Namespace, axis: str, cost: str, found: Found, fits: dict) -> list[str]:
    """Markdown: the rows' costs along an axis."""
    values, (_, title) = getattr(args, AXES[axis][0]), AXES[axis]
    fitted = FITS["line" if axis == "num_passes" else "exponent"]
    lines = [
        f"| {title}: {COSTS[cost]} | {' | '.join(map(str, [*values, *fitted]))} |",
        "|---" * (1 + len(values) + len(fitted)) + "|",
    ]
    for row in (REFERENCE, *args.rows):
        points, texts = points_of(args, axis, row, found, cost), []
        for value in values:
            cell = cell_at(args, axis, value, row)
            if cell is None:
                texts.append("—")
            elif value in points:
                texts.append(readable(cost, points[value]))
            else:
                texts.append(found[cell]["failure"] if cell in found else "not tried")
        numbers = [fits[axis][cost][row][name] for name in fitted]
        texts += ["—" if number is None else f"{number:.2f}" for number in numbers]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return [*lines, ""]


def report(args: argparse.Namespace, settings: dict, found: Found, fits: dict) -> str:
    """Markdown."""
    what = "VAR's recipe in our modules" if args.reference is None else "the official VAR code"
    lines = [
        f"{settings['device']}, torch {settings['torch']}, {args.dtype}, guidance {GUIDANCE_SCALE}. The reference is"
        f" {what}. Where an axis is not the table's: batch {args.batch_size}, {args.image_size}px, depth {args.depth},"
        f" {args.num_passes} further passes. Medians of up to {args.num_rounds} rounds.",
        "",
    ]
    for axis in args.axes:
        for cost in COSTS:
            lines += table(args, axis, cost, found, fits)
        if axis == "image_size":
            for size in args.image_sizes:
                scales = default_scale_sizes(size // 16)
                sides = " ".join(str(height) for height, _ in scales)
                lines.append(f"- {size}px: {sum(num_tokens_per_scale(scales))} tokens, scales {sides}")
            lines.append("")
    rows = (REFERENCE, *args.rows)
    shown = {cell for axis in args.axes for row in rows for cell in cells_along(args, axis, row).values()}
    failures = {cell: entry for cell, entry in found.items() if cell in shown and "failure" in entry}
    lines += [f"- {cell}: {entry['failure']} ({entry['detail']})" for cell, entry in failures.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


def save_plot(args: argparse.Namespace, found: Found) -> None:
    """Draw both costs along every axis; axes on which a power law is a straight line are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(args.axes), 6.4), layout="constrained")
    pictures = figure.subplots(len(COSTS), len(args.axes), squeeze=False)
    for axis, column in zip(args.axes, pictures.T):
        for (cost, label), axes in zip(COSTS.items(), column):
            points = {row: points_of(args, axis, row, found, cost) for row in (REFERENCE, *args.rows)}
            curves = {row: (list(at), list(at.values()), [None] * len(at)) for row, at in points.items() if at}
            if not curves:
                axes.set_axis_off()
                continue
            draw_curves(axes, curves, AXES[axis][1], label)
            if axis != "num_passes":
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
            values = sorted({value for xs, _, _ in curves.values() for value in xs})
            axes.set_xticks(values, labels=map(str, values))
            axes.tick_params(axis="x", which="minor", bottom=False)
    figure.savefig(args.plot, dpi=100)


def main(args: argparse.Namespace) -> None:
    settings, found = run(args)
    fits = fits_of(args, found)
    save(args.output, settings, found, fits)
    sys.stdout.write(report(args, settings, found, fits))
    if args.plot:
        save_plot(args, found)


if __name__ == "__main__":
    main(parse_args())
