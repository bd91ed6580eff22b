#!/usr/bin/env python
"""
The first picture that a folder draws on a CPU: seconds to load and to draw, and the peak of resident memory (Linux).

    python benchmarks/first_picture.py random/converted --dtype bfloat16

A folder that draws by class draws its first one; one that draws from texts is given random embeddings.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from measuring import process_memory, write_results
from text_drawing import Drawing

import srdd
from srdd.console import write_text
from srdd.pipelines.scale_pipeline import ScalePipeline


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Of a pipeline.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="JSON of what was measured.")
    return parser.parse_args(arguments)


def draw_class(pipe: srdd.SRDDPipeline) -> torch.Tensor:
    """An image of the first class."""
    return pipe(0, output_type="pt").images


def main(args: argparse.Namespace) -> None:
    kind = getattr(srdd, ScalePipeline.load_config(args.folder)["_class_name"])
    started = time.perf_counter()
    pipe = kind.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    draw = Drawing(pipe, 1) if kind is srdd.SRDDTextPipeline else partial(draw_class, pipe)
    images = draw()
    drawn = time.perf_counter()
    result = {
        "shape": list(images.shape),
        "finite": bool(images.isfinite().all()),
        "loading_s": round(loaded - started, 1),
        "drawing_s": round(drawn - loaded, 1),
        "peak_gib": round(process_memory("VmHWM") / 1024, 1),
    }
    write_text(
        f"{tuple(images.shape)}, finite: {result['finite']}; loading {result['loading_s']} s, drawing"
        f" {result['drawing_s']} s, peak {result['peak_gib']} GiB\n"
    )
    write_results(args, result, pipe.device)


if __name__ == "__main__":
    main(parse_args())
