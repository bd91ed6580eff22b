#!/usr/bin/env python
"""
What an image costs, from a label to pixels: variants of our pipeline, and VAR's official code.

    python benchmarks/speed.py --depth 16 --image_size 256 --batch_size 1 --reference /path/to/VAR
    python benchmarks/speed.py --table schedules --model bundled=model_cards/srdd-fruits64 --batch_size 16
    python benchmarks/speed.py --device cuda --dtype bfloat16 --depth 16 30 --batch_size 1 8 64 --profile \
        --rows causal sdd-eager sdd sdd-6 sdd-compiled sdd-6-compiled --output speed.json

`--reference` is a checkout of github.com/FoundationVision/VAR, which is imported as it is. Its random weights are
converted into ours; before anything is timed, greedy tokens are made sure to be those of the official code.

Both are compared in float32, without TF32. On CUDA so are draws with and without CUDA graphs (`graph_check.py`).

Rows run in turn, round by round, in one process. Prints, as Markdown, medians, and the ratios' median and range over
the rounds, the first row being 1; the arithmetic, and its share of what a matrix product reaches on the machine; and,
from one more run of each, where the time goes: of a run without CUDA graphs, as a component cannot be timed within
one. `--output` takes JSON. Memory on a CPU is what `growth.py` measures. On CUDA it is what torch allocates at the
peak of the calls before the clock starts, in which graphs are captured, and what it keeps after them beside what it
kept before: graphs of all rows share their memory.

Several depths and batch sizes are measured one after the other, and reported as they are. A row that fails, for want
of memory or because it does not compile, is reported as failed, and the others go on.

A row names a variant (`srdd.evaluation.pipeline_variants`): `causal` (VAR) or `sdd` and what is different about it.
`6` and `5` visit so many of ten scales, as distilled models do; `unguided` has no unconditional half, as a student of
the guided distribution; `interval` has none at the finest two of ten scales; `torch` leaves linear layers to torch;
`int8` has torchao's int8 weights in them, all but `proj_in`'s; `bf16` is all in bfloat16; `int8vae` has int8 in the
decoder's convolutions; `light` has a light decoder; `eager` has no CUDA graphs, which are on by default; `fused`
makes queries, keys and values by one matrix product; `compiled` has compiled blocks and a compiled decoder, within the
graph. They combine: `sdd-6-unguided-int8-light`. With `--table` rows are those of an ablation, so that what a setting
costs stands next to what it is worth.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from graph_check import check_graphs, draws_in_a_row
from measuring import (
    WARM_UP_CALLS,
    component_times,
    cuda_memory,
    device_name,
    error_text,
    seconds_of,
    synchronize,
    without_tf32,
)
from official_var import OfficialSampler, convert
from samplers import COMPONENTS, EAGER, REFERENCE, PipelineSampler, add_model_arguments, random_pipeline, row_sampler
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from srdd import ScaleScheduler, SRDDPipeline, __version__
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
    parser.add_argument(
        "--depth", type=int, nargs="+", default=[16], help="Width is 64 times this, 64 per head, as in VAR."
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--config", default="benchmarks/bundled.json", help="JSON file of the tables.")
    parser.add_argument("--table", help="Time the rows of this table of `--config` instead.")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="Of the table; repeat it.")
    parser.add_argument("--profile", action="store_true", help="Also the operators or kernels of a draw.")
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
    causal, sdd = (row_sampler(greedy, f"{name}-{EAGER}") for name in ("causal", "sdd"))
    with without_tf32():
        pixels, expected = causal(labels), official(labels, greedy=True)
    if not torch.equal(causal.token_ids, official.token_ids):
        share = (causal.token_ids != official.token_ids).float().mean().item()
        raise RuntimeError(f"{share:.2%} of the causal tokens differ from the reference's: nothing was timed.")
    difference = (pixels - expected).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"Pixels differ from the reference's by {difference:.1e}: nothing was timed.")
    with without_tf32():
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


def operator_times(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """How often a call runs every operator, on CUDA every kernel and copy, and their seconds on the device."""
    name = "cuda" if device.type == "cuda" else "cpu"
    with profile(activities=[getattr(ProfilerActivity, name.upper())]) as profiler:
        call()
        synchronize(device)
    field = "self_device_time_total" if name == "cuda" else "self_cpu_time_total"
    events = [(event.key, event.count, getattr(event, field) * 1e-6) for event in profiler.key_averages()]
    return {key: (count, seconds) for key, count, seconds in events if seconds > 0}


def largest_shares(times: dict[str, tuple[int, float]]) -> dict[str, float]:
    """The six operators that take most of a call's time, and their shares of it."""
    seconds = {operator: spent for operator, (_, spent) in times.items()}
    largest = sorted(seconds, key=seconds.get, reverse=True)[:6]
    return {operator: seconds[operator] / sum(seconds.values()) for operator in largest}


