"""Files of official checkpoints: what is in them, and what a file is that is none."""

import json
import os
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from srdd.checks import shown
from srdd.conversion.official_config import Shapes


StateDict = dict[str, torch.Tensor]


# How an index of weights in several files ends.
INDEX = ".safetensors.index.json"


def _kind(path: Path) -> str:
    """What a file is that holds no checkpoint, as far as its first bytes tell."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, in place of which `git lfs pull` puts the file"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if path.name.endswith(INDEX):
        return "an index of files that are missing or cut, or of none"
    if start.isascii() and all(character.isprintable() or character.isspace() for character in start.decode("ascii")):
        return "a text"
    return "an archive of something else, or of code" if zipfile.is_zipfile(path) else "something else, or cut"


def _load(path: Path) -> Any:
    if path.name.endswith(INDEX):
        names = {*json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
        return {key: tensor for name in sorted(names) for key, tensor in load_file(path.with_name(name)).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    # Files of torch versions before 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor holds as many numbers as it shows: not sparse, quantized, packed or repeated."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not (tensor.is_floating_point() and tensor.element_size() == 1)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def read_checkpoint(path: str | os.PathLike, model_names: Sequence[str]) -> tuple[StateDict, str | None]:
    """
    Read the state dict of one model without copying it into memory and without running code from the file.

    Args:
        path (`str` or `os.PathLike`): A state dict (`.pth`, `.safetensors`, or the `.safetensors.index.json` of one in
            several files), or a checkpoint that holds it under one of the names, as such or of an official trainer.
        model_names (`Sequence[str]`): What the model is called in checkpoints.

    Returns:
        `tuple[dict[str, torch.Tensor], str]`: Tensors that are mapped from the file, and the name that they have
        there, if any.

    Raises:
        ValueError: If there is no such file, or it holds anything but a state dict of plain tensors.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise ValueError(f"must be a file, got {shown(path)}")
    path = Path(path)
    places = " or ".join(f"trainer.{name}" for name in model_names)
    rule = f"{path} must hold a state dict, or a training checkpoint with {places}, but it"
    try:
        content = _load(path)
    except Exception as error:  # whatever a pickle, an archive or a header that is none leads torch to
        raise ValueError(f"{rule} is {_kind(path)}") from error
    model_name = None
    if isinstance(content, dict):
        holder = content["trainer"] if isinstance(content.get("trainer"), dict) else content
        model_name = next((name for name in model_names if isinstance(holder.get(name), dict)), None)
        content = holder if model_name is None else holder[model_name]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{rule} holds something else")
    if not all(isinstance(key, str) for key in content):
        raise ValueError(f"{rule} holds tensors without names")
    strange = [key for key, tensor in content.items() if not _is_plain(tensor)]
    if strange:
        raise ValueError(
            f"{path} must hold plain tensors, but these are quantized, sparse or repeated: {shown(strange)}"
        )
    return dict(content), model_name


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    """The shapes in a state dict."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def dtype_of(state: StateDict) -> torch.dtype:
    """The dtype that most floating-point tensors have."""
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return statistics.mode(dtypes) if dtypes else torch.float32
