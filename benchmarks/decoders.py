#!/usr/bin/env python
"""
What decoders cost: a tokenizer's own, the same in int8, and the light ones that `distill_decoder.py` makes for it.

    python benchmarks/decoders.py --tokenizer model_cards/srdd-fruits64/vqvae --batch_size 16
    python benchmarks/decoders.py
    python benchmarks/decoders.py --tokenizer model_cards/srdd-fruits64/vqvae --dataset_name fruits64

Without `--tokenizer` it is of the shape of VAR's at 256px. The light decoders' weights are random: they do not change
the cost. All run in turn, round by round, in one process; prints medians, and the ratios' median and range over the
rounds, as Markdown. On a machine that is busy with other things take `--clock cpu` and one thread. int8 is there on
CPUs with VNNI.

With `--dataset_name` nothing is timed: held-out images are decoded in float32 and in int8, whose bounds are found on
`--num_examples` training images.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
from measuring import device_name, ratio_text, synchronize
from samplers import draw_weights, with_int8_decoder
from speed import CPU_OPERATORS
from torch.utils.flop_counter import FlopCounterMode

from srdd import MultiScaleVQModel
from srdd.data.images import image_to_tensor, load_labelled_images
from srdd.models.fast_linear import multiplies_int8
from srdd.training.light_decoder import light_tokenizer
from srdd.training.settings import positive_int


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="Folder or Hub id of one.")
    parser.add_argument("--layers_per_block", type=int, nargs="*", default=[1, 0], help="One light decoder for each.")
    parser.add_argument("--batch_size", type=positive_int, default=1)
    parser.add_argument("--num_rounds", type=positive_int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="Passing time, or the processor's.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dataset_name", help="Compare int8 with float32 on the validation split of this data set.")
    parser.add_argument("--num_images", type=positive_int, default=512)
    parser.add_argument("--num_examples", type=positive_int, default=64)
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Parameters, GFLOP an image and seconds of every round, by row; the tokenizer's own decoder comes first."""
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    torch.manual_seed(0)
    if args.tokenizer:
        tokenizer = MultiScaleVQModel.from_pretrained(args.tokenizer)
    else:
        tokenizer = MultiScaleVQModel()
        draw_weights(tokenizer)
    tokenizer.eval()
    models = {"own": tokenizer}
    if device.type == "cpu" and multiplies_int8():
        models["int8"] = with_int8_decoder(tokenizer)
    for layers in args.layers_per_block:
        light = light_tokenizer(tokenizer, layers_per_block=layers)
        draw_weights(light.decoder)
        models[f"light, {light.config.decoder_block_out_channels}, {layers} + 1 layers"] = light
    shape = (args.batch_size, tokenizer.config.latent_channels, *tokenizer.config.scale_sizes[-1])
    latents, found = torch.randn(shape, device=device), {}
    for name, model in models.items():
        model.eval().to(device)
        with FlopCounterMode(display=False, custom_mapping=CPU_OPERATORS) as counter:
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
    own = found["own"]
    for name, row in found.items():
        milliseconds = 1000 * statistics.median(row["seconds"]) / args.batch_size
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['gflop']:.3f}"
            f" (1/{own['gflop'] / row['gflop']:.1f}) | {milliseconds:.2f} |"
            f" {ratio_text(own['seconds'], row['seconds'])} |"
        )
    return "\n".join(lines) + "\n"


def decibels(images: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], clamped to it, the mean over images."""
    errors = (images.clamp(-1, 1) - expected.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return (10 * (4 / errors).log10()).mean().item()


@torch.no_grad()
def compare_pictures(args: argparse.Namespace) -> str:
    """What int8 changes in reconstructions, as Markdown."""
    tokenizer = MultiScaleVQModel.from_pretrained(args.tokenizer).eval()
    data = load_labelled_images(args.dataset_name)

    def pictures(split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        chosen = split.select(order[:count].tolist())[data.image_column]
        pixels = torch.stack([image_to_tensor(image, tokenizer.config.sample_size) for image in chosen])
        parts = [tokenizer.latent_states(tokenizer.tokenize(part))[-1] for part in pixels.split(64)]
        return pixels, torch.cat(parts)

    pixels, latents = pictures(data.validation, args.num_images)
    _, examples = pictures(data.train, args.num_examples)
    int8 = copy.deepcopy(tokenizer)
    int8.enable_int8_decoding(examples)
    expected, images = tokenizer.decode(latents).sample, int8.decode(latents).sample
    return (
        "| decoder | PSNR to the originals, dB | to float32's, dB |\n|---|---|---|\n"
        f"| float32 | {decibels(expected, pixels):.3f} | |\n"
        f"| int8 | {decibels(images, pixels):.3f} | {decibels(images, expected):.2f} |\n"
    )


def main(args: argparse.Namespace) -> None:
    sys.stdout.write(report(args, measure(args)) if args.dataset_name is None else compare_pictures(args))


if __name__ == "__main__":
    main(parse_args())
