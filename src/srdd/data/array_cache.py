"""Arrays on disk that are made once, by one process or several, and then mapped."""

import errno
import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import Timeout

from srdd.data.file_locks import hold_lock, release_lock


def cached_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    make: Callable[[], Iterable[tuple[int, np.ndarray]]],
    name: str,
    accelerator: Accelerator | None = None,
) -> np.ndarray:
    """
    Make a file once; later calls map it. With several processes each makes a share; all must call this.

    Args:
        path (`Path`): The file, whose name tells all that its contents depend on.
        shape (`tuple[int, ...]`): Shape of the array.
        dtype (`np.dtype`): What it holds; a structured one has fields.
        make (`Callable`): Gives this process's share: rows that follow each other, and the number of the first.
        name (`str`): What messages call the file.
        accelerator (`Accelerator`, *optional*): The processes to share the work among.

    Returns:
        `np.ndarray`: The whole array, mapped and not to be written to.

    Raises:
        ValueError: If the folder cannot be written, or the file in it is damaged.
        OSError: If there is no room for the file.
    """
    is_main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
    with ExitStack() as stack:
        partial = None
        if is_main:
            _remove_what_killed_runs_left(path)
        if is_main and not path.exists():
            partial = stack.enter_context(_own_partial_file(path, name))
            with _clear_error(path, name):
                np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        if accelerator is not None:  # one decides for all whether there is a file, which other runs make too
            [partial] = broadcast_object_list([partial])
        if partial is not None:
            first_byte = np.load(partial, mmap_mode="r").offset
            bytes_per_row = np.dtype(dtype).itemsize * math.prod(shape[1:])
            for first_row, rows in make():
                # Written, not mapped: a full disk is then an error and not a crash.
                with _clear_error(path, name), open(partial, "r+b") as file:
                    file.seek(first_byte + first_row * bytes_per_row)
                    file.write(rows.astype(dtype).tobytes())
            wait()
    wait()
    return _map(path, shape, dtype, name)


def damaged(path: Path, name: str, how: str) -> ValueError:
    """The error for a file that does not hold what it should."""
    return ValueError(f"The {name} {str(path)!r} is damaged{how}. Delete it, and it is made anew.")


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, name, f" ({error})") from error
    if array.shape != shape:
        raise damaged(path, name, f": it must have the shape {shape}, got {array.shape}")
    return array


@contextmanager
def _own_partial_file(path: Path, name: str) -> Iterator[Path]:
    """
    A name that no other run has for a file that is being made. Whole, it gets the name `path`; other runs may make the
    same one at the same time. A lock beside it tells that its run is alive.
    """
    stem = path.with_name(f"{path.stem}-{uuid.uuid4().hex}")
    partial = stem.with_suffix(".partial")
    with _clear_error(path, name):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(stem.with_suffix(".lock"), timeout=-1)
    try:
        yield partial
        try:
            partial.replace(path)
        except PermissionError:  # on Windows, where another run maps one that is as good
            if not path.exists():
                raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        release_lock(lock, remove=True)


def _remove_what_killed_runs_left(path: Path) -> None:
    """Remove partial files of `path` and their locks, unless a run holds them. Where there are no locks, all stay."""
    partial = {".partial", ".lock"}
    for name in {file.with_suffix("") for file in path.parent.glob(f"{path.stem}*") if file.suffix in partial}:
        try:
            lock = hold_lock(name.with_suffix(".lock"))
        except (Timeout, OSError):  # alive, or in a folder that is only read
            continue
        if lock is not None:
            with suppress(OSError):
                name.with_suffix(".partial").unlink(missing_ok=True)
        release_lock(lock, remove=True)


@contextmanager
def _clear_error(path: Path, name: str) -> Iterator[None]:
    """Say what was to be written where it cannot be."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or error.errno == errno.EROFS:
            raise ValueError(
                f"`cache_dir` must be a folder that can be written, got {str(path.parent)!r} ({error})."
            ) from error
        raise OSError(f"Could not write the {name} {str(path)!r} ({error}). Is the disk full?") from error
