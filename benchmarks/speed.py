#!/usr/bin/env python
"""
What an image costs, from a label to pixels: variants of our pipeline, and VAR's official code.

    python benchmarks/speed.py --depth 16 --image_size 256 --batch_size 1 --reference /path/to/VAR
    python benchmarks/speed.py --table opt_in --model bundled=model_cards/srdd-fruits64 --batch_size 16

`--reference` is a checkout of github.com/FoundationVision/VAR, which is imported as it is. Its random weights are
converted into ours; before anything is timed, greedy tokens are made sure to be those of the official code.

Rows run in turn, round by round, in one process. Prints, as Markdown, medians, and the ratios' median and range over
the rounds, the first row being 1; the arithmetic, and its share of what a matrix product reaches on the machine; and,
from one more run of each, where the time goes. `--output` takes JSON. Memory is what `growth.py` measures.

A row names a variant (`srdd.evaluation.pipeline_variants`): `causal` (VAR) or `sdd` and what is different about it.
`6` and `5` visit so many of ten scales, as distilled models do; `unguided` has no unconditional half, as a student of
the guided distribution; `interval` has none at the finest two of ten scales; `torch` leaves linear layers to torch;
`int8` has torchao's int8 weights in them, all but `proj_in`'s; `bf16` is all in bfloat16; `int8vae` has int8 in the
decoder's convolutions; `light` has a light decoder. They combine: `sdd-6-unguided-int8-light`. With `--table` rows are
those of an ablation, so that what a setting costs stands next to what it is worth.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from measuring import component_times, device_name, seconds_of, synchronize
from official_var import OfficialSampler, convert
from samplers import COMPONENTS, REFERENCE, PipelineSampler, add_model_arguments, random_pipeline, row_sampler
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from srdd import ScaleScheduler, SRDDPipeline
from srdd.console import write_text
from srdd.evaluation.ablations import load_pipelines, read_tables
from srdd.evaluation.tables import markdown_table, speed_ratio


Sampler = PipelineSampler | OfficialSampler

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
    parser.add_argument("--config", default="benchmarks/ablations.json", help="JSON file of the ablations.")
    parser.add_argument("--table", help="Time the rows of this table of the ablations instead.")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="Of the table; repeat it.")
    parser.add_argument("--profile", action="store_true", help="Also the operators that take most of the time.")
    return parser.parse_args(arguments)


def check_equal(pipe: SRDDPipeline, official: OfficialSampler, labels: torch.LongTensor) -> dict[str, float]:
    """
    Make sure, in float32, that both draw the same tokens and pixels.

    Returns:
        `dict[str, float]`: The largest difference of pixels, and by how much a token of SDD lies behind the official
        code's choice, in logits.

    Raises:
        RuntimeError: If they do not.
    """
    scheduler = ScaleScheduler.from_config(pipe.scheduler.config, top_k=1, top_p=1.0)
    greedy = SRDDPipeline(**{**pipe.components, "scheduler": scheduler})
    causal, sdd = (row_sampler(greedy, name) for name in ("causal", "sdd"))
    pixels, expected = causal(labels), official(labels, greedy=True)
    if not torch.equal(causal.token_ids, official.token_ids):
        share = (causal.token_ids != official.token_ids).float().mean().item()
        raise RuntimeError(f"{share:.2%} of the causal tokens differ from the reference's: nothing was timed.")
    difference = (pixels - expected).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"Pixels differ from the reference's by {difference:.1e}: nothing was timed.")
    sdd(labels)
    logits = official.markov_logits(sdd.token_ids, labels)
    chosen = logits.gather(-1, sdd.token_ids.unsqueeze(-1)).squeeze(-1)
    behind = (logits.amax(dim=-1) - chosen).max().item()
    if behind > 1e-4 * logits.std().item():
        raise RuntimeError(f"SDD's tokens lie {behind:.1e} behind the best: nothing was timed.")
    return {"pixels": difference, "SDD logits": behind}


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


def make_samplers(args: argparse.Namespace) -> tuple[dict[str, Sampler], dict[str, float]]:
    """What is timed, by row, and how well it agrees with the official code where that is among it."""
    if args.table is not None:
        [table] = read_tables(args.config, [args.table])
        pipelines = load_pipelines(args.model, [table], args.device)
        return {
            row.name: PipelineSampler(row.changes.pipeline(pipelines[row.model]), row.changes.guidance_scale)
            for row in table.rows
        }, {}
    if args.reference is None:
        pipe = random_pipeline(args)
        return {name: row_sampler(pipe, name) for name in args.rows}, {}
    official = OfficialSampler(args)
    official.dtype = torch.float32  # until it was compared
    pipe = convert(official)
    agreement = check_equal(pipe, official, torch.arange(args.batch_size, device=args.device) % 1000)
    if args.dtype != "float32":
        official.dtype = getattr(torch, args.dtype)
        pipe.to(official.dtype)
    return {REFERENCE: official, **{name: row_sampler(pipe, name) for name in args.rows}}, agreement


def run(args: argparse.Namespace) -> dict:
    """All that is measured."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    samplers, agreement = make_samplers(args)
    labels = torch.arange(args.batch_size, device=device) % min(each.num_classes for each in samplers.values())
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
    components, operators = {}, {}
    for name, sampler in samplers.items():
        with component_times(sampler.timed_calls(), device) as spent:
            total = seconds_of(partial(sampler, labels), device)
        components[name] = {**spent, "other": total - sum(spent.values())}
        if args.profile:
            operators[name] = operator_shares(partial(sampler, labels), device)
    return {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "device": device_name(device),
        "torch": torch.__version__,
        "num_tokens": {name: sampler.token_ids.shape[1] for name, sampler in samplers.items()},
        "agreement": agreement,
        "gflop_per_second_of_matrix_products": max(peaks),
        "gflop": gigaflops,
        "seconds": seconds,
        "seconds_by_component": components,
        "operator_shares": operators,
    }


