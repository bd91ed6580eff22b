"""Locks between runs: held by the system for a process, and gone with it however it ends."""

from contextlib import suppress
from pathlib import Path

from diffusers.utils import logging
from filelock import FileLock, SoftFileLock


logger = logging.get_logger(__name__)


def hold_lock(path: str | Path, timeout: float = 0) -> FileLock | None:
    """
    Lock a file that is there for nothing else, and make it if need be.

    Args:
        path (`str` or `Path`): The file, in a folder that can be written.
        timeout (`float`, defaults to 0): Seconds to wait for another process to let go; negative waits for ever.

    Returns:
        `FileLock` or `None`: What holds the lock until [`release_lock`], or the end of the process; `None` with a
        warning where the file system has no locks.

    Raises:
        Timeout: If another process holds it (`filelock.Timeout`).
        OSError: If the file cannot be made.
    """
    with open(path, "ab"):  # what fails from here on is the locking
        pass
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, TimeoutError):
            raise
        logger.warning(
            f"The file system has no locks for {str(path)!r} ({error}): make sure that no other run is here."
        )
        return None
    if isinstance(lock, SoftFileLock):  # a file that would outlive a killed process
        lock.release()
        logger.warning(f"The file system has no locks for {str(path)!r}: make sure that no other run is here.")
        return None
    return lock


def release_lock(lock: FileLock | None, remove: bool = False) -> None:
    """
    Let go of a lock.

    Args:
        lock (`FileLock`, *optional*): What [`hold_lock`] gave.
        remove (`bool`, defaults to `False`): Delete its file, too.
    """
    if lock is None:
        return
    lock.release()
    if remove:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
