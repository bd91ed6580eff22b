import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd import SRDDInpaintPipeline
from srdd.area_means import WINDOWS, area_means


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 3), (8, 7), (13, 16), (64, 1)])
@pytest.mark.parametrize("new_size", [(1, 1), (2, 3), (4, 4), (7, 2), (16, 13), (80, 3)])
def test_means_are_those_of_adaptive_pooling(size, new_size):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps, size=new_size, mode="area")
    torch.testing.assert_close(area_means(maps, new_size), expected, atol=1e-6, rtol=0)


def test_maps_of_the_right_size_are_themselves():
    maps = torch.randn(2, 3, 4, 5)
    assert area_means(maps, (4, 5)) is maps


def test_means_are_exact_where_all_is_alike_and_gradients_flow():
    maps = torch.ones(1, 1, 13, 13, requires_grad=True)
    means = area_means(maps, (5, 4))
    assert (means == 1).all()
    means.sum().backward()
    assert maps.grad.sum() == 20


def test_weights_of_a_cell_sum_to_one_and_are_made_once():
    for size, new_size in ((13, 5), (5, 13), (7, 7), (100, 3)):
        places, weights = WINDOWS[size, new_size, torch.device("cpu")]
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(new_size))
        assert 0 <= places.min() <= places.max() < size
        assert WINDOWS[size, new_size, torch.device("cpu")][0] is places


def test_autocast_does_not_round_them():
    maps = torch.randn(1, 2, 13, 13, generator=torch.Generator().manual_seed(0))
    expected = area_means(maps, (5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(area_means(maps, (5, 5)), expected)


def test_drawing_and_editing_do_without_pooling_that_apples_gpus_refuse(monkeypatch):
    pool = F.adaptive_avg_pool2d

    def pool_as_there(states, size):
        assert not any(max(sides) % min(sides) for sides in zip(states.shape[-2:], size))
        return pool(states, size)

    monkeypatch.setattr(F, "adaptive_avg_pool2d", pool_as_there)
    sizes = [1, 2, 3, 5]
    vqvae = tiny_vqvae(scale_sizes=sizes, sample_size=10)
    pipe = SRDDInpaintPipeline(vqvae, tiny_transformer(scale_sizes=sizes), tiny_scheduler(scale_sizes=sizes))
    pipe.set_progress_bar_config(disable=True)
    result = pipe(Image.new("RGB", (17, 11)), Image.new("L", (17, 11), 255), 1, generator=torch.Generator()).images[0]
    assert result.size == (17, 11)
    with torch.no_grad():
        assert vqvae.tokenize(torch.zeros(1, 3, 10, 10)).shape == (1, 39)