class Rows:
    """
    What is done row by row. A row that fails is left out from then on.

    Args:
        items (`dict[str, Any]`): What stands for the rows.
        failures (`dict[str, str]`): Of rows that have failed before.
    """

    def __init__(self, items: dict[str, Any], failures: dict[str, str] = MappingProxyType({})):
        self.items, self.failures = dict(items), dict(failures)

    def each(self, call: Callable[[Any], Any]) -> dict[str, Any]:
        """What a call returns of every row that has not failed, in turn."""
        returned = {}
        for name, item in [*self.items.items()]:
            try:
                returned[name] = call(item)
                continue
            except Exception as error:
                traceback.print_exc()
                self.failures[name] = error_text(error)
            del self.items[name], item
            gc.collect()  # out here nothing of the failed call is held any more
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return returned


def agreement_of(pipe: SRDDPipeline, official: OfficialSampler | None, batch_size: int) -> dict[str, float]:
    """
    How well a pipeline in float32 agrees with the official code, and on CUDA with itself without CUDA graphs.

    Raises:
        RuntimeError: If it does not.
    """
    agreement, device = {}, pipe.transformer.device
    if official is not None:
        labels = torch.arange(batch_size, device=device) % official.num_classes
        agreement.update(check_equal(pipe, official, labels))
    if device.type == "cuda":
        agreement["pixels with CUDA graphs"] = check_graphs(pipe, draws_in_a_row(min(batch_size, 8))[:3])
    return agreement


def make_samplers(args: argparse.Namespace, depth: int | None) -> tuple[Rows, dict[int, dict[str, float] | str]]:
    """What is timed at a depth, and by batch size how well it agrees with what it should, or why it does not."""
    if args.table is not None:
        [table] = read_tables(args.config, [args.table])
        pipelines = load_pipelines(args.model, [table], args.device)
        samplers = {
            row.name: PipelineSampler(row.changes.pipeline(pipelines[row.model]), row.changes.guidance_scale)
            for row in table.rows
        }
        return Rows(samplers), {batch_size: {} for batch_size in args.batch_size}
    model = argparse.Namespace(**{**vars(args), "depth": depth, "dtype": "float32"})  # until it was compared
    official = None if args.reference is None else OfficialSampler(model)
    pipe = random_pipeline(model) if official is None else convert(official)
    agreements = {}
    for batch_size in args.batch_size:
        try:
            agreements[batch_size] = agreement_of(pipe, official, batch_size)
        except RuntimeError as error:
            traceback.print_exc()
            agreements[batch_size] = error_text(error)
    dtype = getattr(torch, args.dtype)
    if dtype != torch.float32:
        pipe.to(dtype)
    rows = Rows({name: name for name in args.rows})
    samplers = rows.each(lambda name: row_sampler(pipe, name, compile_backend=args.compile_backend))
    if official is not None:
        official.dtype = dtype
        samplers = {REFERENCE: official, **samplers}
    return Rows(samplers, rows.failures), agreements


