"""Resumable checkpoints in `output_dir/checkpoint-N`, as diffusers' training examples lay them out."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


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
        ValueError: If a named checkpoint does not exist.
    """
    if not resume_from_checkpoint:
        return None
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if path.is_dir():
            return path
    raise ValueError(
        f"`resume_from_checkpoint` must be 'latest' or one of {[path.name for path in checkpoints]}, got"
        f" {resume_from_checkpoint!r}."
    )


def resume(accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | None) -> int:
    """Load the checkpoint that [`find_checkpoint`] finds, if any, and return its number of optimizer steps, else 0."""
    checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
    if checkpoint is None:
        return 0
    accelerator.load_state(str(checkpoint))
    return checkpoint_step(checkpoint)


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int | None) -> None:
    """
    Write `checkpoint-{step}` under another name first, so that an interrupted write is never taken for a checkpoint,
    then drop the oldest ones beyond `total_limit`. Called on all processes.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{step}")
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(final)
        if total_limit is not None:
            for path in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(path)
        logger.info(f"Saved {final}")
