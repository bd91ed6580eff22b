"""Folders that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_free(folder: Path) -> bool:
    """Whether a folder may be written: it does not exist, or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write what shall be `folder`, which must be free; there is nothing in `folder` until it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        unfinished = Path(beside) / folder.name
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        os.replace(unfinished, folder)
