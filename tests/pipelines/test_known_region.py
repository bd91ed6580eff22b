"""Which tokens follow from the known part of an image, and how that part is continued."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SCALE_SIZES, tiny_vqvae

from srdd.pipelines.image_regions import (
    WindowedCanvas,
    check_padding,
    crop_box,
    paste,
    project_to_low_resolution,
    resize,
)
from srdd.pipelines.known_region import KnownRegion, extend_known


def random_mask(height: int, width: int, seed: int, share: float = 0.5, batch_size: int = 2) -> torch.Tensor:
    """Blocky random masks, 1 where known."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(batch_size, 1, 4, 4, generator=generator) < share).float()
    return F.interpolate(coarse, size=(height, width), mode="nearest")


def random_pixels(height: int = 8, width: int = 8, seed: int = 0, batch_size: int = 2) -> torch.Tensor:
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (1, 9), (5, 5), (64, 3)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_known_pixels_are_continued_into_the_hole(size, share):
    generator = torch.Generator().manual_seed(3)
    pixels = random_pixels(*size)
    known = (torch.rand(2, 1, *size, generator=generator) < share).float()
    known[..., 0, 0] = 1
    filled = extend_known(pixels, known)
    shown = known.expand_as(pixels) == 1
    assert torch.equal(filled[shown], pixels[shown])
    for image, mask, result in zip(pixels, known, filled):
        for channel in range(3):
            values = image[channel][mask[0] == 1]
            assert values.min() - 1e-5 <= result[channel].min()
            assert result[channel].max() <= values.max() + 1e-5


def test_a_constant_image_is_continued_exactly_and_no_image_is_grey():
    pixels, known = torch.full((1, 3, 16, 16), 0.25), torch.zeros(1, 1, 16, 16)
    assert (extend_known(pixels, known) == 0).all()
    known[..., :5] = 1
    torch.testing.assert_close(extend_known(pixels, known), pixels)


def test_hole_pixels_are_never_read():
    pixels, known = random_pixels(16, 16), random_mask(16, 16, seed=1)
    other = torch.where(known == 1, pixels, torch.tensor(float("inf")))
    assert torch.equal(extend_known(pixels, known), extend_known(other, known))


@pytest.mark.parametrize("cells", ["all", "majority", "any"])
def test_a_cell_is_known_by_the_share_of_its_pixels(cells):
    known = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    known[:, :, :4, :4], known[:, :, 4:, 4:] = 1, 0
    region = KnownRegion(torch.zeros(2, 8, 4, 4), known, cells)
    for side in SCALE_SIZES:
        step = 8 // side
        for row in range(side):
            for column in range(side):
                share = known[:, 0, row * step : (row + 1) * step, column * step : (column + 1) * step].mean((1, 2))
                expected = {"all": share == 1, "majority": share > 0.5, "any": share > 0}[cells]
                assert torch.equal(region.known_mask((side, side))[:, row, column], expected)


def test_scattered_pixels_speak_for_what_is_between_them_and_small_parts_not_for_coarse_cells():
    scattered = torch.zeros(1, 1, 8, 8)
    scattered[..., ::2, ::2] = 1
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :2, :4] = 1
    region = KnownRegion(torch.zeros(1, 8, 4, 4), torch.cat([scattered, corner]))
    for side in SCALE_SIZES:
        everywhere, somewhere = region.known_mask((side, side))
        assert everywhere.all()
        expected = torch.zeros(side, side, dtype=torch.bool)
        if side == 4:
            expected[0, :2] = True
        assert torch.equal(somewhere, expected)
    # One of four pixels of the latent cells of the left half, and another pixel.
    scattered[..., 4:] = 0
    scattered[..., 0, 4] = 1
    left = KnownRegion(torch.zeros(1, 8, 4, 4), scattered).known_mask((2, 2))
    assert left.tolist() == [[[True, False], [True, False]]]


@torch.no_grad()
@pytest.mark.parametrize("cells", ["spread", "all", "majority", "any"])
@pytest.mark.parametrize("seed", range(5))
def test_original_tokens_are_those_of_the_image(cells, seed):
    vqvae = tiny_vqvae()
    latents = vqvae.encode(random_pixels(seed=seed)).latents
    whole = vqvae.quantize_latents(latents)
    region = KnownRegion(latents, random_mask(8, 8, seed), cells, tokens="original")
    sizes, first = [(1, 1), (2, 2), (4, 4)], 0
    for index, size in enumerate(sizes):
        token_ids = region.token_ids(vqvae, torch.randn_like(latents), sizes[:index], size)
        part = whole[:, first : first + size[0] * size[1]]
        mask = region.known_mask(size).flatten(1)
        assert torch.equal(token_ids, torch.where(mask, part, -1))
        first += size[0] * size[1]


