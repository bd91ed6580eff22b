"""Shuffled batches of what a run reads."""

import pytest
import torch

from srdd.training.settings import TrainingSettings
from srdd.training.training_data import make_loader


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
