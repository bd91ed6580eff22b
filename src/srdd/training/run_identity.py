"""What makes a run the same run: its data, classes, frozen models and settings, and the files of its checkpoints."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from diffusers.utils import logging

from srdd.data.images import LabelledImages
from srdd.models.saved_weights import weights_hash
from srdd.training.settings import MAY_CHANGE, UNRECORDED, TrainingSettings


logger = logging.get_logger(__name__)

IDENTITY_FILE = "run.json"
DIGEST_FILE = "SHA256SUMS"

# Of so many pictures, spread over all, a fingerprint reads the contents; of the others names and sizes.
NUM_CONTENTS = 1024


def images_fingerprint(split: datasets.Dataset, image_column: str, label_column: str | None) -> str:
    """
    A name for images that changes with their number, order, labels, names or sizes, and with what is in them: up to
    1024 of them, spread over all, are read. It does not depend on where they lie.

    Args:
        split (`datasets.Dataset`): The images.
        image_column (`str`): Their column.
        label_column (`str`, *optional*): Column of the labels or captions, if there are any.
    """
    column, indices = split.data.column(image_column), split._indices
    pictures = pc.struct_field(column, [0])  # bytes, where they are not in files
    sizes = pc.fill_null(pc.binary_length(pictures), -1).to_pylist()
    paths = [path or "" for path in pc.struct_field(column, [1]).to_pylist()]
    places = range(len(paths)) if indices is None else indices.column(0).to_pylist()
    folders = {f"{os.path.dirname(paths[place])}/".replace(os.sep, "/") for place in places}
    root = os.path.commonprefix(sorted(folders)).rpartition("/")[0]
    labels = split.with_format(None)[label_column][:] if label_column is not None else [0] * len(split)
    contents = set(np.linspace(0, len(split) - 1, min(len(split), NUM_CONTENTS), dtype=int).tolist())
    digest = hashlib.sha256()
    for index, (place, label) in enumerate(zip(places, labels, strict=True)):
        path, size = paths[place], sizes[place]
        in_file = size < 0 and os.path.isfile(path)
        size = os.path.getsize(path) if in_file else size
        name = path.replace(os.sep, "/").removeprefix(root)
        digest.update(f"{name}\0{size}\0{label}\n".encode())
        if index in contents and (in_file or size >= 0):
            digest.update(Path(path).read_bytes() if in_file else pictures[place].as_py())
    return digest.hexdigest()


def run_identity(
    settings: TrainingSettings,
    num_processes: int,
    images: LabelledImages | None = None,
    configs: Mapping[str, Mapping] | None = None,
    frozen: Mapping[str, torch.nn.Module] | None = None,
) -> dict:
    """
    What a checkpoint says of the run that it belongs to.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        num_processes (`int`): Processes that train together.
        images ([`LabelledImages`], *optional*): The data.
        configs (`Mapping[str, Mapping]`, *optional*): Configurations of what is trained, or trained on, by name.
        frozen (`Mapping[str, torch.nn.Module]`, *optional*): Models that are used as they are, by name.

    Returns:
        `dict`: Plain JSON values.
    """
    recorded = [field.name for field in fields(settings) if field.name not in UNRECORDED]
    identity = {
        "settings": {name: getattr(settings, name) for name in recorded},
        "num_processes": num_processes,
        "configs": {
            name: {key: value for key, value in config.items() if not key.startswith("_")}
            for name, config in (configs or {}).items()
        },
        "weights": {name: weights_hash(model) for name, model in (frozen or {}).items()},
    }
    if images is not None:
        columns = images.image_column, images.caption_column or images.label_column
        validation = images.validation
        identity["data"] = {
            "classes": [images.id2label[index] for index in sorted(images.id2label)],
            "num_images": len(images.train),
            "images": images_fingerprint(images.train, *columns),
            "validation": None if validation is None else images_fingerprint(validation, *columns),
        }
    return json.loads(json.dumps(identity))


def changed_settings(settings: TrainingSettings, saved: Mapping, current: Mapping) -> dict[str, list]:
    """
    The settings that differ from those of a checkpoint, `{name: [before, now]}`; those that it does not know had their
    defaults.
    """
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    before = {name: saved["settings"].get(name, defaults.get(name)) for name in current["settings"]}
    return {name: [before[name], now] for name, now in current["settings"].items() if before[name] != now}


def check_same_run(settings: TrainingSettings, checkpoint: Path, saved: dict, current: dict) -> dict[str, list]:
    """
    Make sure that a checkpoint is one of this run.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        checkpoint (`Path`): The checkpoint.
        saved (`dict`): Its identity.
        current (`dict`): That of this run, both as [`run_identity`] gives it.

    Returns:
        `dict[str, list]`: What was changed and may be, `{name: [before, now]}`.

    Raises:
        ValueError: If classes, images, models or settings that must stay have changed; names all that did.
    """
    changes = changed_settings(settings, saved, current)
    problems = [f"`{name}` was {old!r}, now {new!r}" for name, (old, new) in changes.items() if name not in MAY_CHANGE]
    if saved["num_processes"] != current["num_processes"]:
        problems.append(f"the number of processes was {saved['num_processes']}, now {current['num_processes']}")
    old, new = saved.get("data"), current.get("data")
    if old and new:
        problems += _changed_data(old, new)
        if old["validation"] != new["validation"]:
            changes["validation images"] = ["those of the checkpoint", "others"]
    for name in saved["configs"].keys() & current["configs"].keys():
        before, now = saved["configs"][name], current["configs"][name]
        different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        different = [
            key for key in different if key not in current["settings"] and key not in ("id2label", "num_classes")
        ]
        problems += [f"{key} of the {name} was {before.get(key)!r}, now {now.get(key)!r}" for key in different]
    for name in saved["weights"].keys() & current["weights"].keys():
        if saved["weights"][name] != current["weights"][name]:
            problems.append(f"the weights of the {name} are others")
    if problems:
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of the same run, got {str(checkpoint)!r}, since which"
            f" something has changed: {'; '.join(problems)}. Go on as before, or start anew in another `output_dir`."
        )
    return changes


def check_checkpoint(
    settings: TrainingSettings, checkpoint: Path, current: dict
) -> tuple[dict[str, list], list[dict]]:
    """
    Make sure that a checkpoint is whole and one of this run.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        checkpoint (`Path`): The checkpoint. One of version 0.1 is compared with nothing, with a warning.
        current (`dict`): The identity of this run, as [`run_identity`] gives it.

    Returns:
        `tuple[dict[str, list], list[dict]]`: What was changed and may be, and the earlier changes.

    Raises:
        ValueError: If a file is missing or damaged, or what must stay has changed.
    """
    saved = read_identity(checkpoint)
    if saved is None:
        logger.warning(
            f"{str(checkpoint)!r} does not say which data, classes and settings it was made with, as those of"
            " version 0.1: nothing is compared. Make sure that they are the same."
        )
        return {}, []
    identity, resumed = saved
    return check_same_run(settings, checkpoint, identity, current), resumed


def describe_changes(resumed: dict) -> str:
    """What was changed when a run was resumed, `{"step": step, "changes": {name: [before, now]}}`, in a sentence."""
    changes = [f"`{name}` {now!r} (before: {before!r})" for name, (before, now) in resumed["changes"].items()]
    return f"Resumed at step {resumed['step']:,} with {', '.join(changes)}."


def _changed_data(old: dict, new: dict) -> list[str]:
    """What differs between two data sets, in words."""
    before, now = old["classes"], new["classes"]
    added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    if added or removed:
        parts = [f"{words} {names}" for words, names in (("without", removed), ("with", added)) if names]
        return [f"the classes are {' and '.join(parts)}, in the order {now}"]
    if before != now:
        return [f"the order of the classes was {before}, now {now}"]
    if old["num_images"] != new["num_images"]:
        return [f"the number of training images was {old['num_images']}, now {new['num_images']}"]
    if old["images"] != new["images"]:
        return ["the training images have other names, labels, captions, sizes or contents"]
    return []


def write_identity(checkpoint: Path, identity: dict, resumed: list[dict]) -> None:
    """
    Complete a checkpoint with what it belongs to, and then with the digests of all its files.

    Args:
        checkpoint (`Path`): Folder with all files of a state.
        identity (`dict`): What [`run_identity`] gave.
        resumed (`list[dict]`): Earlier changes, `{"step": step, "changes": {name: [before, now]}}`.
    """
    text = json.dumps({**identity, "resumed": resumed}, indent=2, sort_keys=True)
    (checkpoint / IDENTITY_FILE).write_text(text + "\n", encoding="utf-8")
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file() and path.name != DIGEST_FILE)
    names.append(names.pop(names.index(IDENTITY_FILE)))  # last: a list without it is cut off
    lines = [f"{_file_digest(checkpoint / name)}  {name}\n" for name in names]
    (checkpoint / DIGEST_FILE).write_text("".join(lines), encoding="utf-8", newline="\n")


def read_identity(checkpoint: Path) -> tuple[dict, list[dict]] | None:
    """
    Check all files of a checkpoint.

    Args:
        checkpoint (`Path`): Its folder.

    Returns:
        `tuple[dict, list[dict]]` or `None`: Its identity and the changes since the run began; `None` for a checkpoint
        of version 0.1, which has none.

    Raises:
        ValueError: If a file is missing or damaged; names it.
    """
    names = [name for name in (IDENTITY_FILE, DIGEST_FILE) if (checkpoint / name).is_file()]
    if not names:
        return None
    digests: dict[str, str] = {}
    if DIGEST_FILE in names:
        lines = (checkpoint / DIGEST_FILE).read_bytes().decode("utf-8", errors="replace").split("\n")
        matches = [re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line) for line in lines[:-1]]
        if not all(matches) or lines[-1] or not matches or matches[-1][2] != IDENTITY_FILE:
            raise _damaged(checkpoint, DIGEST_FILE, "damaged")
        digests = {match[2]: match[1] for match in matches}
    for name in [DIGEST_FILE, *digests]:
        if not (checkpoint / name).is_file():
            raise _damaged(checkpoint, name, "missing")
        if name in digests and _file_digest(checkpoint / name) != digests[name]:
            raise _damaged(checkpoint, name, "damaged")
    identity = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))
    return identity, identity.pop("resumed")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _damaged(checkpoint: Path, name: str, how: str) -> ValueError:
    return ValueError(
        f"`resume_from_checkpoint` must be a whole checkpoint, got {str(checkpoint)!r}, of which the file {name!r} is"
        f" {how}. Delete that checkpoint to go on from an earlier one, if there is any."
    )
