#!/usr/bin/env python
"""
What an image costs: our pipeline against VAR's official code, from a label to pixels.

    python benchmarks/speed.py --depth 16 --image_size 256 --batch_size 1 --reference /path/to/VAR

`--reference` is a checkout of github.com/FoundationVision/VAR, which is imported as it is. Its random weights are
converted into ours; before anything is timed, greedy tokens are made sure to be those of the official code. Without a
checkout the reference is VAR's recipe in our modules.

Reference and rows run in turn, round by round, in one process. Prints, as Markdown, medians, and the ratios' median
and range over the rounds; the arithmetic, and its share of what a matrix product reaches on the machine; and, from one
more run of each, where the time goes. `--output` takes JSON.

A row is `causal` (VAR) or `sdd` and what is different about it: `6` and `5` visit so many of ten scales, as distilled
models do; `unguided` has no unconditional half, as a student of the guided distribution; `interval` has none at the
finest two of ten scales; `torch` leaves linear layers to torch; `int8` has torchao's int8 weights in them, all but
`proj_in`'s; `bf16` is all in bfloat16; `light` has a light decoder; `int8vae` has int8 in the decoder's convolutions.
They combine: `sdd-6-unguided-int8-light`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from measuring import device_name, part_times, ratio_text, seconds_of, synchronize
from samplers import (
    GUIDANCE_SCALE,
    PARTS,
    REFERENCE,
    OfficialSampler,
    PipelineSampler,
    RecipeSampler,
    Row,
    Sampler,
    add_model_arguments,
    convert,
    our_pipeline,
    row_of,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from srdd import SRDDPipeline


MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}

# Operators of CPUs that torch does not count: attention, and linear layers and int8 convolutions by oneDNN.
CPU_OPERATORS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.mkldnn._linear_pointwise: lambda states, weight, *_, **__: 2 * math.prod(states) * weight[0],
    torch.ops.onednn.qlinear_pointwise: lambda states, _, __, weight, *___, **____: 2 * math.prod(states) * weight[1],
    torch.ops.onednn.qconv_pointwise: (
        lambda _, __, ___, weight, *____, out_shape, **_____: 2 * math.prod(out_shape) * math.prod(weight[1:])
    ),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="Also the operators that take most of the time.")
    return parser.parse_args(arguments)


def check_equal(pipe: SRDDPipeline, reference: Sampler, labels: torch.LongTensor) -> dict[str, float]:
    """
    Make sure, in float32, that both draw the same tokens and pixels.

    Returns:
        `dict[str, float]`: The largest difference of pixels, and by how much a token of SDD lies behind the official
        code's choice, in logits.

    Raises:
        RuntimeError: If they do not.
    """
    causal = PipelineSampler(pipe, Row("causal"))
    ours, theirs = causal(labels, greedy=True), reference(labels, greedy=True)
    if not torch.equal(causal.token_ids, reference.token_ids):
        share = (causal.token_ids != reference.token_ids).float().mean().item()
        raise RuntimeError(f"{share:.2%} of the causal tokens differ from the reference's: nothing was timed.")
    found = {"pixels": (ours - theirs).abs().max().item()}
    if found["pixels"] > 1e-3:
        raise RuntimeError(f"Pixels differ from the reference's by {found['pixels']:.1e}: nothing was timed.")
    if isinstance(reference, OfficialSampler):
        markov = PipelineSampler(pipe, Row("markov"))
        markov(labels, greedy=True)
        logits = reference.markov_logits(markov.token_ids, labels)
        chosen = logits.gather(-1, markov.token_ids.unsqueeze(-1)).squeeze(-1)
        found["SDD logits"] = (logits.amax(dim=-1) - chosen).max().item()
        if found["SDD logits"] > 1e-4 * logits.std().item():
            raise RuntimeError(f"SDD's tokens lie {found['SDD logits']:.1e} behind the best: nothing was timed.")
    return found


def matrix_product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP per second of a large matrix product."""
    side = MATRIX_SIDES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        best = max(best, 2e-9 * side**3 / (time.perf_counter() - started))
    return best


