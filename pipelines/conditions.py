"""What the transformer is told of the images to draw: labels become ids, ids become conditions."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch


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
    class_labels: Any, num_classes: int, id2label: dict[int, str], device: torch.device | None = None
) -> Conditions:
    """
    Conditions of classes, whose ids a model was trained on; the id `num_classes` says nothing.

    Args:
        class_labels (`int`, `str`, `torch.Tensor`, a list of `int` and `str`, or `None`): One label for each image.
            `None` is one image without a class.
        num_classes (`int`): Number of classes.
        id2label (`dict[int, str]`): Names of the classes.
        device (`torch.device`, *optional*): Where the tensors lie.

    Raises:
        ValueError: As [`label_ids`].
    """
    if class_labels is None:
        return Conditions(1, {"class_labels": torch.tensor([num_classes], device=device)})
    told = torch.tensor(label_ids(class_labels, num_classes, id2label), device=device)
    return Conditions(len(told), {"class_labels": told}, {"class_labels": torch.full_like(told, num_classes)})


def label_ids(class_labels: Any, num_classes: int, id2label: dict[int, str]) -> list[int]:
    """
    Class ids of labels given by id or by name.

    Args:
        class_labels (`int`, `str`, `torch.Tensor` or a list of `int` and `str`): One label or many. A name may be any
            of the comma-separated synonyms of a class.
        num_classes (`int`): Ids lie in `[0, num_classes - 1]`.
        id2label (`dict[int, str]`): Names of the classes.

    Returns:
        `list[int]`

    Raises:
        ValueError: If a label is out of range, unknown or names several classes, or there is none.
    """
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.flatten().tolist()
    labels = [class_labels] if isinstance(class_labels, (Integral, str)) else list(class_labels)
    if not labels:
        raise ValueError(f"`class_labels` must hold at least one label, got {class_labels!r}.")
    ids_by_name: dict[str, set[int]] = {}
    for index, names in id2label.items():
        for name in {names, *names.split(", ")}:
            ids_by_name.setdefault(name, set()).add(index)
    ids = []
    for label in labels:
        if isinstance(label, str):
            named = sorted(ids_by_name.get(label, ()))
            if not named:
                names = sorted(set(id2label.values()))
                shown = ", ".join(names[:10]) + (f" … ({len(names)} in all)" if len(names) > 10 else "")
                raise ValueError(f"`class_labels` must be names of classes ({shown or 'none'}) or ids, got {label!r}.")
            if len(named) > 1:
                raise ValueError(f"`class_labels` must name one class each, but {label!r} names the classes {named}.")
            label = named[0]
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            allowed = f"lie in [0, {num_classes - 1}]" if num_classes else "be None for an unconditional model"
            raise ValueError(f"`class_labels` must {allowed}, got {label!r}.")
        ids.append(int(label))
    return ids
