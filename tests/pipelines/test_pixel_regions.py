import pytest
import torch
from tiny_pictures import random_mask, random_pixels

from srdd.pipelines.pixel_regions import check_padding, crop_box, paste, project_to_low_resolution, resize


def test_pasted_pixels_are_exact_and_hard_masks_fade_in():
    pixels, drawn = random_pixels(16, 16), random_pixels(16, 16, seed=9)
    mask = 1 - random_mask(16, 16, seed=4)
    pasted = paste(pixels, mask, drawn, feather=2)
    shown = mask.expand_as(pixels) == 0
    assert torch.equal(pasted[shown], pixels[shown])
    assert not torch.equal(pasted[~shown], drawn[~shown])
    assert torch.equal(paste(pixels, mask, drawn, feather=0), torch.where(mask == 1, drawn, pixels))
    wide = torch.ones(2, 1, 16, 16)
    wide[..., :3] = 0
    assert torch.equal(paste(pixels, wide, drawn, feather=2)[..., 5:], drawn[..., 5:])


@pytest.mark.parametrize("feather", [1, 2, 6])
def test_an_object_that_ends_at_a_mask_leaves_no_pale_stripe(feather):
    pixels = torch.ones(1, 3, 32, 32)
    pixels[..., 8:24, 8:24] = -0.8  # dark on white
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    drawn = pixels - 0.1  # what a decoder gets wrong
    error = (paste(pixels, mask, drawn, feather) - pixels).abs()
    assert error.max() <= 0.1 + 1e-6
    edge = error[..., 16].max().item()
    assert edge <= 0.1 / (2 * feather + 1) + 1e-6
    assert error.isclose(torch.tensor(0.1), atol=1e-6)[..., 16 + feather :].all()


def test_soft_masks_blend_as_they_say():
    pixels, drawn = random_pixels(16, 16), random_pixels(16, 16, seed=9)
    mask = torch.linspace(0, 1, 16).expand(2, 1, 16, 16)
    torch.testing.assert_close(paste(pixels, mask, drawn, 2), pixels + mask * (drawn - pixels), atol=1e-6, rtol=0)


def test_a_crop_holds_the_mask_with_its_margin_in_the_right_proportions():
    mask = torch.zeros(2, 1, 40, 60)
    mask[0, 0, 10:14, 20:30], mask[1, 0, 16, 25] = 1, 0.5
    rows, columns = crop_box(mask, 3, (8, 8))
    assert rows.start <= 7
    assert rows.stop >= 20
    assert columns.start <= 17
    assert columns.stop >= 33
    assert rows.stop - rows.start == columns.stop - columns.start
    with pytest.raises(ValueError, match="`mask_image` must have white pixels for `padding_mask_crop`, got none"):
        crop_box(torch.zeros(1, 1, 8, 8), 1, (8, 8))


@pytest.mark.parametrize("factor", [2, 4])
def test_projected_images_become_the_small_ones_again(factor):
    large = resize(random_pixels(8, 8), (32, 32)) * 0.8
    small = resize(large, (32 // factor, 32 // factor))
    start = (large + 0.1 * random_pixels(32, 32, seed=5)).clamp(-1, 1)
    projected, errors = project_to_low_resolution(start, small)
    assert errors.max() < 1e-3
    assert (resize(projected, small.shape[-2:]) - small).abs().max() < 1e-3
    assert (resize(start, small.shape[-2:]) - small).abs().max() > 1e-2
    # Of all images that give the small one, it is nearer to the start than the true one.
    assert (projected - start).norm() < (large - start).norm()


@pytest.mark.parametrize(
    "padding", [0, -1, (1, 2, 3), (1, 2, 3, -4), (0, 0, 0, 0), 1.5, (1, 1, 1, 0.5), 101, True, "4"]
)
def test_paddings_that_make_no_sense_are_refused(padding):
    with pytest.raises(ValueError, match="`padding` must be one or four"):
        check_padding(padding, 100)


def test_paddings_of_one_or_four_numbers():
    assert check_padding(3, 100) == (3, 3, 3, 3)
    assert check_padding([1, 0, 2, 0], 100) == (1, 0, 2, 0)


@pytest.mark.parametrize("factor", [2, 4])
def test_where_no_picture_gives_the_small_one_it_is_said_how_far_it_is_off(factor):
    checkerboard = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).expand(2, 3, 8, 8).clone()
    checkerboard[1] *= 0.2
    start = resize(checkerboard, (8 * factor, 8 * factor))
    projected, errors = project_to_low_resolution(start, checkerboard)
    assert projected.abs().max() <= 1
    left = (resize(projected, (8, 8)) - checkerboard).abs().amax(dim=(1, 2, 3))
    # `resize` cuts off what lies outside of the bounds.
    assert (left <= errors + 1e-5).all()
    assert errors[0] > 0.3
    assert errors[1] < 0.01
