"""What the transformer is told of the images to draw: conditions of labels, by their ids, and of encoded texts."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from srdd.checks import described, shown


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
    class_labels: Any,
    num_classes: int,
    id2label: Mapping[int | str, str],
    device: torch.device | None = None,
    labels_of_both_halves: Iterable[str] = (),
) -> Conditions:
    """
    Conditions of classes, whose ids a model was trained on; the id `num_classes` says nothing.

    Args:
        class_labels (`int`, `str`, `torch.Tensor`, a list of `int` and `str`, or `None`): One label for each image.
            `None` is one image without a class.
        num_classes (`int`): Number of classes.
        id2label (`Mapping`): Names of the classes by their ids, which may be written as text.
        device (`torch.device`, *optional*): Where the tensors lie.
        labels_of_both_halves (`Iterable[str]`, defaults to `()`): Further arguments of the transformer, that tell its
            unconditional half the images' classes, too.

    Raises:
        ValueError: As [`label_ids`].
    """
    if class_labels is None:
        return Conditions(1, {"class_labels": torch.tensor([num_classes], device=device)})
    told = torch.tensor(label_ids(class_labels, num_classes, id2label), device=device)
    both = dict.fromkeys(labels_of_both_halves, told)
    halves = {"class_labels": told, **both}, {"class_labels": torch.full_like(told, num_classes), **both}
    return Conditions(len(told), *halves)


def text_conditions(
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    pooled_prompt_embeds: torch.Tensor,
    negative_pooled_prompt_embeds: torch.Tensor | None,
    prompt_attention_mask: torch.BoolTensor | None = None,
    negative_prompt_attention_mask: torch.BoolTensor | None = None,
    device: torch.device | None = None,
) -> Conditions:
    """
    Conditions of encoded texts. Both halves are padded to one length, which their masks tell.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch, num_text_tokens, width)`): States of the texts' tokens.
        negative_prompt_embeds (`torch.Tensor`, *optional*): The same of what is guided away from, of a batch of 1 or
            as many. Without it and all else of it there is no guidance.
        pooled_prompt_embeds (`torch.Tensor` of shape `(batch, width)`): Pooled texts.
        negative_pooled_prompt_embeds (`torch.Tensor`, *optional*): Likewise.
        prompt_attention_mask (`torch.BoolTensor` of shape `(batch, num_text_tokens)`, *optional*): False at padding;
            by default there is none.
        negative_prompt_attention_mask (`torch.BoolTensor`, *optional*): Likewise.
        device (`torch.device`, *optional*): Where the tensors lie; where they are by default.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    halves = [checked_texts("", prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, device)]
    batch_size = len(prompt_embeds)
    negative = negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask
    if any(tensor is not None for tensor in negative):
        half = checked_texts("negative_", *negative, device)
        count = len(half["encoder_hidden_states"])
        if count not in (1, batch_size):
            raise ValueError(
                f"`negative_prompt` and its embeddings must be one or {batch_size}, one for each image, got {count}."
            )
        halves.append({name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in half.items()})
    longest = max(half["encoder_hidden_states"].shape[1] for half in halves)
    for half in halves:
        missing = longest - half["encoder_hidden_states"].shape[1]
        half["encoder_hidden_states"] = F.pad(half["encoder_hidden_states"], (0, 0, 0, missing))
        half["encoder_attention_mask"] = F.pad(half["encoder_attention_mask"], (0, missing))
    return Conditions(batch_size, *halves)


def checked_texts(
    prefix: str,
    embeds: torch.Tensor | None,
    pooled_embeds: torch.Tensor | None,
    mask: torch.BoolTensor | None,
    device: torch.device | None,
) -> dict[str, torch.Tensor]:
    """
    Encoded texts and their mask, by the names of the transformer's arguments.

    Raises:
        ValueError: If something is missing or does not fit. Pipelines' names of it start with `prefix`.
    """
    for name, tensor, ndim, shape in (
        ("prompt_embeds", embeds, 3, "(batch, num_text_tokens, width)"),
        ("pooled_prompt_embeds", pooled_embeds, 2, "(batch, width)"),
    ):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim != ndim:
            raise ValueError(
                f"`{prefix}{name}` must be a floating-point tensor of shape {shape}, got {described(tensor)}."
            )
    shape = embeds.shape[:2]
    if len(pooled_embeds) != shape[0] or 0 in shape:
        raise ValueError(
            f"`{prefix}prompt_embeds` and `{prefix}pooled_prompt_embeds` must be of as many texts, at least one, got"
            f" {tuple(embeds.shape)} and {tuple(pooled_embeds.shape)}."
        )
    mask = torch.ones(shape, dtype=torch.bool, device=embeds.device) if mask is None else mask
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"`{prefix}prompt_attention_mask` must be a boolean tensor of shape {tuple(shape)}, got {described(mask)}."
        )
    if not mask.any(dim=1).all():
        raise ValueError(f"`{prefix}prompt_attention_mask` must leave at least one token of each text.")
    told = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "pooled_projections": pooled_embeds}
    return {name: tensor.to(device) for name, tensor in told.items()}


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
                f"{_nearest(label, [*whole, *synonyms])}"
            )
        if len(named) > 1:
            raise ValueError(f"`class_labels` must name one class each, but {label!r} names the classes {named}.")
        ids += named
    return ids


def _nearest(label: str, names: Iterable[str]) -> str:
    """A sentence with the name that a label may have been meant for, if there is one; empty if there is none."""
    by_letters = {name.lower(): name for name in names}
    near = difflib.get_close_matches(label[:100].lower(), by_letters, n=1)
    return f" Did you mean {by_letters[near[0]]!r}?" if near else ""
