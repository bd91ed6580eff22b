#!/usr/bin/env python
"""
How the cost of an image grows: with the batch, the image size, the model's depth and further passes.

    python benchmarks/growth.py --reference /path/to/VAR --output growth.json --plot growth.png

Measures seconds per image and peak memory beyond the weights along one axis at a time. On the others a cell lies at
the base: batch 1, 128px, depth 8 and no further pass, unless `--batch_size`, `--image_size`, `--depth` and
`--num_passes` say otherwise. With the defaults all takes about a quarter of an hour on two CPU cores.

Rows are those of `speed.py`, on random weights, from labels to pixels; with `--reference` the official VAR code is
one. A model's width is 64 times its depth, 64 per head, as in VAR. Scales are `srdd.scales.default_scale_sizes`: VAR's
own at 256 and 512px, and beyond that each scale is 3/4 of the next finer one, as at 512px (1024px: 1 2 3 4 6 8 11 15
20 27 36 48 64). Further passes have the policy "simple", which draws all tokens of a scale again, so that their number
is exact; the reference has none.

Every cell runs in a process of its own, which may take `--cell_timeout` seconds: one image warms up, a call is
measured for memory, and of the next ones the median time counts. What does not fit or fails is reported as such;
larger values of the same row are then not tried. With `--output` a run can be stopped and started again: cells in the
file are not measured again, those that failed only with `--retry`. On a CPU it needs Linux.

Prints Markdown, with the exponent `p` of cost = c * value ** p, by least squares on logarithms over all points and
over the last half of them; for further passes, what one costs as a share of none, by a straight line.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from measuring import WARM_UP_CALLS, device_name, error_text, peak_memory, seconds_of
from official_var import OfficialSampler
from samplers import GUIDANCE_SCALE, REFERENCE, add_model_arguments, random_pipeline, row_sampler
from tqdm.auto import tqdm

from srdd.console import write_text
from srdd.evaluation.figures import draw_curves
from srdd.evaluation.measurements import Measurements
from srdd.evaluation.tables import markdown_table, readable, scale_name
from srdd.scales import default_scale_sizes, num_tokens_per_scale


# By the name of its base value: the argument with its values, how to say it, and what a fit says of it.
EXPONENTS = ("exponent", "last half")
AXES = {
    "batch_size": ("batch_sizes", "batch size", EXPONENTS),
    "image_size": ("image_sizes", "image size", EXPONENTS),
    "depth": ("depths", "depth", EXPONENTS),
    "num_passes": ("pass_counts", "further passes", ("a pass, share of none",)),
}
COSTS = {"seconds": "seconds per image", "mebibytes": "peak MiB beyond the weights"}

OUT_OF_TIME, OUT_OF_MEMORY, KILLED, ERROR = "out of time", "out of memory", "killed", "error"


@dataclass(frozen=True)
class Cell:
    """What one process measures: `seconds` of every round and `mebibytes`, or a `failure` and its `detail`."""

    row: str
    batch_size: int
    image_size: int
    depth: int
    num_passes: int

    def __str__(self) -> str:
        passes = f", {self.num_passes} further passes" if self.num_passes else ""
        return f"{self.row}, batch {self.batch_size}, {self.image_size}px, depth {self.depth}{passes}"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(image_size=128, rows=["causal", "sdd"])
    parser.add_argument("--depth", type=int, default=8, help="Width is 64 times this, 64 per head, as in VAR.")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_passes", type=int, default=0, help="Further passes at every scale.")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 12, 16, 20, 24, 30])
    parser.add_argument("--pass_counts", type=int, nargs="+", default=[0, 1, 2, 5, 10])
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--round_seconds", type=float, default=10.0, help="No further round beyond this many.")
    parser.add_argument("--cell_timeout", type=float, default=600.0, help="Seconds for a cell, all included.")
    parser.add_argument("--retry", action="store_true", help="Measure what failed again.")
    parser.add_argument("--plot", type=Path, help="PNG file for the curves; needs matplotlib.")
    args = parser.parse_args(arguments)
    for name, _, _ in AXES.values():
        values = getattr(args, name)
        if any(small >= large for small, large in zip(values, values[1:])):
            parser.error(f"`--{name}` must grow from value to value, got {values}.")
    for size in (args.image_size, *args.image_sizes):
        if size < 16 or size % 16:
            parser.error(f"Image sizes must be multiples of 16, got {size}.")
    if args.reference is not None and not (args.reference / "models").is_dir():
        parser.error(f"`--reference` must be a checkout of the official VAR code, got {args.reference}.")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("`--plot` must be left out where matplotlib is not installed.")
    args.all_rows = [*([] if args.reference is None else [REFERENCE]), *args.rows]
    return args


def cells_along(args: argparse.Namespace, axis: str, row: str) -> dict[int, Cell]:
    """The cells of a row by their value on an axis, the others at their base; the reference makes one pass only."""
    base = {name: getattr(args, name) for name in AXES}
    if row == REFERENCE:
        base["num_passes"] = 0
    values = [0] if row == REFERENCE and axis == "num_passes" else getattr(args, AXES[axis][0])
    return {value: Cell(row, **{**base, axis: value}) for value in values}


def measure(args: argparse.Namespace, cell: Cell) -> dict:
    """Seconds and peak memory of a cell, in this process."""
    device = torch.device(args.device)
    labels = torch.arange(cell.batch_size, device=device) % 1000
    model = argparse.Namespace(**{**vars(args), "depth": cell.depth, "image_size": cell.image_size})
    if cell.row == REFERENCE:
        sampler = OfficialSampler(model)
    else:
        sampler = row_sampler(random_pipeline(model), cell.row, cell.num_passes, args.compile_backend)
    sampler(labels[:1])  # libraries load themselves, and weights are packed where kernels want that
    call = partial(sampler, labels)
    mebibytes = peak_memory(call, device)
    for _ in range(WARM_UP_CALLS if device.type == "cuda" else 0):
        call()
    seconds = [seconds_of(call, device)]
    while len(seconds) < args.num_rounds and sum(seconds) + seconds[-1] <= args.round_seconds:
        seconds.append(seconds_of(call, device))
    return {"seconds": seconds, "mebibytes": mebibytes}


def end_with_parent() -> None:
    """Wait for the end of the process that asked for this one, and end with it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_cell(args: argparse.Namespace, cell: Cell, num_threads: int, sender: Connection) -> None:
    """Measure a cell and send the result, from a process that nobody else needs."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go where memory runs out
    torch.set_num_threads(num_threads)
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by those that are killed
    try:
        result = measure(args, cell)
    except Exception as error:
        traceback.print_exc()
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        result = {"failure": OUT_OF_MEMORY if no_memory else ERROR, "detail": error_text(error)}
    sender.send(result)


def in_own_process(args: argparse.Namespace, cell: Cell) -> dict:
    """The result of a cell, from a process that lives only for it."""
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
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "vae_channels": args.vae_channels,
        "codebook_size": args.codebook_size,
    }


def run(args: argparse.Namespace) -> Measurements:
    """All cells, of which those in the file were there before."""
    measurements = Measurements(args.output, settings_of(args))
    tried = set()
    progress = tqdm([(axis, row) for axis in args.axes for row in args.all_rows])
    for axis, row in progress:
        for cell in cells_along(args, axis, row).values():
            progress.set_postfix_str(str(cell))
            failed = "failure" in (measurements.find(asdict(cell)) or {})
            again = args.retry and failed and cell not in tried
            result = measurements.measure(asdict(cell), partial(in_own_process, args, cell), again)
            tried.add(cell)
            if result.get("failure") in (OUT_OF_TIME, OUT_OF_MEMORY, KILLED):
                break  # what is larger would not fit either
    return measurements


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


def fit(axis: str, points: dict[int, float]) -> list[float | None]:
    """What the points of a row say about its growth along an axis."""
    values, costs = list(points), list(points.values())
    if axis == "num_passes":
        return [fit_line(values, costs)]
    half = len(values) // 2
    return [fit_exponent(values, costs), fit_exponent(values[half:], costs[half:])]


def points_of(
    args: argparse.Namespace, axis: str, cost: str, row: str, measurements: Measurements
) -> dict[int, float]:
    """What a row costs along an axis, by its value there, where it was measured."""
    points = {}
    for value, cell in cells_along(args, axis, row).items():
        result = measurements.find(asdict(cell))
        if result is not None and "failure" not in result:
            by_image = statistics.median(result["seconds"]) / cell.batch_size
            points[value] = by_image if cost == "seconds" else result["mebibytes"]
    return points


def growth_table(args: argparse.Namespace, axis: str, cost: str, measurements: Measurements) -> str:
    """Markdown: the rows' costs along an axis."""
    name, title, fitted = AXES[axis]
    lines = []
    for row in args.all_rows:
        cells, points = cells_along(args, axis, row), points_of(args, axis, cost, row, measurements)
        texts = []
        for value in getattr(args, name):
            if value in points:
                texts.append(readable(points[value]))
            elif value in cells:
                texts.append((measurements.find(asdict(cells[value])) or {}).get("failure", "not tried"))
            else:
                texts.append("—")
        numbers = ["—" if number is None else f"{number:.2f}" for number in fit(axis, points)]
        lines.append((row, *texts, *numbers))
    return markdown_table((f"{title}: {COSTS[cost]}", *getattr(args, name), *fitted), lines)


