"""Which tokens follow from the known part of an image, and how that part is continued."""

import pytest
import torch
from tiny_models import SCALE_SIZES, tiny_scheduler, tiny_vqvae
from tiny_pictures import random_mask, random_pixels

from srdd.pipelines.known_region import KnownRegion, coarse_tokens, extend_known


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


def test_scattered_pixels_speak_for_what_is_between_them_and_small_parts_not_for_coarse_cells():
    scattered = torch.zeros(1, 1, 8, 8)
    scattered[..., ::2, ::2] = 1
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :2, :4] = 1
    region = KnownRegion(None, torch.zeros(1, 8, 4, 4), torch.cat([scattered, corner]))
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
    left = KnownRegion(None, torch.zeros(1, 8, 4, 4), scattered).known_mask((2, 2))
    assert left.tolist() == [[[True, False], [True, False]]]


@torch.no_grad()
def test_tokens_of_a_known_image_are_its_own_and_repair_other_states():
    vqvae, scheduler = tiny_vqvae(), tiny_scheduler()
    latents = vqvae.encode(random_pixels()).latents
    region = KnownRegion(vqvae, latents, torch.ones(2, 1, 8, 8))
    whole, state, forced = vqvae.quantize_latents(latents), torch.zeros_like(latents), []
    for scale in scheduler.visits:
        forced.append(region.token_ids(scale, state))
        state = state + vqvae.residual_map(forced[-1].unflatten(1, scale.size))
    assert torch.equal(torch.cat(forced, dim=1), whole)
    # From a wrong state, the code nearest to what is missing is taken.
    wrong = torch.randn_like(latents)
    expected = vqvae.quantize_latents(latents - wrong, [(2, 2)])
    assert torch.equal(region.token_ids(scheduler.visits[1], wrong), expected)


@torch.no_grad()
def test_tokens_average_known_positions_only():
    vqvae, coarsest = tiny_vqvae(), tiny_scheduler().visits[0]
    latents = vqvae.encode(random_pixels()).latents
    known = torch.zeros(2, 1, 8, 8)
    known[..., :5] = 1
    state = torch.zeros_like(latents)
    # Half of the pixels of the third column of cells are known.
    weights = torch.tensor([1, 1, 0.5, 0])
    means = (latents * weights).sum(dim=(2, 3), keepdim=True) / (4 * weights.sum())
    expected = vqvae.quantize_latents(means, [(1, 1)])
    assert (expected >= 0).all()
    other = latents.clone()
    other[..., 3:] += 100
    for each in (latents, other):
        assert torch.equal(KnownRegion(vqvae, each, known).token_ids(coarsest, state), expected)


@torch.no_grad()
def test_hints_are_known_everywhere():
    vqvae, scheduler, pixels = tiny_vqvae(), tiny_scheduler(), random_pixels()
    assert coarse_tokens(vqvae, pixels, []) is None
    hints = coarse_tokens(vqvae, pixels, scheduler.scales[:2])
    assert torch.equal(hints, vqvae.tokenize(pixels)[:, :5])
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    region = KnownRegion(vqvae, latents, torch.zeros(2, 1, 8, 8), hints)
    forced = torch.cat([region.token_ids(scale, torch.zeros_like(latents)) for scale in scheduler.visits], dim=1)
    assert torch.equal(forced[:, :5], hints)
    assert (forced[:, 5:] == -1).all()
