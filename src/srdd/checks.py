"""
Arguments: one function for each kind of value.

Each returns the value as Python has it (numpy's integers, numbers and booleans count as what they are, tensors do
not), or raises a `ValueError` that names the argument, what is allowed, and what was given.
"""

import numbers
import reprlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch


_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = 20
_short.maxstring = _short.maxother = _short.maxlong = 120


def _bounds(low: float | None, high: float | None, over: float | None, under: float | None) -> str:
    """The end of a rule: what the bounds say."""
    if low is not None and high is not None:
        return f" in [{low}, {high}]"
    limits = {"of at least": low, "above": over, "of at most": high, "below": under}
    stated = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
    return f" {stated}" if stated else ""


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """
    An integer; booleans, floats and strings are none.

    Args:
        name (`str`): The argument, as the message shall name it.
        value (`Any`): What was given.
        low (`int`, *optional*): The least that is allowed.
        high (`int`, *optional*): The most that is allowed.

    Returns:
        `int`

    Raises:
        ValueError: If it is no integer or out of bounds.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"`{name}` must be an integer{_bounds(low, high, None, None)}, got {shown(value)}.")
    return int(value)


def check_number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    over: float | None = None,
    under: float | None = None,
) -> float:
    """
    A finite number; booleans and strings are none.

    Args:
        name (`str`): The argument, as the message shall name it.
        value (`Any`): What was given.
        low (`float`, *optional*): The least that is allowed.
        high (`float`, *optional*): The most that is allowed.
        over (`float`, *optional*): What it must lie above.
        under (`float`, *optional*): What it must lie below.

    Returns:
        `float` or `int`: An integer stays one.

    Raises:
        ValueError: If it is no number, not finite, or out of bounds.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number:
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if (
        not is_number
        or not abs(value) <= sys.float_info.max
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (over is not None and value <= over)
        or (under is not None and value >= under)
    ):
        raise ValueError(f"`{name}` must be a finite number{_bounds(low, high, over, under)}, got {shown(value)}.")
    return value


def check_bool(name: str, value: Any) -> bool:
    """
    `True` or `False`; integers, strings and `None` are neither.

    Args:
        name (`str`): The argument, as the message shall name it.
        value (`Any`): What was given.

    Returns:
        `bool`

    Raises:
        ValueError: If it is no boolean.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")
    return bool(value)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """
    One of a few names.

    Args:
        name (`str`): The argument, as the message shall name it.
        value (`Any`): What was given.
        allowed (`Collection[str]`): The names.

    Returns:
        `str`

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {tuple(allowed)}, got {shown(value)}.")
    return value


def check_dtype(name: str, value: Any) -> torch.dtype:
    """
    A floating-point dtype.

    Args:
        name (`str`): The argument's name in the message.
        value (`Any`): What was given.

    Returns:
        `torch.dtype`

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"`{name}` must be a floating-point torch.dtype, got {shown(value)}.")
    return value


def check_list(name: str, value: Any, length: int | None = None) -> list:
    """
    A list or tuple that is not empty.

    Args:
        name (`str`): The argument, as the message shall name it.
        value (`Any`): What was given.
        length (`int`, *optional*): How many entries it must have.

    Returns:
        `list`

    Raises:
        ValueError: If it is no list, empty, or of another length.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_list or len(value) == 0 or (length is not None and len(value) != length):
        entries = "at least one entry" if length is None else f"{length} entries"
        raise ValueError(f"`{name}` must be a list of {entries}, got {shown(value)}.")
    return list(value)


def described(value: Any) -> str:
    """
    What a message says of a value that should have been a certain tensor: dtype and shape of tensors, else the value.

    Args:
        value (`Any`): What was given.

    Returns:
        `str`
    """
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {shown(value)}"


def shown(value: Any) -> str:
    """
    A value as messages show it, cut where it is long.

    Args:
        value (`Any`): What was given.

    Returns:
        `str`
    """
    try:
        return _short.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a huge {type(value).__name__}"
