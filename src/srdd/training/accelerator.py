"""The `Accelerator` of a training run."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets
import diffusers
import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)
from tqdm import tqdm

from srdd.training.output_lock import lock_output_dir
from srdd.training.settings import TrainingSettings


Result = TypeVar("Result")


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """
    An `Accelerator` set up from the settings of a run, with its tracker started and its output folder locked.

    Raises:
        ValueError: If several processes were launched that do not know of each other, or the output folder cannot be
            written or is another run's.
    """
    output_dir = Path(settings.output_dir)
    report_to = None if settings.report_to == "none" else settings.report_to
    accelerator = Accelerator(
        # A step may take batches of two epochs; by default accelerate ends it with the epoch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=settings.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / settings.logging_dir)),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed, non_blocking=torch.cuda.is_available()
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    check_processes(accelerator)
    use_all_cores(accelerator.device)
    on_main_process(accelerator, lambda: lock_output_dir(output_dir))
    if accelerator.is_main_process:
        if report_to is not None:
            config = {key: value for key, value in vars(settings).items() if isinstance(value, (int, float, str))}
            config.pop("hub_token", None)
            accelerator.init_trackers(output_dir.name or "srdd", config=config)
    if not accelerator.is_local_main_process:
        diffusers.utils.logging.set_verbosity_error()
        logging.getLogger("srdd").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
    return accelerator


def check_processes(accelerator: Accelerator) -> None:
    """
    Make sure that the processes that were launched work together.

    Raises:
        ValueError: If several processes were launched that do not know of each other.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"`WORLD_SIZE` must be the number of processes that work together, {accelerator.num_processes}, got"
            f" {launched}. Without GPUs, set ACCELERATE_USE_CPU=true."
        )


def use_all_cores(device: torch.device) -> None:
    """
    Work on all cores of a CPU where `accelerate launch` allotted a single thread, as it does unless it was told
    `--cpu` or a number of threads. One that was set to 1 on purpose looks the same; with `--cpu` it is kept.
    """
    was_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if device.type != "cpu" or not was_launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(cores)
    tqdm.write(
        f"Threads: {cores}, one a core (`accelerate launch` without `--cpu` allots one alone).", file=sys.stderr
    )


def on_main_process(state: Accelerator | PartialState, function: Callable[[], Result]) -> Result:
    """
    Call a function on the main process alone. All processes must call this.

    Args:
        state (`Accelerator` or `PartialState`): The processes.
        function (`Callable`): Without arguments; what it returns must be fit for pickling.

    Returns:
        What it returned, on all processes.

    Raises:
        ValueError: If it raised one, on all processes, so that none waits for another.
    """
    result, error = None, None
    if state.is_main_process:
        try:
            result = function()
        except ValueError as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result