@torch.no_grad()
def test_adaptive_tokens_of_a_known_image_are_the_originals_and_repair_other_states():
    vqvae = tiny_vqvae()
    latents = vqvae.encode(random_pixels()).latents
    known = torch.ones(2, 1, 8, 8)
    region = KnownRegion(latents, known)
    sizes = [(1, 1), (2, 2), (4, 4)]
    whole, state, drawn = vqvae.quantize_latents(latents), torch.zeros_like(latents), []
    for index, size in enumerate(sizes):
        token_ids = region.token_ids(vqvae, state, sizes[:index], size)
        drawn.append(token_ids)
        state = state + vqvae.residual_map(token_ids.unflatten(1, size))
    assert torch.equal(torch.cat(drawn, dim=1), whole)
    # From a wrong state, the code nearest to what is missing is taken.
    wrong = torch.randn_like(latents)
    expected = vqvae.quantize_latents(latents - wrong, [(2, 2)])
    assert torch.equal(region.token_ids(vqvae, wrong, sizes[:1], (2, 2)), expected)


@torch.no_grad()
def test_adaptive_tokens_average_known_positions_only():
    vqvae = tiny_vqvae()
    latents = vqvae.encode(random_pixels()).latents
    known = torch.zeros(2, 1, 8, 8)
    known[..., :4] = 1
    region, state = KnownRegion(latents, known, "any"), torch.zeros_like(latents)
    expected = vqvae.quantize_latents(latents[..., :2].mean(dim=(2, 3), keepdim=True), [(1, 1)])
    assert torch.equal(region.token_ids(vqvae, state, [], (1, 1)), expected)
    other = latents.clone()
    other[..., 2:] += 100
    assert torch.equal(KnownRegion(other, known, "any").token_ids(vqvae, state, [], (1, 1)), expected)


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


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (20, 13), (16, 16)])
def test_windows_cover_the_canvas_and_leave_given_pixels(size):
    pixels = random_pixels(*size, batch_size=1)
    known = torch.zeros(1, 1, *size)
    known[..., :3, :3] = 1
    canvas = WindowedCanvas(pixels, known, (8, 8))
    shares = []
    for rows, columns in canvas.windows():
        assert (rows.stop - rows.start, columns.stop - columns.start) == (8, 8)
        assert canvas.known[..., rows, columns].min() == 0
        shares.append(canvas.known[..., rows, columns].mean().item())
        canvas.add(rows, columns, torch.full((1, 3, 8, 8), 0.5))
    assert canvas.known.min() == 1
    assert all(share > 0 for share in shares)
    torch.testing.assert_close(canvas.pixels, torch.where(known == 1, pixels, torch.tensor(0.5)))


def test_windows_fade_into_each_other():
    canvas = WindowedCanvas(torch.zeros(1, 3, 8, 12), torch.zeros(1, 1, 8, 12), (8, 8))
    for value, (rows, columns) in enumerate([(slice(0, 8), slice(0, 8)), (slice(0, 8), slice(4, 12))]):
        canvas.add(rows, columns, torch.full((1, 3, 8, 8), float(value)))
    profile = canvas.pixels[0, 0, 4]
    assert (profile[:4] == 0).all()
    assert (profile[8:] == 1).all()
    assert (profile.diff() >= 0).all()
    assert profile.diff().max() < 0.5


@pytest.mark.parametrize("factor", [2, 4])
def test_projected_images_become_the_small_ones_again(factor):
    large = resize(random_pixels(8, 8), (32, 32)) * 0.8
    small = resize(large, (32 // factor, 32 // factor))
    start = (large + 0.1 * random_pixels(32, 32, seed=5)).clamp(-1, 1)
    projected = project_to_low_resolution(start, small)
    assert (resize(projected, small.shape[-2:]) - small).abs().max() < 1e-3
    assert (resize(start, small.shape[-2:]) - small).abs().max() > 1e-2
    # Of all images that give the small one, it is nearer to the start than the true one.
    assert (projected - start).norm() < (large - start).norm()


@pytest.mark.parametrize("padding", [0, -1, (1, 2, 3), (1, 2, 3, -4), (0, 0, 0, 0), 1.5, (1, 1, 1, 0.5)])
def test_paddings_that_make_no_sense_are_refused(padding):
    with pytest.raises(ValueError, match="`padding` must be one or four"):
        check_padding(padding)


def test_paddings_of_one_or_four_numbers():
    assert check_padding(3) == (3, 3, 3, 3)
    assert check_padding([1, 0, 2, 0]) == (1, 0, 2, 0)
