"""Enlarging: what holds for every kind of model, and, by class, sizes and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from families import POLICIES, each_family, seeded
from PIL import Image
from tiny_models import tiny_pipeline, tiny_scheduler

from srdd import SRDDSuperResolutionPipeline
from srdd.pipelines.pixel_regions import resize


BUNDLED = Path(__file__).parents[2] / "model_cards" / "srdd-fruits64"


def make_pipeline(**scheduler) -> SRDDSuperResolutionPipeline:
    return SRDDSuperResolutionPipeline.from_pipe(tiny_pipeline(scheduler=tiny_scheduler(**scheduler)))


def small_image(side=4, seed=0, batch_size=1) -> torch.Tensor:
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2


def draw(pipe, image, *seeds, **options):
    options = {"output_type": "pt", "scale_factor": 2, **options}
    return pipe(image=image, generator=seeded(*seeds or (0,)), **options)


@pytest.mark.parametrize("num_known", [None, 1, 3])
@each_family
def test_coarse_tokens_are_those_of_the_enlarged_image(family, num_known):
    pipe, image = family.pipeline("enlarge"), small_image()
    output = draw(pipe, image, num_known_scales=num_known, **family.told(1))
    assert output.images.shape == (1, 3, 8, 8)
    with torch.no_grad():
        tokens = pipe.vqvae.tokenize(resize(image * 2 - 1, (8, 8)))
    # Of an image of 4 x 4 pixels, the tokens of the scales 1 and 2 cover 2 x 2 or more.
    count = {1: 1, None: 5, 3: 21}[num_known]
    assert torch.equal(output.token_ids[:, :count], tokens[:, :count])
    if count < 21:
        assert not torch.equal(output.token_ids[:, count:], tokens[:, count:])


@each_family
def test_without_known_scales_it_is_plain_generation(family):
    pipe, told = family.pipeline("enlarge"), family.told(1)
    drawn = draw(pipe, small_image(), num_known_scales=0, consistent=False, **told)
    plain = family.pipeline()(generator=seeded(0), output_type="pt", **told)
    assert torch.equal(drawn.token_ids, plain.token_ids)
    torch.testing.assert_close(drawn.images, plain.images, atol=1e-5, rtol=0)


def check_consistency(pipe, side, factor, **told):
    image = small_image(side)
    output = draw(pipe, image, scale_factor=factor, **told)
    assert output.images.shape == (1, 3, side * factor, side * factor)
    error = resize(output.images * 2 - 1, (side, side)) - (image * 2 - 1)
    assert error.abs().mean() < 0.01
    free = draw(pipe, image, scale_factor=factor, consistent=False, **told).images
    assert (resize(free * 2 - 1, (side, side)) - (image * 2 - 1)).abs().mean() > 5 * error.abs().mean()


@each_family
def test_a_consistent_result_becomes_the_small_image_again(family):
    check_consistency(family.pipeline("enlarge"), 4, 2, **family.told(1))


@pytest.mark.parametrize(("side", "factor"), [(2, 4), (8, 2), (5, 3)])
def test_results_of_any_size_are_consistent(side, factor):
    check_consistency(make_pipeline(), side, factor, class_labels=1)


@pytest.mark.parametrize(("side", "policy"), [(4, "none"), (4, "simple"), (6, "masked"), (4, "remasked")])
@each_family
def test_an_image_does_not_depend_on_its_batch(family, side, policy):
    pipe = family.pipeline("enlarge", **POLICIES[policy])
    images = small_image(side, batch_size=2)
    together = draw(pipe, images, 3, 4, **family.told(0, 2))
    for index, number in enumerate((0, 2)):
        alone = draw(pipe, images[index : index + 1], 3 + index, **family.told(number))
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        # The projection goes on until no image of a batch moves by 1e-4 any more.
        torch.testing.assert_close(alone.images[0], together.images[index], atol=1e-3, rtol=0)


@each_family
def test_images_and_what_is_told_combine(family):
    pipe = family.pipeline("enlarge")
    several = draw(pipe, small_image(), 3, 4, 3, num_images_per_prompt=3, **family.told(2)).images
    assert torch.equal(several[0], several[2])
    assert not torch.equal(several[0], several[1])
    other = draw(pipe, small_image(), 3, 3, **family.told(2, 0)).images
    torch.testing.assert_close(other[0], several[0], atol=1e-3, rtol=0)
    assert (other[1] - other[0]).abs().max() > 0.01
    with pytest.raises(ValueError, match="must hold 1 or 2 (labels|texts) for 2 images, got 3"):
        draw(pipe, small_image(batch_size=2), **family.told(0, 1, 2))


def test_large_results_are_drawn_in_windows_and_small_ones_cut():
    pipe = make_pipeline()
    assert draw(pipe, small_image(10)).images.shape == (1, 3, 20, 20)
    assert draw(pipe, small_image(3)).images.shape == (1, 3, 6, 6)
    pictures = pipe(Image.new("RGB", (9, 5), "red"), scale_factor=3, num_images_per_prompt=2).images
    assert [picture.size for picture in pictures] == [(27, 15)] * 2


@pytest.mark.parametrize(("side", "num_known", "num_encoded"), [(4, 2, 1), (4, 0, 1), (6, 2, 7), (6, 0, 4)])
def test_the_first_window_is_encoded_once_and_others_for_hints_too(side, num_known, num_encoded):
    pipe, encoded = make_pipeline(), []
    pipe.vqvae.encoder.register_forward_hook(lambda module, args, output: encoded.append(args[0]))
    draw(pipe, small_image(side), num_known_scales=num_known, class_labels=1)
    assert len(encoded) == num_encoded


def test_at_least_one_scale_is_drawn():
    pipe = make_pipeline()
    assert [pipe.num_determined_scales(factor) for factor in (1, 2, 4, 8)] == [2, 2, 1, 1]
    pipe.scheduler = tiny_scheduler(scales=[1, 4])
    assert pipe.num_determined_scales(2) == 1
    pipe = SRDDSuperResolutionPipeline.from_pretrained(BUNDLED)
    # Scales 1 2 3 4 5 6 8 10 13 16 for 64 pixels; measured in benchmarks/EDITING.md.
    assert [pipe.num_determined_scales(factor) for factor in (2, 4, 8, 16)] == [9, 7, 4, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 1}, r"`scale_factor` must be an integer in \[2, 16384\], got 1"),
        ({"scale_factor": 2.5}, "`scale_factor` must be an integer in .* got 2.5"),
        ({"num_known_scales": 4}, r"`num_known_scales` must be an integer in \[0, 3\], got 4"),
        ({"output_type": "latent"}, "`output_type` must be 'pil', 'np' or 'pt' in super-resolution, got 'latent'"),
        ({"class_labels": [0, 1]}, "`generator` must be a list of 2 generators, got 1"),
        ({"scale_factor": 10**6}, "`scale_factor` must be an integer in .* got 1000000"),
        ({"scale_factor": 8192}, "`scale_factor` must give results of at most 16384 pixels a side, got 8192 for 4x4"),
        ({"consistent": 1}, "`consistent` must be True or False, got 1"),
        ({"class_labels": "pear"}, "`class_labels` must be names of classes"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(), small_image(), **changes)


def test_images_of_several_sizes_are_refused():
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))]
    with pytest.raises(ValueError, match=r"`image` must hold pictures of one size, got .*\[\(4, 4\), \(4, 5\)\]"):
        draw(make_pipeline(), images)
    with pytest.raises(ValueError, match=r"`image` cannot be read: its shape .*1, 3 or 4 channels.*\(1, 2, 4, 4\)"):
        draw(make_pipeline(), torch.zeros(1, 2, 4, 4))


def test_contrasts_that_no_picture_gives_are_said(caplog):
    pipe = make_pipeline()
    checkerboard = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).float().expand(1, 3, 4, 4)
    draw(pipe, small_image())
    assert not caplog.records
    draw(pipe, checkerboard)
    assert re.search(r"differs from `image` by up to \d\d of 255", caplog.records[0].getMessage())


def test_a_callback_ends_all_windows():
    pipe, seen = make_pipeline(), []

    def stop(pipe, index, timestep, tensors):
        seen.append(timestep)
        pipe._interrupt = len(seen) == 4
        return tensors

    pictures = pipe(Image.new("RGB", (12, 12)), 2, 1, callback_on_step_end=stop).images
    assert seen == [2, 1, 0, 2]
    assert pictures[0].size == (24, 24)