def report(args: argparse.Namespace, results: dict) -> str:
    """Markdown."""
    seconds, peak = results["seconds"], results["gflop_per_second_of_matrix_products"]
    model = f"Depth {args.depth}, {args.image_size}px" if args.table is None else f"Table {args.table}"
    first = next(iter(seconds))
    agreement = ", ".join(f"{name} to {value:.0e}" for name, value in results["agreement"].items())
    lines = []
    for name, times in seconds.items():
        median, work = statistics.median(times), results["gflop"][name]
        speed = speed_ratio(seconds[first], times)
        share = f"{work / median / peak:.0%}"
        lines.append((name, results["num_tokens"][name], f"{median:.3f}", speed, f"{work:.0f}", share))
    header = ("row", "tokens", "median s", f"speed, {first} = 1 (min–max)", "GFLOP", "of the matrix product's speed")
    names = (*COMPONENTS, "other")
    spent = [
        (row, *(f"{seconds_of_row.get(name, 0.0):.3f}" for name in names))
        for row, seconds_of_row in results["seconds_by_component"].items()
    ]
    tables = [markdown_table(header, lines), markdown_table(("seconds by component", *names), spent)]
    if results["operator_shares"]:
        shares = [
            (row, ", ".join(f"{operator.rpartition('::')[2]} {share:.0%}" for operator, share in of_row.items()))
            for row, of_row in results["operator_shares"].items()
        ]
        tables.append(markdown_table(("row", "operators, and their shares of the time"), shares))
    introduction = (
        f"{model}, batch {args.batch_size}, {results['device']}, torch {results['torch']}, {args.dtype},"
        f" {args.num_rounds} rounds. A matrix product reaches {peak:.0f} GFLOP/s."
    )
    if agreement:
        introduction += f" The reference is the official VAR code; greedy tokens agree ({agreement})."
    return "\n".join([introduction + "\n", *tables])


def main(args: argparse.Namespace) -> None:
    results = run(args)
    write_text(report(args, results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
