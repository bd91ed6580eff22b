"""Captions of pictures: a column of a data set, or `metadata.jsonl` files in a folder of pictures."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from srdd.checks import shown
from srdd.data.class_labels import shortened


# Each line is an object with the `file_name` of a picture, from where the file lies, and its texts by their columns.
METADATA_FILE = "metadata.jsonl"


def check_captions(captions: Sequence[Any], name_of: Callable[[int], str]) -> None:
    """
    Make sure that there is a text for each picture.

    Args:
        captions (`Sequence`): What stands there, `None` for nothing.
        name_of (`Callable`): Gives the name of a picture by its index.

    Raises:
        ValueError: If there are pictures without a text; counts them, and names the first.
    """
    problems = [(index, _problem_of(caption)) for index, caption in enumerate(captions)]
    problems = [(index, problem) for index, problem in problems if problem]
    if problems:
        named = [f"{name_of(index)}: {problem}" for index, problem in problems[:4]]
        raise ValueError(
            f"`caption_column` must hold a text for each picture, but {len(problems)} of {len(captions)} have none"
            f" ({shortened(named, 3)})."
        )


def _problem_of(caption: Any) -> str | None:
    """Why something is no caption, if it is none."""
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"{shown(caption)} is no text"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair, as JSON may have them
        return f"{shown(caption)} is not Unicode"
    return None if caption.strip() else "an empty caption"


def check_caption_column(splits: dict[str, datasets.Dataset], caption_column: str) -> None:
    """
    Make sure that a column of a data set has a text for each picture.

    Args:
        splits (`dict[str, datasets.Dataset]`): The splits to be used, by name.
        caption_column (`str`): The column.

    Raises:
        ValueError: If a split has no such column or one of another kind, or there are pictures without a text.
    """
    for name, split in splits.items():
        if caption_column not in split.column_names:
            raise ValueError(
                f"`caption_column` must be one of {split.column_names}, the columns of the {name} split, got"
                f" {caption_column!r}."
            )
        feature = split.features[caption_column]
        if getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
            raise ValueError(f"`caption_column` must hold one text for each picture, got {feature}.")
        check_captions(split[caption_column][:], lambda index, name=name: f"row {index} of the {name} split")


def read_captions(root: Path, paths: Sequence[Path], caption_column: str) -> list[str]:
    """
    The captions of pictures in a folder, of the files `metadata.jsonl` that lie where the pictures lie or above.

    Args:
        root (`Path`): The folder.
        paths (`Sequence[Path]`): The pictures, below `root`.
        caption_column (`str`): The key of the caption in each line.

    Returns:
        `list[str]`: One for each picture.

    Raises:
        ValueError: If a picture has no caption or is named twice, or a line cannot be read or names no file.
    """
    captions: dict[Path, Any] = {}
    folders = {path.parent for path in paths}
    folders |= {above for folder in folders for above in folder.parents if above.is_relative_to(root)}
    for file in sorted(folder / METADATA_FILE for folder in folders if (folder / METADATA_FILE).is_file()):
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            entry = _entry(line)
            name = entry.get("file_name")
            path = file.parent / os.path.normpath(name) if isinstance(name, str) and name else file
            problem = None
            if path == file:
                problem = f'must be an object with the "file_name" of a picture, got {shown(line)}'
            elif path in captions:
                problem = f"names {name!r} a second time"
            elif not path.is_file():
                problem = f"names {name!r}, which is not there"
            if problem:
                raise ValueError(f"Line {number} of {str(file)!r} {problem}.")
            captions[path] = entry.get(caption_column)
    if not captions:
        raise ValueError(
            f"`train_data_dir` must hold a {METADATA_FILE}, with a line"
            f' {{"file_name": "picture.png", "{caption_column}": "what it shows"}} for each picture, got none in'
            f" {str(root)!r}."
        )
    check_captions([captions.get(path) for path in paths], lambda index: paths[index].relative_to(root).as_posix())
    return [captions[path] for path in paths]


def _entry(line: bytes) -> dict:
    """The object of a line, empty if it is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # neither JSON nor UTF-8
        return {}
    return entry if isinstance(entry, dict) else {}
