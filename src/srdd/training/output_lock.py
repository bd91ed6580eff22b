"""One run in a folder at a time."""

from pathlib import Path

from filelock import FileLock, Timeout

from srdd.data.file_locks import hold_lock, release_lock


LOCK_FILE = ".training.lock"

# The folders that runs of this process have to themselves.
_locks: dict[Path, FileLock | None] = {}


def lock_output_dir(output_dir: str | Path) -> None:
    """
    Make the folder of a run and keep other runs out of it, until [`unlock_output_dirs`] or the end of this process,
    however it ends. Runs of this process may follow each other.

    Args:
        output_dir (`str` or `Path`): Folder of the run.

    Raises:
        ValueError: If another run is in the folder, or it cannot be written.
    """
    folder = Path(output_dir).resolve()
    if folder in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _locks[folder] = hold_lock(folder / LOCK_FILE)
    except Timeout:
        raise ValueError(
            f"`output_dir` must be a folder in which no other run trains, got {str(output_dir)!r}, where one does."
            " Wait for its end or stop it and go on with `--resume_from_checkpoint latest`, or choose another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written, got {str(output_dir)!r} ({error})."
        ) from error


def unlock_output_dirs() -> None:
    """Let other runs into the folders of this process's."""
    while _locks:
        release_lock(_locks.popitem()[1])
