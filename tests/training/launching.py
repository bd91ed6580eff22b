"""Training scripts and other code in processes of their own, which tests may kill, and a small data set for scripts.

The processes are forked from a server that has imported everything, so that they start in a fraction of a second.
"""

import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import DistributedType, PartialState
from PIL import Image
from tqdm import tqdm
from training.tiny_runs import run_script


IMPORTED_BY_SERVER = [
    "datasets",
    "matplotlib.backends.backend_agg",
    "srdd.evaluation.reconstruction",
    "srdd.training.accelerator",
    "srdd.training.adversarial_loss",
    "srdd.training.attention_choice",
    "srdd.training.codebook_upkeep",
    "srdd.training.guided_distillation",
    "srdd.training.light_decoder",
    "srdd.training.publishing",
    "srdd.training.training_run",
]


class Run:
    """
    One start of a training script.

    Args:
        processes (`list[BaseProcess]`): Its processes, by rank.
        output (`Path`): File with all that they print.
    """

    def __init__(self, processes: list[BaseProcess], output: Path):
        self.processes = processes
        self.output = output

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def is_paused(self) -> bool:
        """Whether a run that was started with `pause_at` is there."""
        running = [psutil.Process(process.pid) for process in self.processes if process.is_alive()]
        return any(process.status() == psutil.STATUS_STOPPED for process in running)

    def go_on(self) -> None:
        """Let a run that is paused go on."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGCONT)

    def kill(self) -> bool:
        """Send SIGKILL to all processes, and wait until they are gone. Returns whether one of them died of it."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes of all processes. Once one has failed, the others are killed, as every launcher does."""
        waiting = list(self.processes)
        while waiting and timeout > 0:
            waiting[0].join(0.02)
            timeout -= 0.02
            waiting = [process for process in waiting if process.is_alive()]
            if any(process.exitcode for process in self.processes):
                break
        self.kill()
        return [process.exitcode for process in self.processes]

    def finish(self) -> None:
        """Wait for a run that must succeed."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.output.read_text()}"


def start(
    script: str,
    *arguments: str | Path,
    output: Path,
    num_processes: int = 1,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    pause_at: str | Path | None = None,
) -> Run:
    """
    Start a training script and return at once.

    Args:
        script (`str`): Its name without the ending.
        arguments: Its command line.
        output (`Path`): File that what it prints is added to.
        num_processes (`int`, defaults to 1): More than one talk over gloo.
        environment (`dict[str, str]`, *optional*): Further environment variables.
        largest_file (`int`, *optional*): Bytes after which writing to a file fails, as on a full disk.
        pause_at (`str` or `Path`, *optional*): The end of a path. A process stops itself, once, before it renames
            something to that path or removes that file: what a test does then, no machine is too fast or slow for.

    Returns:
        [`Run`]
    """
    port, processes = free_port(), []
    for rank in range(num_processes):
        variables = dict(environment or {})
        if num_processes > 1:
            variables.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        words = [str(argument) for argument in arguments]
        processes.append(_fork(_run, script, words, variables, output, largest_file, pause_at))
    return Run(processes, output)


def start_server() -> None:
    """Start the server, unless it runs: a test process has one for all that it forks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_BY_SERVER)
    forkserver.ensure_running()


def _fork(target: Callable, *arguments: object) -> BaseProcess:
    start_server()
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _run(
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    output: Path,
    largest_file: int | None,
    pause_at: str | Path | None,
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one between processes would be left behind by those that are killed
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate turns FSDP on where the processes have an accelerator each, and leaves it out without a word where
        # they have none. PyTorch shards over CPU processes as well.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if pause_at is not None:
        sys.addaudithook(_Pause(str(pause_at)))
    run_script(script, *arguments)


class _Pause:
    """An audit hook: stops this process the first time that it is about to rename to a path or to remove it."""

    def __init__(self, end: str):
        self.end = end

    def __call__(self, event: str, arguments: tuple) -> None:
        path = {"os.rename": 1, "os.remove": 0}.get(event)
        if path is not None and self.end and str(arguments[path]).endswith(self.end):
            self.end = ""
            os.kill(os.getpid(), signal.SIGSTOP)


def run_module(name: str, *arguments: str) -> int:
    """`python -m name`, to its end; returns the exit code. What the server has not imported is imported anew."""
    process = _fork(_run_module, name, arguments)
    process.join()
    return process.exitcode


def _run_module(name: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [name, *arguments]
    torch.set_num_threads(1)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


@contextmanager
def other_run(lock: Callable[[Path], object], path: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    """
    Another process, which calls `lock(path)`.

    Over the connection it says "held", or the message of a `ValueError` with which it ends; having said "held" it
    waits for a word, and ends without letting go by itself. It is killed on leaving.
    """
    here, there = multiprocessing.Pipe()
    process = _fork(_hold, lock, path, there)
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


def _hold(lock: Callable[[Path], object], path: Path, connection: Connection) -> None:
    try:
        _kept = lock(path)  # or the lock would be let go
    except ValueError as error:
        connection.send(str(error))
    else:
        connection.send("held")
        connection.recv()


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_image_folder(root: Path, images_per_class: int = 12) -> Path:
    """Two classes of small pictures of different sizes, `root/cold` and `root/warm`."""
    rng = np.random.default_rng(0)
    for name, colour in (("cold", (20, 40, 200)), ("warm", (220, 80, 20))):
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            height, width = rng.integers(16, 24, size=2)
            pixels = np.clip(rng.normal(colour, 20, size=(height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def caption_folders(folder: Path, cold: str, warm: str) -> Path:
    """Texts for the pictures of [`make_image_folder`], one for each class."""
    texts = {"cold": cold, "warm": warm}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    return write_captions(folder, {name: texts[name.partition("/")[0]] for name in names})


def write_captions(folder: Path, texts: dict[str, str]) -> Path:
    """Texts by the names of their pictures, where `datasets` looks for them, too."""
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
