from pathlib import Path

import pytest

import srdd.schedulers
from srdd import ScaleScheduler


PRESETS = Path(srdd.schedulers.__file__).parent / "presets"

SCALES = {
    "sdd-10": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "srdd-10": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "distilled-6": [1, 3, 5, 8, 13, 16],
    "distilled-5": [1, 5, 8, 13, 16],
    "sparse-4": [1, 5, 13, 16],
    "early-heavy-7": [1, 2, 3, 4, 5, 8, 16],
    "random-sparse-4": [1, 4, 8, 16],
}


def test_all_presets_are_known():
    assert {folder.name for folder in PRESETS.iterdir()} == set(SCALES)


@pytest.mark.parametrize(("name", "sides"), SCALES.items())
def test_preset_has_the_scales_of_its_name(name, sides):
    scheduler = ScaleScheduler.from_pretrained(PRESETS / name)
    assert scheduler.scales == [[side, side] for side in sides]
    assert scheduler.config.scale_sizes == [[side, side] for side in SCALES["sdd-10"]]
    assert scheduler.num_inference_steps == len(sides)


@pytest.mark.parametrize("name", SCALES)
def test_only_srdd_resamples(name):
    scheduler = ScaleScheduler.from_pretrained(PRESETS / name)
    assert (scheduler.config.resampling_policy == "masked") == (name == "srdd-10")
    assert scheduler.config.resampling_threshold == 0.01
    assert scheduler.config.guidance_schedule == "linear"