def operator_shares(call: Callable[[], object], device: torch.device, count: int = 6) -> dict[str, float]:
    """The operators that take most of a call's time, and their shares of it."""
    name = "cuda" if device.type == "cuda" else "cpu"
    with profile(activities=[getattr(ProfilerActivity, name.upper())]) as profiler:
        call()
    field = "self_device_time_total" if name == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, field) for event in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:count]
    return {operator: times[operator] / sum(times.values()) for operator in largest}


def run(args: argparse.Namespace) -> dict:
    """All that is measured."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.reference is None:
        pipe = our_pipeline(args)
        reference = RecipeSampler(pipe)
    else:
        reference = OfficialSampler(args)
        pipe = convert(reference)
    labels = torch.arange(args.batch_size, device=device) % pipe.transformer.config.num_classes
    if isinstance(reference, OfficialSampler):
        reference.dtype = torch.float32
    agreement = check_equal(pipe, reference, labels)
    if isinstance(reference, OfficialSampler):
        reference.dtype = dtype
    if dtype != torch.float32:
        pipe.to(dtype)

    samplers = {REFERENCE: reference, **{name: PipelineSampler(pipe, row_of(name)) for name in args.rows}}
    gigaflops, peaks = {}, [matrix_product_speed(device, dtype)]
    for name, sampler in samplers.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_OPERATORS) as counter:  # warms up as well
            sampler(labels)
        gigaflops[name] = counter.get_total_flops() / 1e9
    seconds = {name: [] for name in samplers}
    for _ in tqdm(range(args.num_rounds)):
        for name, sampler in samplers.items():
            seconds[name].append(seconds_of(partial(sampler, labels), device))
        peaks.append(matrix_product_speed(device, dtype))
    parts, mebibytes = {}, {}
    for name, sampler in samplers.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with part_times(sampler.timed_calls(), device) as spent:
            total = seconds_of(partial(sampler, labels), device)
        parts[name] = {**spent, "other": total - sum(spent.values())}
        if device.type == "cuda":
            mebibytes[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "device": device_name(device),
        "torch": torch.__version__,
        "num_tokens": pipe.transformer.token_slices[-1].stop,
        "agreement": agreement,
        "gflop_per_second_of_matrix_products": max(peaks),
        "gflop": gigaflops,
        "seconds": seconds,
        "seconds_by_part": parts,
        "peak_mebibytes_beyond_weights": mebibytes,
        "operator_shares": {
            name: operator_shares(partial(sampler, labels), device)
            for name, sampler in samplers.items()
            if args.profile
        },
    }


def report(args: argparse.Namespace, found: dict) -> str:
    """Markdown."""
    seconds, peak = found["seconds"], found["gflop_per_second_of_matrix_products"]
    on_cuda = torch.device(args.device).type == "cuda"
    what = "VAR's recipe in our modules" if args.reference is None else "the official VAR code"
    differences = ", ".join(f"{name} to {value:.0e}" for name, value in found["agreement"].items())
    lines = [
        f"Depth {args.depth}, {args.image_size}px ({found['num_tokens']} tokens), batch {args.batch_size}, guidance"
        f" {GUIDANCE_SCALE}, {found['device']}, torch {found['torch']}, {args.dtype}, {args.num_rounds} rounds. The"
        f" reference is {what}; greedy tokens agree ({differences}). A matrix product reaches {peak:.0f} GFLOP/s.",
        "",
        "| row | median s | speed, reference = 1 (min–max) | GFLOP | of the matrix product's speed | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        median, work = statistics.median(times), found["gflop"][name]
        memory = format(found["peak_mebibytes_beyond_weights"][name], ".0f") if on_cuda else ""
        lines.append(
            f"| {name} | {median:.3f} | {ratio_text(seconds[REFERENCE], times)} |"
            f" {work:.0f} | {work / median / peak:.0%} | {memory} |"
        )
    names = (*PARTS, "other")
    lines += ["", f"| seconds by part | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, parts in found["seconds_by_part"].items():
        lines.append(f"| {name} | {' | '.join(f'{parts.get(part, 0.0):.3f}' for part in names)} |")
    if found["operator_shares"]:
        lines += ["", "| row | operators, and their shares of the time |", "|---|---|"]
    for name, shares in found["operator_shares"].items():
        texts = [f"{operator.rpartition('::')[2]} {share:.0%}" for operator, share in shares.items()]
        lines.append(f"| {name} | {', '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    found = run(args)
    sys.stdout.write(report(args, found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
