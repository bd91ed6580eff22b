import pytest
import torch

from srdd.evaluation.editing_masks import MASK_KINDS, make_mask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_regular_masks_are_as_defined():
    given = {kind: 1 - make_mask(kind, 8, 12)[0] for kind in ("nn2", "ev2li", "genhalf", "ex64")}
    for row in range(8):
        for column in range(12):
            assert given["nn2"][row, column] == (row % 2 == 0 and column % 2 == 0)
            assert given["ev2li"][row, column] == (row % 2 == 0)
            assert given["genhalf"][row, column] == (column < 6)
            assert given["ex64"][row, column] == (3 <= row < 5 and 4 <= column < 7)


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (48, 96)])
@pytest.mark.parametrize("kind", ["thick", "thin"])
def test_random_masks_hide_half_at_most_and_follow_their_generator(kind, size):
    masks = [make_mask(kind, *size, generator=seeded(seed)) for seed in range(40)]
    for seed, mask in enumerate(masks):
        assert mask.shape == (1, *size)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0 < mask.mean() <= 0.5
        assert torch.equal(mask, make_mask(kind, *size, generator=seeded(seed)))
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


def widest_square(mask: torch.Tensor) -> int:
    """Side of the largest hidden square."""
    side = 0
    while mask.any():  # pixels that are the first corner of a hidden square of side + 1
        side, mask = side + 1, -torch.nn.functional.max_pool2d(-mask, 2, stride=1)
    return side


def test_thick_strokes_are_wider_than_thin_ones():
    widths = {
        kind: [widest_square(make_mask(kind, 128, 128, generator=seeded(seed))) for seed in range(20)]
        for kind in ("thick", "thin")
    }
    assert sum(widths["thick"]) > 2 * sum(widths["thin"])


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_tiny_images_have_masks(kind):
    mask = make_mask(kind, 8, 8, generator=seeded(0))
    assert mask.shape == (1, 8, 8)
    assert 0 < mask.mean() < 1


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"`kind` must be one of \('nn2', .* got 'half'"):
        make_mask("half", 8, 8)
