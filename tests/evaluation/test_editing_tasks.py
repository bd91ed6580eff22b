import pytest
import torch
from tiny_models import tiny_pipeline

from srdd.evaluation.editing_tasks import EDITING_TASKS, edit, editing_mask, fill, given_pixels


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
SEEDS = [3, 4]
MASKED = [task for task in EDITING_TASKS if not task.endswith("x")]


@pytest.mark.parametrize("task", MASKED)
def test_fillings_and_results_keep_what_is_given(task):
    hidden = editing_mask(task, 8, 8, SEEDS).expand_as(IMAGES) > 0
    assert 0 < hidden.float().mean() < 1
    results = [
        fill(task, IMAGES, SEEDS),
        fill(task, IMAGES, SEEDS, "smooth"),
        edit(tiny_pipeline(), task, IMAGES, [0, 3], SEEDS),
    ]
    for result in results:
        torch.testing.assert_close(result[~hidden], IMAGES[~hidden], atol=1e-6, rtol=0)
        assert not torch.allclose(result[hidden], IMAGES[hidden], atol=1e-2)
    given = given_pixels(task, IMAGES, SEEDS)
    assert torch.equal(given[~hidden], IMAGES[~hidden])
    assert (given[hidden] == 0.5).all()


def test_the_mean_filling_has_the_mean_of_known_pixels_only():
    filled = fill("genhalf", IMAGES, SEEDS)
    wanted = IMAGES[..., :4].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 8, 4)
    torch.testing.assert_close(filled[..., 4:], wanted)


def test_outpainting_knows_the_middle():
    mask = editing_mask("outpaint", 8, 12, [0])
    assert mask.shape == (1, 1, 8, 12)
    assert mask[0, 0, 2:6, 3:9].sum() == 0
    assert mask.sum() == 8 * 12 - 4 * 6


@pytest.mark.parametrize("task", ["2x", "4x"])
def test_enlargements_start_from_a_small_image(task):
    factor = int(task[0])
    given = given_pixels(task, IMAGES, SEEDS)
    small = given[..., ::factor, ::factor]
    assert torch.equal(small.repeat_interleave(factor, -1).repeat_interleave(factor, -2), given)
    smooth, result = fill(task, IMAGES, SEEDS), edit(tiny_pipeline(), task, IMAGES, [0, 3], SEEDS)
    assert smooth.shape == result.shape == IMAGES.shape
    # Projected: made small again, it is what was given.
    again = given_pixels(task, result, SEEDS)[..., ::factor, ::factor]
    assert (again - small).abs().mean() < (smooth - IMAGES).abs().mean() / 2


def test_an_image_does_not_depend_on_its_batch():
    pipe = tiny_pipeline()
    for task in ("thick", "outpaint", "2x"):
        together = edit(pipe, task, IMAGES, [0, 3], SEEDS, guidance_scale=2.0)
        alone = edit(pipe, task, IMAGES[1:], [3], SEEDS[1:], guidance_scale=2.0)
        torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["3x", "half", ""])
def test_unknown_tasks_are_refused(task):
    for call in (lambda: given_pixels(task, IMAGES, SEEDS), lambda: fill(task, IMAGES, SEEDS)):
        with pytest.raises(ValueError, match="`task` must be one of"):
            call()


def test_unknown_fillings_are_refused():
    with pytest.raises(ValueError, match="`filling` must be one of"):
        fill("nn2", IMAGES, SEEDS, "black")
