"""Classes of a data set: their order, their ids, and how many pictures they have."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

import datasets


def class_order(name: str) -> tuple[int, Decimal, str]:
    """Sorts names of classes: numbers first and by their value, all others as text."""
    if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name):
        return 0, Decimal(name), name
    return 1, Decimal(0), name


def shortened(names: Sequence[str], count: int) -> str:
    """The first `count` names, and whether there are more."""
    return ", ".join(map(printable, names[:count])) + (", …" if len(names) > count else "")


def printable(name: str) -> str:
    """A name for messages, on one line, with what cannot be written escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def is_missing(label: int | float | str | bool | None) -> bool:
    """Whether a label is none: `None`, a number that is not finite, or an empty text."""
    if isinstance(label, float):
        return not math.isfinite(label)
    return label is None or (isinstance(label, str) and not label.strip())


def as_class_labels(
    train: datasets.Dataset, validation: datasets.Dataset | None, label_column: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """
    Both splits with class ids in the label column. Declared classes keep their ids; others are all that `train` has,
    numbers in their order, then names sorted.

    Args:
        train (`datasets.Dataset`): The training split.
        validation (`datasets.Dataset`, *optional*): The validation split.
        label_column (`str`): Column of numbers, names or declared classes.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset | None]`: Both splits.

    Raises:
        ValueError: If pictures have no label, several, or in the validation split others than in `train`.
    """
    feature = train.features[label_column]
    dtype = getattr(feature, "dtype", "list")
    if dtype in ("list", "dict"):
        raise ValueError(f"`label_column` must hold one number or name for each picture, got {feature}.")
    splits = [train] if validation is None else [train, validation]
    labels = [label for split in splits for label in split[label_column][:]]
    is_class_label = isinstance(feature, datasets.ClassLabel)
    # Declared classes of test sets are often -1 where they are not told.
    missing = [index for index, label in enumerate(labels) if is_missing(label) or (is_class_label and label < 0)]
    if missing:
        places = [
            f"row {index}" if index < len(train) else f"row {index - len(train)} of the validation split"
            for index in missing
        ]
        raise ValueError(
            f"`label_column` must label every picture, but {len(missing)} of {len(labels)} have no label"
            f" ({shortened(places, 3)})."
        )
    if is_class_label:
        return train, validation
    order = Decimal if "int" in dtype or "float" in dtype else class_order
    # By way of strings: as a number, the label 2 of the classes (0, 2, 5) would be taken for an id.
    splits = [split.cast_column(label_column, datasets.Value("string")) for split in splits]
    names = sorted(splits[0].unique(label_column), key=order)
    unknown = sorted(set(splits[-1].unique(label_column)).difference(names), key=order)
    if unknown:
        raise ValueError(
            f"`label_column` must hold the same labels in the validation split as in `train`, {_few(names)}, got"
            f" {_few(unknown)}."
        )
    splits = [split.cast_column(label_column, datasets.ClassLabel(names=names)) for split in splits]
    return splits[0], splits[1] if validation is not None else None


def _few(names: Sequence[str]) -> str:
    """A list as Python writes it, cut off after ten names."""
    return str(names) if len(names) <= 10 else f"{str(names[:10])[:-1]}, … ({len(names)} in all)]"


def describe_classes(id2label: dict[int, str], ids_used: Iterable[int], ids_found: Iterable[int]) -> str:
    """
    How many pictures every class has: `"2 classes: bus (8), car (7 of 8)"`. Of many classes the first and last few are
    named.

    Args:
        id2label (`dict[int, str]`): Names of the classes.
        ids_used (`Iterable[int]`): Class ids of the pictures that are used.
        ids_found (`Iterable[int]`): Class ids of all pictures that there are.
    """
    if not id2label:
        return "no classes"
    num_used, num_found = Counter(ids_used), Counter(ids_found)
    texts = [
        f"{printable(name)} ({num_used[index]}"
        + (f" of {num_found[index]})" if num_found[index] != num_used[index] else ")")
        for index, name in id2label.items()
    ]
    title = f"{len(texts)} classes" if len(texts) > 1 else "1 class"
    if len(texts) > 20:
        counts = [num_used[index] for index in id2label]
        title += f" of {min(counts)} to {max(counts)} pictures"
        texts = [*texts[:10], "…", *texts[-3:]]
    return f"{title}: {', '.join(texts)}"
