#!/usr/bin/env python
"""
What an image from a text costs: seconds, and memory beside the weights.

    python benchmarks/text_drawing.py --image_size 512 1024 --rows markov markov-eager markov-fp8 causal

Models of Switti's sizes with random weights, its published schedules, guidance 7; one text of 77 tokens, already
encoded, to pixels. A row is an attention pattern; `eager` is without CUDA graphs, `fp8` keeps the transformer's
weights in 8 bits (`enable_layerwise_casting`). Rows are measured one after the other. Prints Markdown. `--output`
takes JSON.
"""

import argparse
import statistics
from pathlib import Path

import torch
from measuring import WARM_UP_CALLS, cuda_memory, device_name, error_text, peak_memory, seconds_of, write_results
from samplers import draw_weights
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTextTransformer2DModel, SRDDTextPipeline
from srdd.console import write_text
from srdd.conversion.official_config import KNOWN_SCALES
from srdd.conversion.switti import SWITTI
from srdd.evaluation.tables import markdown_table


NUM_TEXT_TOKENS = 77
WORDS = ("eager", "fp8")


def row_name(text: str) -> str:
    """The name of a row, from the command line."""
    pattern, *words = text.split("-")
    if pattern not in ("markov", "causal", "banded") or set(words) - set(WORDS):
        raise argparse.ArgumentTypeError(f"rows must be a pattern and any of {', '.join(WORDS)}, got {text!r}")
    return text


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, nargs="+", choices=[512, 1024], default=[512])
    parser.add_argument("--rows", type=row_name, nargs="+", default=["markov", "causal"])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--depth", type=int, default=30, help="Width is 64 times this.")
    parser.add_argument("--vae_channels", type=int, default=160, help="Channels at the full resolution.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")
    return parser.parse_args(arguments)


def random_text_pipeline(args: argparse.Namespace, image_size: int, name: str) -> SRDDTextPipeline:
    """The pipeline of a row, of Switti's shape with random weights, without text encoders."""
    pattern, *words = name.split("-")
    scale_sizes, dtype = list(KNOWN_SCALES[image_size]), getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(args.device):
        vqvae = MultiScaleVQModel(
            block_out_channels=[args.vae_channels * factor for factor in (1, 1, 2, 2, 4)],
            scale_sizes=scale_sizes,
            sample_size=image_size,
        )
        transformer = ScaleTextTransformer2DModel(
            scale_sizes=scale_sizes,
            num_layers=args.depth,
            num_attention_heads=args.depth,
            attention_pattern=pattern,
        )
    for model in (vqvae, transformer):
        draw_weights(model.eval())
        for name, parameter in model.named_parameters():
            if not set(model._keep_in_fp32_modules or ()) & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
    settings = SWITTI.settings(args.depth, scale_sizes, Path())
    scheduler = ScaleScheduler(scale_sizes=scale_sizes, **settings.scheduler_options(scale_sizes))
    if "fp8" in words:
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    pipe = SRDDTextPipeline(vqvae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    if "eager" in words:
        pipe.disable_cuda_graphs()
    return pipe


class Drawing:
    """Draws images from the same texts, again and again."""

    def __init__(self, pipe: SRDDTextPipeline, batch_size: int):
        config, device = pipe.transformer.config, pipe.transformer.device
        generator = torch.Generator(device).manual_seed(1)
        shapes = {
            "prompt_embeds": (batch_size, NUM_TEXT_TOKENS, config.cross_attention_dim),
            "pooled_prompt_embeds": (batch_size, config.pooled_projection_dim),
        }
        self.pipe = pipe
        self.texts = {
            f"{prefix}{name}": torch.randn(shape, generator=generator, device=device)
            for prefix in ("", "negative_")
            for name, shape in shapes.items()
        }

    def __call__(self) -> torch.Tensor:
        return self.pipe(**self.texts, output_type="pt").images


def mebibytes(model: torch.nn.Module) -> float:
    """MiB of a model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20


def measure(args: argparse.Namespace, image_size: int, name: str) -> dict:
    """A row at a size."""
    device = torch.device(args.device)
    draw = Drawing(random_text_pipeline(args, image_size, name), args.batch_size)
    weights = {part: mebibytes(getattr(draw.pipe, part)) for part in ("transformer", "vqvae")}
    with cuda_memory(device) as memory:
        first, images = seconds_of(draw, device), draw()
        for _ in range(WARM_UP_CALLS - 2 if device.type == "cuda" else 0):
            draw()
    peak = memory["peak"] if device.type == "cuda" else peak_memory(draw, device)
    return {
        "image_size": image_size,
        "row": name,
        "mebibytes": weights,
        "peak_mib": peak,
        "kept_mib": memory.get("kept"),
        "first_seconds": first,
        "seconds": [seconds_of(draw, device) for _ in range(args.num_rounds)],
        "shape": list(images.shape),
    }


def run(args: argparse.Namespace) -> list[dict]:
    """All that is measured; rows that fail say why, and the others go on."""
    results = []
    for image_size, name in tqdm([(size, name) for size in args.image_size for name in args.rows]):
        try:
            results.append(measure(args, image_size, name))
        except Exception as error:
            results.append({"image_size": image_size, "row": name, "failure": error_text(error)})
    return results


def report(args: argparse.Namespace, results: list[dict]) -> str:
    """Markdown."""
    introduction = (
        f"An image from a text, depth {args.depth}, batch {args.batch_size}, {device_name(torch.device(args.device))},"
        f" torch {torch.__version__}, {args.dtype}, medians of {args.num_rounds} rounds. Weights are of transformer"
        " and tokenizer; text encoders are not there."
    )
    header = ("row", "image", "s", "first call, s", "weights, MiB", "peak MiB beside them", "of these kept, MiB")
    lines = []
    for result in results:
        if "failure" in result:
            name, size = result["row"], result["image_size"]
            lines.append((name, f"{size}px", f"failed: {result['failure'].replace('|', '/')}", "", "", "", ""))
            continue
        # What goes without a graph keeps nothing of its own.
        kept = result["kept_mib"] if set(result["row"].split("-")).isdisjoint(WORDS) else None
        lines.append(
            (
                result["row"],
                f"{result['shape'][-1]} x {result['shape'][-2]}",
                f"{statistics.median(result['seconds']):.3g}",
                f"{result['first_seconds']:.3g}",
                f"{sum(result['mebibytes'].values()):,.0f}",
                f"{result['peak_mib']:,.0f}",
                "" if kept is None else f"{kept:,.0f}",
            )
        )
    return f"{introduction}\n\n{markdown_table(header, lines)}"


def main(args: argparse.Namespace) -> None:
    results = run(args)
    write_text(report(args, results))
    write_results(args, results, torch.device(args.device))


if __name__ == "__main__":
    main(parse_args())