def report(args: argparse.Namespace, measurements: Measurements) -> str:
    """Markdown."""
    base = f"batch {args.batch_size}, {args.image_size}px, depth {args.depth}, {args.num_passes} further passes"
    blocks = [
        f"{measurements.settings['device']}, torch {torch.__version__}, {args.dtype}, guidance {GUIDANCE_SCALE}. Where"
        f" an axis is not the table's: {base}. Medians of up to {args.num_rounds} rounds.\n"
    ]
    for axis in args.axes:
        blocks += [growth_table(args, axis, cost, measurements) for cost in COSTS]
        if axis == "image_size":
            lines = []
            for size in args.image_sizes:
                scales = default_scale_sizes(size // 16)
                names = " ".join(scale_name(scale) for scale in scales)
                lines.append(f"- {size}px: {sum(num_tokens_per_scale(scales))} tokens, scales {names}\n")
            blocks.append("".join(lines))
    cells = {cell for axis in args.axes for row in args.all_rows for cell in cells_along(args, axis, row).values()}
    results = {cell: measurements.find(asdict(cell)) or {} for cell in sorted(cells, key=str)}
    failures = [f"- {cell}: {x['failure']} ({x['detail']})\n" for cell, x in results.items() if "failure" in x]
    return "\n".join([*blocks, *(["".join(failures)] if failures else [])])


def save_plot(args: argparse.Namespace, measurements: Measurements) -> None:
    """Draw both costs along every axis; axes on which a power law is a straight line are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(args.axes), 6.4), layout="constrained")
    pictures = figure.subplots(len(COSTS), len(args.axes), squeeze=False)
    for axis, column in zip(args.axes, pictures.T):
        for (cost, label), axes in zip(COSTS.items(), column):
            points = {row: points_of(args, axis, cost, row, measurements) for row in args.all_rows}
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
    measurements = run(args)
    write_text(report(args, measurements))
    if args.plot:
        save_plot(args, measurements)


if __name__ == "__main__":
    main(parse_args())
