"""Whether two training runs left exactly the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from srdd.training.checkpoints import checkpoint_step, list_checkpoints
from srdd.training.run_identity import DIGEST_FILE, IDENTITY_FILE
from srdd.training.settings import MAY_CHANGE


def differences(left: Any, right: Any, name: str) -> list[str]:
    """Where two nested structures differ, in a bit of a tensor or at all. Tuples and lists count as alike."""
    left, right = (list(value) if isinstance(value, tuple) else value for value in (left, right))
    if type(left) is not type(right):
        return [name]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [name]
        return [found for key in left for found in differences(left[key], right[key], f"{name}/{key}")]
    if isinstance(left, list):
        if len(left) != len(right):
            return [name]
        pairs = enumerate(zip(left, right))
        return [found for index, pair in pairs for found in differences(*pair, f"{name}/{index}")]
    if isinstance(left, torch.Tensor):
        left, right = left.detach().numpy(), right.detach().numpy()
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    else:
        same = left == right
    return [] if same else [name]


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".bin", ".pkl"):
        return torch.load(path, weights_only=False)
    if path.name == IDENTITY_FILE:  # how many checkpoints are kept, and the like, may differ
        identity = json.loads(path.read_text())
        identity["settings"] = {name: identity["settings"][name] for name in identity["settings"].keys() - MAY_CHANGE}
        return identity
    if path.name == DIGEST_FILE:  # equal values may be pickled in different ways
        return sorted(line.split()[1] for line in path.read_text().splitlines())
    return path.read_bytes()


def belongs_to_the_result(path: Path) -> bool:
    """All but checkpoints, and the card: it tells the command line."""
    return path.is_file() and path.name != "README.md" and not any("checkpoint-" in part for part in path.parts)


def assert_same_run(output_dir: Path, reference: Path) -> None:
    """The same log, pictures and finished model, and the same checkpoints as far as they are kept."""
    checkpoints = list_checkpoints(output_dir)
    assert len(checkpoints) >= 1
    assert checkpoint_step(checkpoints[-1]) == checkpoint_step(list_checkpoints(reference)[-1])
    assert not list(output_dir.glob("**/partial-*"))
    names = sorted(path.relative_to(output_dir) for path in output_dir.rglob("*") if belongs_to_the_result(path))
    wanted = sorted(path.relative_to(reference) for path in reference.rglob("*") if belongs_to_the_result(path))
    assert names == wanted
    for checkpoint in output_dir.glob("**/checkpoint-*"):
        folder = checkpoint.relative_to(output_dir)
        files = sorted(path.name for path in checkpoint.iterdir())
        assert files == sorted(path.name for path in (reference / folder).iterdir())
        names += [folder / name for name in files]
    found = [differences(read(output_dir / name), read(reference / name), str(name)) for name in names]
    found = [name for part in found for name in part]
    assert not found, f"{len(found)} values differ: {found[:20]}"
