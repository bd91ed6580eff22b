#!/usr/bin/env python
"""
What a light decoder costs: the teacher's decoder against the one that `distill_decoder.py` makes for it by default.

    python benchmarks/light_decoder.py --teacher model_cards/srdd-fruits64/vqvae --batch_size 16
    python benchmarks/light_decoder.py

Without `--teacher` it is of the shape of VAR's tokenizer at 256px. The light decoders' weights are random: they do not
change the cost. All run in turn, round by round, in one process; prints medians, and the ratios' median and range over
the rounds, as Markdown. On a machine that is busy with other things take `--clock cpu` and one thread.
"""

import argparse
import statistics
import sys
import time

import torch
from measuring import device_name, synchronize
from samplers import draw_weights
from torch.utils.flop_counter import FlopCounterMode

from srdd import MultiScaleVQModel
from srdd.training.arguments import positive_int
from srdd.training.light_decoder import light_tokenizer


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="Folder or Hub id of a tokenizer.")
    parser.add_argument("--layers_per_block", type=int, nargs="+", default=[1, 0], help="One light decoder for each.")
    parser.add_argument("--batch_size", type=positive_int, default=1)
    parser.add_argument("--num_rounds", type=positive_int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="Passing time, or the processor's.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Parameters, GFLOP an image and seconds of every round, by row; the teacher's come first."""
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    torch.manual_seed(0)
    if args.teacher:
        teacher = MultiScaleVQModel.from_pretrained(args.teacher)
    else:
        teacher = MultiScaleVQModel()
        draw_weights(teacher)
    models = {"teacher": teacher}
    for layers in args.layers_per_block:
        light = light_tokenizer(teacher, layers_per_block=layers)
        draw_weights(light.decoder)
        models[f"light, {light.config.decoder_block_out_channels}, {layers} + 1 layers"] = light
    shape = (args.batch_size, teacher.config.latent_channels, *teacher.config.scale_sizes[-1])
    latents, found = torch.randn(shape, device=device), {}
    for name, model in models.items():
        model.eval().to(device)
        with FlopCounterMode(display=False) as counter:
            model.decode(latents)  # and warm up
        parameters = sum(parameter.numel() for parameter in model.decoder.parameters())
        gflop = counter.get_total_flops() / args.batch_size / 1e9
        found[name] = {"parameters": parameters, "gflop": gflop, "seconds": []}
    for _ in range(args.num_rounds):
        for name, model in models.items():
            synchronize(device)
            started = clock()
            model.decode(latents)
            synchronize(device)
            found[name]["seconds"].append(clock() - started)
    return found


def report(args: argparse.Namespace, found: dict[str, dict]) -> str:
    lines = [
        f"Batch {args.batch_size}, {device_name(torch.device(args.device))}, {args.num_rounds} rounds, {args.clock}"
        " time.",
        "",
        "| decoder | parameters | GFLOP an image | median ms an image | times as fast (min–max) |",
        "|---|---|---|---|---|",
    ]
    teacher = found["teacher"]
    for name, row in found.items():
        ratios = [left / right for left, right in zip(teacher["seconds"], row["seconds"])]
        milliseconds = 1000 * statistics.median(row["seconds"]) / args.batch_size
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['gflop']:.3f}"
            f" (1/{teacher['gflop'] / row['gflop']:.1f}) | {milliseconds:.2f} |"
            f" {statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f}) |"
        )
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    sys.stdout.write(report(args, measure(args)))


if __name__ == "__main__":
    main(parse_args())
