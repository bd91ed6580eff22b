import pytest
import torch

from srdd.scales import (
    default_scale_sizes,
    normalize_scale_sizes,
    num_tokens_per_scale,
    scale_slices,
    split_scales,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2, 4], [[1, 1], [2, 2], [4, 4]]),
        ((1, (2, 3), [4, 3]), [[1, 1], [2, 3], [4, 3]]),
        (((3, 1), (3, 2)), [[3, 1], [3, 2]]),
        ([torch.Size([2, 5])], [[2, 5]]),
        ([7], [[7, 7]]),
    ],
)
def test_scales_are_stored_as_lists_of_pairs(given, expected):
    sizes = normalize_scale_sizes(given)
    assert sizes == expected
    assert all(type(size) is list for size in sizes)
    assert normalize_scale_sizes(sizes) == sizes


@pytest.mark.parametrize(
    "bad", [[], (), "124", b"12", 4, None, [0], [-1, 2], [1.0, 2], [True, 2], [[1, 2, 3]], [[1]], ["1", "2"], [None]]
)
def test_entries_that_are_no_scales_are_refused(bad):
    with pytest.raises(ValueError, match="`my_scales` must list at least one scale.*positive integer") as error:
        normalize_scale_sizes(bad, "my_scales")
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("bad", [[1, 1], [2, 1], [1, [2, 3], [3, 2]], [[2, 2], [1, 9]], [1, 4, 4]])
def test_scales_that_do_not_grow_are_refused(bad):
    with pytest.raises(ValueError, match="`scale_sizes` must grow from scale to scale, got .* after"):
        normalize_scale_sizes(bad)


def test_the_paper_scales_have_680_tokens():
    sizes = normalize_scale_sizes([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    assert num_tokens_per_scale(sizes) == [1, 4, 9, 16, 25, 36, 64, 100, 169, 256]
    assert scale_slices(sizes)[-1] == slice(424, 680)


def test_slices_cover_the_pyramid_without_gap():
    sizes = [[1, 1], [1, 3], [2, 3], [4, 5]]
    covered = [index for part in scale_slices(sizes) for index in range(part.start, part.stop)]
    assert covered == list(range(1 + 3 + 6 + 20))


def test_split_scales_reads_row_by_row():
    sizes = [[1, 2], [3, 2]]
    packed = torch.arange(16).view(2, 8)
    coarse, fine = split_scales(packed, sizes)
    assert coarse.tolist() == [[[0, 1]], [[8, 9]]]
    assert fine.tolist() == [[[2, 3], [4, 5], [6, 7]], [[10, 11], [12, 13], [14, 15]]]


def test_split_scales_keeps_features_of_tokens():
    features = torch.randn(2, 5, 3)
    coarse, fine = split_scales(features, [[1, 1], [2, 2]])
    assert coarse.shape == (2, 1, 1, 3)
    assert fine.shape == (2, 2, 2, 3)
    assert torch.equal(fine[1, 1, 0], features[1, 3])


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (5,), (5, 2)])
def test_split_scales_refuses_another_number_of_tokens(shape):
    with pytest.raises(ValueError, match=r"`token_ids` must have shape \(batch, 5\) .*got"):
        split_scales(torch.zeros(shape, dtype=torch.long), [[1, 1], [2, 2]])


@pytest.mark.parametrize(
    ("grid_size", "sides"),
    [
        (1, [1]),
        (2, [1, 2]),
        (4, [1, 2, 3, 4]),
        (8, [1, 2, 3, 4, 5, 6, 8]),
        (16, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),  # VAR at 256px
        (32, [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),  # VAR at 512px
        (64, [1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64]),
    ],
)
def test_default_scales_of_square_grids(grid_size, sides):
    expected = [[side, side] for side in sides]
    assert default_scale_sizes(grid_size) == default_scale_sizes((grid_size, grid_size)) == expected


@pytest.mark.parametrize("grid_size", [(8, 12), (12, 8), (1, 16), (3, 64), (32, 24), (16, 15), (5, 5)])
def test_default_scales_of_any_grid_grow_to_it(grid_size):
    sizes = default_scale_sizes(grid_size)
    assert sizes[0] == [1, 1]
    assert sizes[-1] == list(grid_size)
    assert normalize_scale_sizes(sizes) == sizes
    longest = max(grid_size)
    for size in sizes:
        for side, full in zip(size, grid_size):
            assert abs(side - max(1, max(size) * full / longest)) <= 0.5
    assert default_scale_sizes(grid_size[::-1]) == [size[::-1] for size in sizes]


def test_default_scales_follow_the_rule_on_every_grid():
    for grid in range(1, 200):
        sides = [height for height, _ in default_scale_sizes(grid)]
        ratio = 5 / 6 if grid <= 16 else 3 / 4
        assert sides[0] == 1
        for coarse, fine in zip(sides, sides[1:]):
            assert coarse == int(fine * ratio + 1e-9)


@pytest.mark.parametrize("bad", [0, -4, 2.0, True, "8", (8,), (8, 0), (2, 2, 2), None])
def test_grids_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="`grid_size` must list at least one scale.*positive integer"):
        default_scale_sizes(bad)
