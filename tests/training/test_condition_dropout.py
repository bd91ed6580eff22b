"""Dropped conditions: whole ones, at the rate that is asked for, and only what there is to drop."""

import pytest
import torch

from srdd.training.condition_dropout import drop_conditions


def batch(count: int) -> tuple[dict, dict]:
    """Numbers above zero, and zeros to put in their place; of the last there is nothing to put."""
    conditions = {
        "states": torch.rand(count, 3, 2) + 1,
        "mask": torch.ones(count, 3, dtype=torch.bool),
        "pooled": torch.rand(count, 4) + 1,
        "size": torch.rand(count, 2) + 1,
    }
    unconditional = {
        "states": torch.zeros(3, 2),
        "mask": torch.tensor([True, False, False]),
        "pooled": torch.zeros(4),
    }
    return conditions, unconditional


def test_a_share_of_the_images_is_told_nothing_of_their_text():
    torch.manual_seed(0)
    conditions, unconditional = batch(10_000)
    told = drop_conditions(conditions, unconditional, 0.1)
    assert told.keys() == conditions.keys()
    is_dropped = (told["pooled"] == 0).all(dim=1)
    assert is_dropped.float().mean() == pytest.approx(0.1, abs=0.01)
    for name in unconditional:
        assert torch.equal(told[name][is_dropped], unconditional[name].expand(is_dropped.sum(), *told[name].shape[1:]))
        assert torch.equal(told[name][~is_dropped], conditions[name][~is_dropped])
        assert told[name].dtype == conditions[name].dtype
    assert torch.equal(told["size"], conditions["size"])


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_none_or_all(probability, share):
    conditions, unconditional = batch(50)
    told = drop_conditions(conditions, unconditional, probability)
    assert (told["pooled"] == 0).float().mean() == share
    assert (~told["mask"][:, 1]).float().mean() == share


def test_where_the_transformer_drops_itself_nothing_is_drawn():
    conditions, _ = batch(5)
    state = torch.get_rng_state()
    assert drop_conditions(conditions, None, 0.5) is conditions
    assert torch.equal(torch.get_rng_state(), state)
