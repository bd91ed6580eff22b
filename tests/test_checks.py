"""One function for each kind of argument."""

import math

import numpy as np
import pytest
import torch

from srdd.checks import check_bool, check_choice, check_dtype, check_int, check_list, check_number, shown


NO_NUMBERS = ["1", b"1", None, [1], (1,), {}, 1j, torch.tensor(1), True, False, np.bool_(True), np.array([1])]


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers(value):
    checked = check_int("side", value, 3, 3)
    assert (checked, type(checked)) == (3, int)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 3.0, np.float32(3), math.nan, math.inf])
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match=r"^`side` must be an integer, got .*\.$"):
        check_int("side", value)


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        ({"low": 4}, "an integer of at least 4, got 3"),
        ({"high": 2}, "an integer of at most 2, got 3"),
        ({"low": 4, "high": 8}, r"an integer in \[4, 8\], got 3"),
    ],
)
def test_integers_out_of_bounds(bounds, rule):
    with pytest.raises(ValueError, match=f"`side` must be {rule}"):
        check_int("side", 3, **bounds)


@pytest.mark.parametrize("value", [3, 3.0, np.float16(3), np.float64(3), np.int8(3)])
def test_numbers(value):
    checked = check_number("rate", value, low=3, high=3, over=2, under=4)
    assert checked == 3
    assert type(checked) in (int, float)


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, -math.inf, np.float32("nan"), -(10**400)])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match=r"^`rate` must be a finite number, got .*\.$"):
        check_number("rate", value)


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        ({"low": 0.6}, "of at least 0.6"),
        ({"high": 0.4}, "of at most 0.4"),
        ({"over": 0.5}, "above 0.5"),
        ({"under": 0.5}, "below 0.5"),
        ({"low": 0, "under": 0.5}, "of at least 0 and below 0.5"),
        ({"low": 0, "high": 0.4}, r"in \[0, 0.4\]"),
    ],
)
def test_numbers_out_of_bounds(bounds, rule):
    with pytest.raises(ValueError, match=f"`rate` must be a finite number {rule}, got 0.5"):
        check_number("rate", 0.5, **bounds)


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_booleans(value):
    assert check_bool("fast", value) is True


@pytest.mark.parametrize("value", [0, 1, "False", None, torch.tensor(True), [True]])
def test_what_is_no_boolean(value):
    with pytest.raises(ValueError, match="`fast` must be True or False, got "):
        check_bool("fast", value)


def test_choices():
    assert check_choice("mode", "flex", ("flex", "dense")) == "flex"
    for value in ("FLEX", "", None, 1, ["flex"], {"flex"}):
        with pytest.raises(ValueError, match=r"`mode` must be one of \('flex', 'dense'\), got "):
            check_choice("mode", value, ("flex", "dense"))


def test_lists():
    assert check_list("sides", (1, "a")) == check_list("sides", [1, "a"], 2) == [1, "a"]
    for value in ([], (), "12", b"12", None, 3, {1: 2}, {1, 2}, torch.ones(2)):
        with pytest.raises(ValueError, match="`sides` must be a list of at least one entry, got "):
            check_list("sides", value)
    with pytest.raises(ValueError, match=r"`sides` must be a list of 3 entries, got \[1\]"):
        check_list("sides", [1], 3)


def test_long_values_are_cut():
    assert shown([1, 2]) == "[1, 2]"
    assert len(shown("x" * 10_000)) < 150
    assert len(shown(list(range(10**6)))) < 150
    assert len(shown(torch.zeros(100, 100))) < 150
    with pytest.raises(ValueError, match="`side` must be an integer of at most 4, got a huge int"):
        check_int("side", 10**10_000, high=4)


@pytest.mark.parametrize("value", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(value):
    assert check_dtype("dtype", value) is value


@pytest.mark.parametrize("value", [None, "half", torch.int8, torch.bool, np.float32, 1.0])
def test_what_is_no_floating_point_dtype(value):
    with pytest.raises(ValueError, match=r"^`dtype` must be a floating-point torch.dtype, got .*\.$"):
        check_dtype("dtype", value)
