#!/usr/bin/env python
"""
What the size of the decoder's slices is worth: seconds and memory of a batch by the images decoded at a time.

    python benchmarks/decoder_slices.py --batch_size 64 --dtype bfloat16
    python benchmarks/decoder_slices.py --batch_size 64 --dtype bfloat16 --modes compiled --images_per_slice 1 4 11 64

A tokenizer of VAR's shape with random weights decodes the same latents, eager or with a compiled decoder (a
compilation for every size), and on CUDA also replayed as one CUDA graph, in which launches cost the host nothing.
Pixels are compared with those of the first row. Prints medians and peaks as Markdown, with what would be chosen by
itself: `BYTES_PER_SLICE` in `srdd.acceleration.decoder` is the number to set by it. `--output` takes JSON.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from measuring import device_name, peak_memory, seconds_of, write_results
from samplers import draw_weights
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel
from srdd.acceleration import decoder
from srdd.console import write_text
from srdd.evaluation.tables import markdown_table
from srdd.scales import default_scale_sizes


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--images_per_slice", type=int, nargs="+", default=[1, 2, 4, 8, 11, 16, 32, 64])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--vae_channels", type=int, default=160, help="Channels at the full resolution.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")
    return parser.parse_args(arguments)


def make_tokenizer(args: argparse.Namespace) -> MultiScaleVQModel:
    torch.manual_seed(0)
    with torch.device(args.device):
        vqvae = MultiScaleVQModel(
            block_out_channels=[args.vae_channels * factor for factor in (1, 1, 2, 2, 4)],
            scale_sizes=default_scale_sizes(args.image_size // 16),
            sample_size=args.image_size,
        )
    draw_weights(vqvae.eval())
    return vqvae.to(getattr(torch, args.dtype))


def in_slices(vqvae: MultiScaleVQModel, latents: torch.Tensor, num_images: int) -> Callable[[], torch.Tensor]:
    """Decodes latents so many at a time, on the path that is theirs otherwise."""
    bytes_per_slice = num_images * bytes_per_image(vqvae, latents)
    decoding_path = decoder.decoding_path

    def path(*args) -> decoder.DecodingPath:
        return dataclasses.replace(decoding_path(*args), bytes_per_slice=bytes_per_slice, even_slices=False)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        with mock.patch.object(decoder, "decoding_path", path):
            return vqvae.decode(latents).sample

    return decode


def bytes_per_image(vqvae: MultiScaleVQModel, latents: torch.Tensor) -> int:
    """Size of an image's largest feature map."""
    return latents.shape[-2:].numel() * vqvae._largest_map * latents.element_size()


def recorded(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A call as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return sample

    return replay


def median_seconds(call: Callable[[], object], device: torch.device, num_rounds: int) -> float:
    call()
    return statistics.median(seconds_of(call, device) for _ in range(num_rounds))


def run(args: argparse.Namespace) -> dict:
    """All that is measured."""
    device, vqvae = torch.device(args.device), make_tokenizer(args)
    side = args.image_size // 16
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(
        args.batch_size, vqvae.config.latent_channels, side, side, generator=generator, device=device
    )
    latents = latents.to(vqvae.dtype)
    slices, first = [], None
    for mode in args.modes:
        vqvae.decoder._compiled_call_impl = None
        for num_images in tqdm(args.images_per_slice, desc=mode):
            if mode == "compiled":
                torch._dynamo.reset()
                vqvae.decoder.compile(fullgraph=True, dynamic=False)
            decode = in_slices(vqvae, latents, num_images)
            sample = decode().float()
            first = sample if first is None else first
            slices.append(
                {
                    "mode": mode,
                    "images_per_slice": num_images,
                    "seconds": median_seconds(decode, device, args.num_rounds),
                    "peak_mib": peak_memory(decode, device),
                    "difference": (sample - first).abs().max().item(),
                }
            )
            if device.type == "cuda":
                slices[-1]["graph_seconds"] = median_seconds(recorded(decode), device, args.num_rounds)
    return {
        "mib_per_image": bytes_per_image(vqvae, latents) / decoder.MIB,
        "default": decoder.even_slice(latents, bytes_per_image(vqvae, latents), decoder.BYTES_PER_SLICE),
        "slices": slices,
    }


def report(args: argparse.Namespace, results: dict) -> str:
    """Markdown."""
    device = device_name(torch.device(args.device))
    introduction = (
        f"Decoder, {args.image_size}px, batch {args.batch_size}, {device}, torch {torch.__version__}, {args.dtype},"
        f" {args.num_rounds} rounds. An image's largest map has {results['mib_per_image']:.3g} MiB; by default"
        f" {results['default']} images are decoded at a time.\n"
    )
    header = ("mode", "images per slice", "ms", "ms as a CUDA graph", "peak MiB", "largest difference of pixels")
    lines = [
        (
            row["mode"],
            row["images_per_slice"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['graph_seconds']:.1f}" if "graph_seconds" in row else "–",
            f"{row['peak_mib']:.0f}",
            f"{row['difference']:.0e}",
        )
        for row in results["slices"]
    ]
    return introduction + "\n" + markdown_table(header, lines)


def main(args: argparse.Namespace) -> None:
    results = run(args)
    write_text(report(args, results))
    write_results(args, results, torch.device(args.device))


if __name__ == "__main__":
    main(parse_args())
