"""Resumable checkpoints in `output_dir/checkpoint-N`, as diffusers' training examples lay them out.

A checkpoint is written under another name and renamed when it is whole, and renamed away before it is deleted: a
folder called `checkpoint-N` is complete, whenever the process was killed.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import load
from diffusers.utils import logging

from srdd.training.accelerator import on_main_process
from srdd.training.optimizer import place_step_counts
from srdd.training.run_identity import read_identity, write_identity


logger = logging.get_logger(__name__)

# What file systems answer that cannot flush a file or a folder.
NOT_OFFERED = {errno.EBADF, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    return sorted(_numbered(output_dir, "checkpoint"), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps in a checkpoint's name."""
    return int(path.name.split("-")[1])


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to start from.

    Args:
        output_dir (`str` or `Path`): Folder of the training run.
        resume_from_checkpoint (`str`, *optional*): `"latest"`, or the name or path of a checkpoint.

    Returns:
        `Path` or `None`: `None` to start anew, also for `"latest"` in a folder without checkpoints.

    Raises:
        ValueError: If a named checkpoint does not exist, or the folder holds later ones, which the run would meet.
    """
    checkpoints = list_checkpoints(output_dir)
    start = None
    if resume_from_checkpoint == "latest":
        start = checkpoints[-1] if checkpoints else None
    elif resume_from_checkpoint:
        candidates = (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint))
        start = next((path for path in candidates if path.is_dir()), None)
        if start is None or not re.fullmatch(r"checkpoint-\d+", start.name):
            raise ValueError(
                f"`resume_from_checkpoint` must be 'latest' or one of {[path.name for path in checkpoints]}, got"
                f" {resume_from_checkpoint!r}."
            )
    first_step = checkpoint_step(start) if start else 0
    later = [path.name for path in checkpoints if checkpoint_step(path) > first_step]
    if later:
        raise ValueError(
            f"`output_dir` must hold no later checkpoints than the one to start from ({first_step}), got {later} in"
            f" {str(output_dir)!r}. Go on with `--resume_from_checkpoint latest`, remove them, or use another folder."
        )
    return start


def resume(
    accelerator: Accelerator,
    output_dir: str | Path,
    resume_from_checkpoint: str | None,
    check: Callable[[Path], Any] = read_identity,
) -> int:
    """
    Load the checkpoint that [`find_checkpoint`] finds, if any. Called on all processes.

    The optimizers keep what they were made with: learning rates, decays and the like are those of the settings.

    Args:
        accelerator (`Accelerator`): With everything prepared and registered.
        output_dir (`str` or `Path`): Folder of the training run.
        resume_from_checkpoint (`str`, *optional*): `"latest"`, or the name or path of a checkpoint.
        check (`Callable`): Called with the checkpoint, on the main process, before anything is loaded; by default its
            files are compared with their digests.

    Returns:
        `int`: Number of optimizer steps of the checkpoint, else 0.

    Raises:
        ValueError: If there is no such checkpoint, or it is damaged or not of this run. There is no silent step back
            to an earlier one.
    """
    checkpoint = on_main_process(accelerator, lambda: find_checkpoint(output_dir, resume_from_checkpoint))
    if checkpoint is None:
        return 0
    on_main_process(accelerator, lambda: check(checkpoint))
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    own_options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        # accelerate goes on without the random state where it cannot read it.
        load(checkpoint / f"random_states_{accelerator.process_index}.pkl")
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # torch, pickle and safetensors report what they cannot read in many ways
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of this model, got {str(checkpoint)!r}, which cannot be"
            f" loaded ({type(error).__name__}: {str(error).strip() or 'a file is empty'})."
        ) from error
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    for group, options in zip(groups, own_options, strict=True):
        group.update(options)
    for optimizer in accelerator._optimizers:
        place_step_counts(optimizer)
    return checkpoint_step(checkpoint)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int | None,
    identity: dict | None = None,
    resumed: list[dict] | None = None,
) -> None:
    """
    Write `checkpoint-{step}`, then drop the oldest ones beyond `total_limit`. Called on all processes.

    Args:
        accelerator (`Accelerator`): With everything prepared and registered.
        output_dir (`str` or `Path`): Folder of the training run.
        step (`int`): Number of optimizer steps.
        total_limit (`int`, *optional*): How many checkpoints are kept; all by default.
        identity (`dict`, *optional*): What the run is, as [`run_identity`] gives it.
        resumed (`list[dict]`, *optional*): What was changed when it was resumed.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. Earlier checkpoints are untouched.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{step}")
    if accelerator.is_main_process:
        remove_partial_checkpoints(output_dir)
    accelerator.wait_for_everyone()
    with _clear_error(final, partial):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # while they are written, files have other names
    with _clear_error(final, partial):
        if accelerator.is_main_process:
            write_identity(partial, identity or {}, resumed or [])
    accelerator.wait_for_everyone()
    with _clear_error(final, partial):
        for path in partial.iterdir():
            _flush(path)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(final)
        _flush(final.parent)
        if total_limit is not None:
            for path in list_checkpoints(output_dir)[:-total_limit]:
                path.rename(path.with_name(f"partial-{checkpoint_step(path)}"))
            remove_partial_checkpoints(output_dir)
        logger.info(f"Saved {final}")


def remove_partial_checkpoints(output_dir: str | Path) -> None:
    """Delete what interrupted runs left of checkpoints half written or half deleted."""
    for path in _numbered(output_dir, "partial"):
        shutil.rmtree(path)


def _numbered(folder: str | Path, name: str) -> list[Path]:
    """Folders called `name-N`: all else that lies around is none of ours."""
    paths = Path(folder).glob(f"{name}-*")
    return [path for path in paths if re.fullmatch(rf"{name}-\d+", path.name) and path.is_dir()]


@contextmanager
def _clear_error(final: Path, partial: Path) -> Iterator[None]:
    """Where a checkpoint cannot be written, remove what there is of it and say which one is left."""
    try:
        yield
    except Exception as error:  # torch and safetensors report a full disk in several ways
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in list_checkpoints(final.parent)]
        last = f"the last good one is {kept[-1]!r}" if kept else "there is no earlier one"
        raise OSError(f"Could not write {str(final)!r} ({error}); {last}. Is the disk full?") from error


def _flush(path: Path) -> None:
    """
    Wait until a file or folder is on the disk, so that a renamed checkpoint is whole after a power cut too.

    Where the system has no way to do that, it is left out: Windows flushes no folders, and files only if they are open
    for writing; some network drives flush neither.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    with _ignore_unsupported():
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _ignore_unsupported() -> Iterator[None]:
    """Leave out what the file system does not offer; a full or broken disk is still an error."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
