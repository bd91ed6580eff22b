"""Grids of pictures with names that people give to classes."""

import numpy as np
import pytest
from PIL import Image

from srdd.evaluation.figures import drawable, labelled_grid, spread


def grid(*names: str) -> np.ndarray:
    """The names' column of a grid with one picture in a row."""
    picture = labelled_grid([Image.new("RGB", (16, 20), "red")] * len(names), list(names), columns=1)
    assert picture.height == 20 * len(names)
    return np.asarray(picture)[:, :-16]


@pytest.mark.parametrize(
    "name", ["é", "ß", "犬", "🐶 dog", "дом", "a\nb", "tab\t", "\udcff", "", " ", "مرحبا", "x" * 300]
)
def test_any_name_is_drawn(name):
    column = grid("bus", name)
    assert (column[:20] < 128).any()
    assert (column[20:] < 128).any() == bool(name.strip())


def test_names_have_letters_of_their_own():
    column = grid("é", "e", "ö", "ß", "Ω", "犬", "猫")
    drawings = {drawing.tobytes() for drawing in np.split(column, 7)}
    assert len(drawings) == 7


def test_letters_without_a_picture_are_drawn_as_codes():
    assert drawable(["犬", "bus é", "a\nb"])[0] == ["\\u72ac", "bus é", "a\\nb"]


def test_plain_names_keep_their_font():
    names, font = drawable(["bus", "crash test"])
    assert names == ["bus", "crash test"]
    assert font.getname()[0] == "Aileron"


@pytest.mark.parametrize(
    ("num_images", "count", "expected"), [(4, 2, [0, 0, 1, 1]), (2, 6, [0, 3]), (3, 3, [0, 1, 2]), (5, 1, [0] * 5)]
)
def test_pictures_are_spread_over_what_there_is(num_images, count, expected):
    assert spread(num_images, count) == expected
