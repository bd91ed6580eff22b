#!/usr/bin/env python
"""
Whether pipelines draw the same with and without CUDA graphs.

    python benchmarks/graph_check.py --depth 16 --image_size 256 --batch_size 1 --rows causal sdd sdd-6 sdd-compiled

Every row, as `speed.py` has them, draws beside its `eager` twin: three calls in a row that are alike for a graph, with
other labels, guidance and generators each, then three of a larger batch, three without guidance, and the first kind
again; first the most probable tokens, then as VAR draws. Tokens and pixels must be the same in float32, without TF32;
in half precision, where rounding may turn a choice, it is only told how far they are. Times are of calls that are not
among the first two of their kind: where they do not differ, there was no graph, as on a CPU.

Random weights. Prints Markdown, and ends with an error if something differs or cannot be drawn. `--output` takes JSON.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from measuring import device_name, error_text, synchronize, without_tf32, write_results
from samplers import EAGER, GUIDANCE_SCALE, add_model_arguments, random_pipeline, row_of, row_sampler
from tqdm.auto import tqdm

from srdd import ScaleScheduler, SRDDPipeline
from srdd.console import write_text
from srdd.evaluation.tables import markdown_table


# By how much pixels may differ in float32.
TOLERANCE = 1e-4

GREEDY = {"top_k": 1, "top_p": 1.0}


@dataclass(frozen=True)
class Draw:
    """
    A call of a pipeline.

    Args:
        batch_size (`int`): How many images.
        guidance_scale (`float`): As in [`SRDDPipeline`].
        seed (`int`): Of its noise, and the first label.
        generators (`str`): "device", "cpu", "each" (a list with one for each image) or "none".
    """

    batch_size: int
    guidance_scale: float
    seed: int
    generators: str

    def __call__(self, pipe: SRDDPipeline) -> tuple[torch.LongTensor, torch.Tensor]:
        """Tokens and pixels."""
        device = pipe.transformer.device
        labels = (torch.arange(self.batch_size) * 7 + self.seed) % pipe.transformer.config.num_classes
        generator = None
        if self.generators == "each":
            generator = [torch.Generator(device).manual_seed(self.seed + index) for index in range(self.batch_size)]
        elif self.generators != "none":
            generator = torch.Generator(device if self.generators == "device" else "cpu").manual_seed(self.seed)
        else:
            torch.manual_seed(self.seed)
        output = pipe(labels.to(device), guidance_scale=self.guidance_scale, generator=generator, output_type="pt")
        return output.token_ids, output.images


def draws_in_a_row(batch_size: int) -> list[Draw]:
    """Calls of three kinds of graphs, and the first kind again; no two have the same labels, noise and guidance."""
    scales, generators = (GUIDANCE_SCALE, 2 * GUIDANCE_SCALE, 1.5), ("device", "each", "cpu")
    kinds = [(batch_size, scales), (batch_size + 1, scales), (batch_size, (1.0, 1.0, 1.0))]
    draws = [
        Draw(size, scale, 10 * kind + index, generators[index])
        for kind, (size, scales_of_kind) in enumerate(kinds)
        for index, scale in enumerate(scales_of_kind)
    ]
    return [*draws, Draw(batch_size, 3.0, 90, "none"), Draw(batch_size, 3.5, 91, "each")]


def compare(graphed: SRDDPipeline, eager: SRDDPipeline, draws: Sequence[Draw]) -> list[dict]:
    """
    What two pipelines make of the same calls, one after the other.

    Returns:
        `list[dict]`: For every call the share of equal tokens, the largest difference of pixels, and seconds of both.
    """
    device, compared = graphed.transformer.device, []
    for draw in draws:
        outputs, seconds = [], []
        for pipe in (graphed, eager):
            synchronize(device)
            started = time.perf_counter()
            token_ids, pixels = draw(pipe)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            outputs.append((token_ids.clone(), pixels.clone()))
        (tokens, pixels), (expected_tokens, expected_pixels) = outputs
        compared.append(
            {
                "equal_tokens": (tokens == expected_tokens).float().mean().item(),
                "pixels": (pixels - expected_pixels).abs().max().item(),
                "seconds": seconds,
            }
        )
    return compared


def greedy(pipe: SRDDPipeline) -> SRDDPipeline:
    """A pipeline of the same models that draws the most probable tokens."""
    scheduler = ScaleScheduler.from_config(pipe.scheduler.config, **GREEDY)
    return SRDDPipeline(**{**pipe.components, "scheduler": scheduler})


def check_graphs(pipe: SRDDPipeline, draws: Sequence[Draw]) -> float:
    """
    Make sure, in float32, that a pipeline draws the same most probable tokens and pixels with CUDA graphs as without.
    On a CPU there are none, and it does.

    Returns:
        `float`: The largest difference of pixels.

    Raises:
        RuntimeError: If it does not.
    """
    graphed, eager = greedy(pipe), greedy(pipe)
    for each in (graphed, eager):
        each.set_progress_bar_config(disable=True)
    eager.disable_cuda_graphs()
    with without_tf32():
        compared = compare(graphed, eager, draws)
    share, pixels = min(each["equal_tokens"] for each in compared), max(each["pixels"] for each in compared)
    if share < 1:
        raise RuntimeError(f"With CUDA graphs {1 - share:.2%} of a draw's tokens differ: nothing was timed.")
    if not pixels <= TOLERANCE:
        raise RuntimeError(f"With CUDA graphs pixels differ by {pixels:.1e}: nothing was timed.")
    return pixels


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, reference=False)
    parser.set_defaults(rows=["causal", "sdd", "sdd-6"])
    parser.add_argument("--depth", type=int, default=16, help="Width is 64 times this, 64 per head, as in VAR.")
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args(arguments)
    if any(EAGER in row_of(name).words for name in args.rows):
        parser.error(f"`--rows` must be rows with CUDA graphs, got {' '.join(args.rows)}.")
    return args


def run(args: argparse.Namespace) -> dict[str, dict]:
    """What was compared, by row: the calls, or a `failure`."""
    pipe, draws, results = random_pipeline(args), draws_in_a_row(args.batch_size), {}
    for name in tqdm(args.rows):
        try:
            compared = []
            for base in (greedy(pipe), pipe):
                pair = [
                    row_sampler(base, each, compile_backend=args.compile_backend).pipe
                    for each in (name, f"{name}-{EAGER}")
                ]
                compared += compare(*pair, draws)
            results[name] = {"draws": compared}
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failure": error_text(error)}
    return results


def is_equal(result: dict) -> bool:
    """Whether a row drew the same in all calls, to rounding."""
    return all(each["equal_tokens"] == 1 and each["pixels"] <= TOLERANCE for each in result["draws"])


def report(args: argparse.Namespace, results: dict[str, dict]) -> str:
    """Markdown."""
    # Not the first two of a kind, with and without the choice of the most probable tokens.
    later = [2, 5, 8, 9, 10]
    lines = []
    for name, result in results.items():
        if "failure" in result:
            lines.append((name, "", "", "", "", f"failed: {result['failure'].replace('|', '/')}"))
            continue
        draws, count = result["draws"], len(result["draws"]) // 2
        seconds = [draws[start + index]["seconds"] for start in (0, count) for index in later]
        milliseconds = [f"{1e3 * statistics.median(times):.1f}" for times in zip(*seconds)]
        share, pixels = min(each["equal_tokens"] for each in draws), max(each["pixels"] for each in draws)
        lines.append(
            (
                name,
                len(draws),
                *milliseconds,
                f"{share:.2%}, {pixels:.0e}",
                "equal" if is_equal(result) else "not equal",
            )
        )
    device = torch.device(args.device)
    introduction = (
        f"With and without CUDA graphs: depth {args.depth}, {args.image_size}px, batch {args.batch_size},"
        f" {device_name(device)}, torch {torch.__version__}, {args.dtype}."
    )
    header = ("row", "calls", "median ms", "without graphs", "fewest equal tokens, largest difference of pixels", "")
    return f"{introduction}\n\n{markdown_table(header, lines)}"


def main(args: argparse.Namespace) -> None:
    with without_tf32():
        results = run(args)
    write_text(report(args, results))
    write_results(args, results, torch.device(args.device))
    is_exact = args.dtype == "float32"
    if any("failure" in result or (is_exact and not is_equal(result)) for result in results.values()):
        sys.exit("Not all rows draw the same with CUDA graphs.")


if __name__ == "__main__":
    main(parse_args())
