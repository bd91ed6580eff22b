"""The one table of families of public weights, and how a file's family is recognised."""

from collections.abc import Mapping

import torch

from srdd.checks import shown
from srdd.conversion.family import Family
from srdd.conversion.hmar import HMAR
from srdd.conversion.markov_var import MARKOV_VAR
from srdd.conversion.mvar import MVAR
from srdd.conversion.switti import SWITTI
from srdd.conversion.var import VAR


# Where a state dict has prefixes of several, it is of the last: others build on VAR, which has least of its own.
FAMILIES: dict[str, Family] = {
    "var": VAR,
    "mvar": MVAR,
    "hmar": HMAR,
    "markov-var": MARKOV_VAR,
    "switti": SWITTI,
}

# What training checkpoints call a transformer.
MODEL_NAMES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.model_names))


def recognise(state: Mapping[str, torch.Tensor], model_name: str | None, family: str | None = None) -> Family:
    """
    The family of a transformer.

    Args:
        state (`Mapping[str, torch.Tensor]`): Its state dict.
        model_name (`str`, *optional*): What the checkpoint calls it, one of `MODEL_NAMES`; `None` for a state dict
            that stands alone.
        family (`str`, *optional*): The name of the family, where it is told.

    Raises:
        ValueError: If it is of none, not of the one that is told, or could be of several.
    """
    families = FAMILIES if family is None else {family: FAMILIES[family]}
    prefixes = dict.fromkeys(each.prefix for each in families.values())
    present = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)]
    if not present:
        raise ValueError(
            f"The transformer must be an official one, but no key of it starts with {' or '.join(prefixes)}, got"
            f" {shown(sorted(state))}"
        )
    possible = {name: each for name, each in families.items() if each.prefix == present[-1]}
    for tells in (lambda each: model_name in each.model_names, lambda each: each.is_sure(state)):
        if len(possible) > 1:
            possible = {name: each for name, each in possible.items() if tells(each)} or possible
    if len(possible) > 1:
        titles = " or ".join(each.title for each in possible.values())
        raise ValueError(
            f"Keys and shapes are those of {titles}, and nothing in the file tells which: `family` must be one of"
            f" {tuple(possible)}, got None"
        )
    return next(iter(possible.values()))
