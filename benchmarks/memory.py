#!/usr/bin/env python
"""
What drawing images needs beside the weights: our pipeline against VAR's official code.

    python benchmarks/memory.py --depth 16 --image_size 256 --batch_sizes 1 4 8 --reference /path/to/VAR

Every row runs in a process of its own, on random weights. On a CPU the number is the peak of the resident set during a
call (Linux), less what was resident before it, on CUDA the peak of what torch allocated. Reference and rows are
those of `speed.py`. Prints Markdown; `--output` takes JSON.
"""

import argparse
import json
import subprocess
import sys
from functools import partial

import torch
from measuring import device_name, peak_memory
from samplers import REFERENCE, add_model_arguments, build_sampler


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--measure", help="Measure one row here and print it as JSON.")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[int, float]:
    """Peaks of one row by batch size."""
    sampler = build_sampler(args, args.measure)
    labels = torch.arange(max(args.batch_sizes), device=args.device) % 1000
    sampler(labels[:1])  # libraries and kernels load themselves
    return {size: peak_memory(partial(sampler, labels[:size]), labels.device) for size in args.batch_sizes}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_args(arguments)
    if args.measure:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    peaks = {}
    for name in (REFERENCE, *args.rows):
        command = [sys.executable, __file__, *arguments, "--measure", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[name] = {int(size): peak for size, peak in json.loads(output.splitlines()[-1]).items()}
    what = "VAR's recipe in our modules" if args.reference is None else "the official VAR code"
    lines = [
        f"Depth {args.depth}, {args.image_size}px, {device_name(torch.device(args.device))}, torch"
        f" {torch.__version__}, {args.dtype}. The reference is {what}. Peak MiB beyond the weights (share of the"
        " reference's):",
        "",
        f"| batch size | {' | '.join(map(str, args.batch_sizes))} |",
        "|---" * (1 + len(args.batch_sizes)) + "|",
    ]
    for name, by_size in peaks.items():
        cells = [f"{peak:.0f} ({peak / peaks[REFERENCE][size]:.2f})" for size, peak in by_size.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if args.output:
        report = {"arguments": {name: str(value) for name, value in vars(args).items()}, "peak_mebibytes": peaks}
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
