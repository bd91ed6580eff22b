#!/usr/bin/env python
"""
What drawing images needs beside the weights: our pipeline against VAR's official code.

    python benchmarks/memory.py --depth 16 --image_size 256 --batch_sizes 1 4 8 --reference /path/to/VAR

Every row runs in a process of its own, on random weights. On a CPU the number is the peak of the resident set during a
call (Linux), less what was resident before it, on CUDA the peak of what torch allocated. Reference and rows are
those of `speed.py`. Prints Markdown; `--output` takes JSON.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from samplers import (
    REFERENCE,
    ROWS,
    OfficialSampler,
    PipelineSampler,
    RecipeSampler,
    Sampler,
    add_model_arguments,
    device_name,
    our_pipeline,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--measure", choices=[REFERENCE, *ROWS], help="Measure one row here and print it as JSON.")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace, name: str) -> Sampler:
    if name == REFERENCE and args.reference is not None:
        return OfficialSampler(args)
    pipe = our_pipeline(args)
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    return RecipeSampler(pipe) if name == REFERENCE else PipelineSampler(pipe, ROWS[name])


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at the peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def peak_memory(sampler: Sampler, labels: torch.LongTensor) -> float:
    """MiB that a call needs at its peak beside what is there before it."""
    gc.collect()
    if labels.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sampler(labels)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Give back what the allocator keeps, and let the peak start anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    sampler(labels)
    return resident("VmHWM") - before


def measure(args: argparse.Namespace) -> dict[int, float]:
    """Peaks of one row by batch size."""
    sampler = build(args, args.measure)
    labels = torch.arange(max(args.batch_sizes), device=args.device) % 1000
    sampler(labels[:1])  # libraries and kernels load themselves
    return {size: peak_memory(sampler, labels[:size]) for size in args.batch_sizes}


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
