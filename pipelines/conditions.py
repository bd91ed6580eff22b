"""What the transformer is told of the images to draw: labels become ids, ids become conditions."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from srdd.checks import shown


@dataclass(frozen=True)
class Conditions:
    """
    What the transformer is told of a batch of images, as tensors by the names of its arguments.

    Args:
        batch_size (`int`): Number of images.
        conditional (`dict[str, torch.Tensor]`): What its conditional half is told, `(batch, ...)` each.
        unconditional (`dict[str, torch.Tensor]`, *optional*): What its unconditional half is told, alike; `None` where
            there is nothing to guide away from.
    """

    batch_size: int
    conditional: dict[str, torch.Tensor]
    unconditional: dict[str, torch.Tensor] | None = None

    def repeat_interleave(self, count: int) -> "Conditions":
        """Every image's conditions `count` times, one after the other."""
        halves = [self.conditional] if self.unconditional is None else [self.conditional, self.unconditional]
        told = ({name: tensor.repeat_interleave(count, dim=0) for name, tensor in half.items()} for half in halves)
        return Conditions(self.batch_size * count, *told)


def class_conditions(
    class_labels: Any, num_classes: int, id2label: Mapping[int | str, str], device: torch.device | None = None
) -> Conditions:
    """
    Conditions of classes, whose ids a model was trained on; the id `num_classes` says nothing.

    Args:
        class_labels (`int`, `str`, `torch.Tensor`, a list of `int` and `str`, or `None`): One label for each image.
            `None` is one image without a class.
        num_classes (`int`): Number of classes.
        id2label (`Mapping`): Names of the classes by their ids, which may be written as text.
        device (`torch.device`, *optional*): Where the tensors lie.

    Raises:
        ValueError: As [`label_ids`].
    """
    if class_labels is None:
        return Conditions(1, {"class_labels": torch.tensor([num_classes], device=device)})
    told = torch.tensor(label_ids(class_labels, num_classes, id2label), device=device)
    return Conditions(len(told), {"class_labels": told}, {"class_labels": torch.full_like(told, num_classes)})


def label_ids(class_labels: Any, num_classes: int, id2label: Mapping[int | str, str]) -> list[int]:
    """
    Class ids of labels given by id or by name.

    A text is the name of a class, whole or one of its comma-separated synonyms; a whole name wins over synonyms. A
    text of digits that names no class is an id.

    Args:
        class_labels (`int`, `str`, `torch.Tensor`, `np.ndarray` or a list of `int` and `str`): One label or many.
        num_classes (`int`): Ids lie in `[0, num_classes - 1]`.
        id2label (`Mapping`): Names of the classes by their ids, which may be written as text.

    Returns:
        `list[int]`

    Raises:
        ValueError: If a label is out of range, unknown or names several classes, or there is none.
    """
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        class_labels = class_labels.flatten().tolist()
    is_one = isinstance(class_labels, (str, bytes, Mapping, Set)) or not isinstance(class_labels, Iterable)
    labels = [class_labels] if is_one else list(class_labels)
    if not labels:
        raise ValueError(f"`class_labels` must hold at least one label, got {class_labels!r}.")
    ids = _names_to_ids(labels, id2label) if any(isinstance(label, str) for label in labels) else labels
    for label in ids:
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            allowed = f"lie in [0, {num_classes - 1}]" if num_classes else "be None for an unconditional model"
            raise ValueError(f"`class_labels` must {allowed}, got {shown(label)}.")
    return [int(label) for label in ids]


def _names_to_ids(labels: list, id2label: Mapping[int | str, str]) -> list:
    """Labels with ids in the place of names."""
    whole, synonyms = defaultdict(set), defaultdict(set)
    for index, name in id2label.items():
        whole[name].add(int(index))
        for synonym in name.split(", "):
            synonyms[synonym].add(int(index))
    ids = []
    for label in labels:
        named = sorted(whole.get(label) or synonyms.get(label) or ()) if isinstance(label, str) else [label]
        if not named and label.isascii() and label.isdigit():
            named = [int(label)]
        if not named:
            names = sorted(whole)
            listed = ", ".join(names[:10]) + (f" … ({len(names)} in all)" if len(names) > 10 else "")
            raise ValueError(
                f"`class_labels` must be names of classes ({listed or 'none'}) or ids, got {shown(label)}."
            )
        if len(named) > 1:
            raise ValueError(f"`class_labels` must name one class each, but {label!r} names the classes {named}.")
        ids += named
    return ids
