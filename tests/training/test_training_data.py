"""Shuffled batches of what a run reads."""

import argparse

import pytest
import torch

from srdd.data.images import LabelledImages
from srdd.training.settings import PixelSettings, TrainingSettings, share
from srdd.training.training_data import load_pixels, make_loader


def make_numbers(count: int) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.arange(count))


def test_a_batch_needs_enough_images():
    settings = TrainingSettings(output_dir="out", train_batch_size=5)
    with pytest.raises(
        ValueError, match=r"`train_batch_size` must be at most 4, .* images \(9\) over that of processes \(2\), got 5"
    ):
        make_loader(settings, make_numbers(9), num_processes=2)
    loader = make_loader(settings, make_numbers(10), num_processes=2)
    assert [len(numbers) for [numbers] in loader] == [5, 5]


def test_the_last_small_batch_is_dropped():
    loader = make_loader(TrainingSettings(output_dir="out", train_batch_size=4), make_numbers(11))
    assert [len(numbers) for [numbers] in loader] == [4, 4]


def test_the_order_is_that_of_the_seed():
    def order(seed):
        loader = make_loader(TrainingSettings(output_dir="out", train_batch_size=4, seed=seed), make_numbers(12))
        return torch.cat([numbers for [numbers] in loader]).tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(12))


def test_crops_in_the_centre_are_of_one_size():
    settings = PixelSettings(output_dir="out", center_crop=True, min_crop=0.5)
    with pytest.raises(ValueError, match="`min_crop` must be 1 with `center_crop`, got 0.5"):
        load_pixels(settings, 8, LabelledImages(None, None, "image", None, {}))
    assert share("1") == 1.0
    for wrong in ("0", "1.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must lie in \(0, 1\]"):
            share(wrong)
