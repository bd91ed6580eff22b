"""How the benchmarks measure: seconds of a call, seconds by component, memory, and what a failure was."""

import argparse
import contextlib
import ctypes
import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


# A method or function to be timed: its owner, its name, and the component whose work it does.
TimedCall = tuple[Any, str, str]

# Calls on CUDA before anything is timed: pipelines draw eagerly in the first call, capture a CUDA graph in the second,
# and what is compiled may be compiled again for it.
WARM_UP_CALLS = 4


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def write_results(args: argparse.Namespace, results: Any, device: torch.device) -> None:
    """JSON of what was measured and where, for `args.output` if that is a file."""
    if args.output:
        facts = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "device": device_name(device),
            "torch": torch.__version__,
            "rows": results,
        }
        args.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def error_text(error: Exception) -> str:
    """An error in one line: its kind, and the first lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """
    float32 is float32 on CUDA, too, while the context is open: cuDNN's convolutions are in TF32 by default.

    These are torch's older switches. Its compiler still reads them, which raises where a newer one was set.
    """
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before):
            switch.allow_tf32 = allowed


@contextlib.contextmanager
def component_times(calls: list[TimedCall], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in every component, while the context is open; a call inside another counts for the outer one."""
    seconds: dict[str, float] = defaultdict(float)
    running: list[str] = []

    def timed(function: Callable, component: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if running:
                return function(*args, **kwargs)
            synchronize(device)
            running.append(component)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(device)
                seconds[component] += time.perf_counter() - started
                running.pop()

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, component in calls:
            own = name in vars(owner)
            function = getattr(owner, name)
            setattr(owner, name, timed(function, component))
            stack.callback(setattr, owner, name, function) if own else stack.callback(delattr, owner, name)
        yield seconds


def process_memory(field: str) -> float:
    """MiB of this process that are resident: now (`VmRSS`) or at the peak (`VmHWM`)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """
    MiB that a call needs at its peak beside what is there before it: on CUDA what torch allocates, on a CPU the
    resident set (Linux). There, the call is slower than others, as the allocator starts with empty hands.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Give back what the allocator keeps, and let the peak start anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    call()
    return process_memory("VmHWM") - before


@contextlib.contextmanager
def cuda_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """
    MiB beside what is there before, on CUDA: the most that torch allocates while the context is open, `"peak"`, and
    what it has not given back at the end, `"kept"`, such as the memory of CUDA graphs. Nothing on a CPU.
    """
    mebibytes: dict[str, float] = {}
    if device.type != "cuda":
        yield mebibytes
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    yield mebibytes
    torch.cuda.synchronize()
    mebibytes["peak"] = (torch.cuda.max_memory_allocated() - allocated) / 2**20
    gc.collect()
    torch.cuda.empty_cache()
    mebibytes["kept"] = (torch.cuda.memory_reserved() - reserved) / 2**20