def measure(args: argparse.Namespace, rows: Rows, batch_size: int) -> dict:
    """All that is measured with a batch size."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    labels = torch.arange(batch_size, device=device) % min(each.num_classes for each in rows.items.values())
    peaks = [matrix_product_speed(device, dtype)]

    def count(sampler: Sampler) -> float:
        # The first call, which no CUDA graph serves. No compiler works while operators are counted.
        with FlopCounterMode(display=False, custom_mapping=CPU_OPERATORS) as counter:
            (sampler.uncompiled or sampler)(labels)
        return counter.get_total_flops() / 1e9

    def warm_up(sampler: Sampler) -> tuple[dict[str, float], float]:
        is_ready = device.type == "cpu" and sampler.uncompiled is None  # counting has warmed up
        started = time.perf_counter()
        with cuda_memory(device) as mebibytes:
            for _ in range(0 if is_ready else WARM_UP_CALLS):
                sampler(labels)
        return mebibytes, time.perf_counter() - started

    def time_components(sampler: Sampler) -> dict[str, float]:
        call = partial(sampler.without_graphs(), labels)
        with component_times(sampler.timed_calls(), device) as spent:
            total = seconds_of(call, device)
        return {**spent, "other": total - sum(spent.values())}

    gigaflops, ready = rows.each(count), rows.each(warm_up)
    seconds = {name: [] for name in rows.items}
    for _ in tqdm(range(args.num_rounds)):
        for name, spent in rows.each(lambda sampler: seconds_of(partial(sampler, labels), device)).items():
            seconds[name].append(spent)
        peaks.append(matrix_product_speed(device, dtype))
    where = Rows(rows.items)  # times that were taken stay, whatever fails from here on
    operators = where.each(lambda sampler: operator_times(partial(sampler, labels), device)) if args.profile else {}
    components = where.each(time_components)
    rows.failures.update({f"{name}, where the time goes": text for name, text in where.failures.items()})
    return {
        "num_tokens": {name: sampler.token_ids.shape[1] for name, sampler in rows.items.items()},
        "gflop_per_second_of_matrix_products": max(peaks),
        "gflop": gigaflops,
        "seconds": {name: seconds[name] for name in rows.items},
        "seconds_by_component": components,
        "num_operators": {name: sum(count for count, _ in times.values()) for name, times in operators.items()},
        "operator_seconds": {name: sum(spent for _, spent in times.values()) for name, times in operators.items()},
        "operator_shares": {name: largest_shares(times) for name, times in operators.items()},
        "mebibytes": {name: mebibytes for name, (mebibytes, _) in ready.items()},
        "warm_up_seconds": {name: spent for name, (_, spent) in ready.items()},
        "failures": rows.failures,
    }


def introduction(args: argparse.Namespace, results: dict, setting: dict) -> str:
    model = f"Table {args.table}" if args.table is not None else f"Depth {setting['depth']}, {args.image_size}px"
    return (
        f"{model}, batch {setting['batch_size']}, {results['device']}, torch {results['torch']}, srdd"
        f" {results['srdd']}, {results['date']}, {args.dtype}, {args.num_rounds} rounds."
    )


def report(args: argparse.Namespace, results: dict, setting: dict) -> str:
    """Markdown."""
    about = introduction(args, results, setting)
    if "failure" in setting:
        return f"{about} Nothing was timed: {setting['failure']}\n"
    seconds, peak = setting["seconds"], setting["gflop_per_second_of_matrix_products"]
    about += f" A matrix product reaches {peak:.0f} GFLOP/s."
    agreement = ", ".join(f"{name} to {value:.0e}" for name, value in setting["agreement"].items())
    if agreement:
        reference = "" if args.reference is None else " The reference is the official VAR code."
        about += f"{reference} In float32 greedy tokens agree ({agreement})."
    on_cuda = torch.device(args.device).type == "cuda"
    unit, factor, digits = ("ms", 1e3, 2) if on_cuda else ("s", 1, 3)
    memory = ("peak MiB beside what was there", "more MiB kept", "s before the clock") if on_cuda else ()
    lines, first = [], next(iter(seconds), "")
    for name, times in seconds.items():
        median, work = statistics.median(times), setting["gflop"][name]
        speed = speed_ratio(seconds[first], times)
        share = f"{work / median / peak:.0%}"
        line = [name, setting["num_tokens"][name], f"{factor * median:.{digits}f}", speed, f"{work:.0f}", share]
        if on_cuda:
            mebibytes = setting["mebibytes"][name]
            line += [
                f"{mebibytes['peak']:,.0f}",
                f"{mebibytes['kept']:,.0f}",
                f"{setting['warm_up_seconds'][name]:.1f}",
            ]
        lines.append(line)
    header = (
        "row",
        "tokens",
        f"median {unit}",
        f"speed, {first} = 1 (min–max)",
        "GFLOP",
        "of the matrix product's speed",
    )
    lines += [
        (name, "", f"failed: {text.replace('|', '/')}", *[""] * (len(header) + len(memory) - 3))
        for name, text in setting["failures"].items()
    ]
    names = (*COMPONENTS, "other")
    spent = [
        (row, *(f"{factor * seconds_of_row.get(name, 0.0):.{digits}f}" for name in names))
        for row, seconds_of_row in setting["seconds_by_component"].items()
    ]
    parts = f"{unit} by component, without CUDA graphs" if on_cuda else "seconds by component"
    tables = [markdown_table((*header, *memory), lines), markdown_table((parts, *names), spent)]
    if setting["operator_shares"]:
        kind = "kernels and copies" if on_cuda else "operators"
        shares = [
            (
                row,
                setting["num_operators"][row],
                f"{1e3 * setting['operator_seconds'][row]:.2f}",
                ", ".join(f"{name.rpartition('::')[2][:80]} {share:.0%}" for name, share in of_row.items()),
            )
            for row, of_row in setting["operator_shares"].items()
        ]
        tables.append(markdown_table(("row", kind, "their ms", "the largest, and their shares"), shares))
    return "\n".join([about + "\n", *tables])


def settings_of(args: argparse.Namespace, depth: int | None) -> Iterator[dict]:
    """What is measured at a depth, batch size by batch size, or why nothing was."""
    try:
        made, agreements = make_samplers(args, depth)
    except RuntimeError as error:  # no memory for the models
        traceback.print_exc()
        made, agreements = Rows({}), dict.fromkeys(args.batch_size, error_text(error))
    for batch_size, agreement in agreements.items():
        setting = {"depth": depth, "image_size": args.image_size, "batch_size": batch_size}
        if isinstance(agreement, str):
            yield {**setting, "failure": agreement}
        elif not made.items:
            yield {**setting, "failure": "; ".join(f"{name}: {text}" for name, text in made.failures.items())}
        else:
            yield {**setting, "agreement": agreement, **measure(args, Rows(made.items, made.failures), batch_size)}


def main(args: argparse.Namespace) -> None:
    results = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        "srdd": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": [],
    }
    for depth in args.depth if args.table is None else [None]:
        for setting in settings_of(args, depth):
            results["settings"].append(setting)
            write_text(report(args, results, setting) + "\n")
            sys.stdout.flush()
            if args.output:
                args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        gc.collect()
    if any(not setting.get("seconds") for setting in results["settings"]):
        sys.exit("Not everything could be timed.")


if __name__ == "__main__":
    main(parse_args())
