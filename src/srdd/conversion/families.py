"""The one table of families of public weights, and how a file's family is recognised."""

from collections.abc import Mapping

import torch

from srdd.checks import shown
from srdd.conversion.family import Family
from srdd.conversion.hmar import HMAR
from srdd.conversion.mvar import MVAR
from srdd.conversion.var import VAR


FAMILIES: dict[str, Family] = {"var": VAR, "mvar": MVAR, "hmar": HMAR}

# What training checkpoints call a transformer.
MODEL_NAMES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.model_names))


def recognise(state: Mapping[str, torch.Tensor], model_name: str | None) -> Family:
    """
    The family of a transformer.

    Args:
        state (`Mapping[str, torch.Tensor]`): Its state dict.
        model_name (`str`, *optional*): What the checkpoint calls it, one of `MODEL_NAMES`; `None` for a state dict
            that stands alone.

    Raises:
        ValueError: If it is of none, or could be of several.
    """
    possible = {
        name: family
        for name, family in FAMILIES.items()
        if any(key.startswith(family.prefix) for key in state) and model_name in (None, *family.model_names)
    }
    if len(possible) != 1:
        possible = {name: family for name, family in possible.items() if family.is_sure(state)} or possible
    if not possible:
        prefixes = dict.fromkeys(family.prefix for family in FAMILIES.values())
        raise ValueError(
            f"The transformer must be an official one, but no key of it starts with {' or '.join(prefixes)}, got"
            f" {shown(sorted(state))}"
        )
    if len(possible) > 1:
        titles = " or ".join(family.title for family in possible.values())
        raise ValueError(
            f"Keys and shapes are those of {titles}, and nothing in the file tells which: `family` must be one of"
            f" {tuple(possible)}, got None"
        )
    return next(iter(possible.values()))
