"""Every kind of model that draws, at tiny size, for tests of what all of them can do."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from tiny_models import (
    tiny_history_transformer,
    tiny_pipeline,
    tiny_scheduler,
    tiny_text_transformer,
    tiny_transformer,
)
from tiny_texts import tiny_text_pipeline

from srdd import (
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextPipeline,
    SRDDTextSuperResolutionPipeline,
)
from srdd.models import ScaleTransformer
from srdd.pipelines.scale_pipeline import ScalePipeline


# Pipelines by what they do: those that draw by class, and those that draw from texts.
TASKS = {
    "draw": (SRDDPipeline, SRDDTextPipeline),
    "inpaint": (SRDDInpaintPipeline, SRDDTextInpaintPipeline),
    "enlarge": (SRDDSuperResolutionPipeline, SRDDTextSuperResolutionPipeline),
}

TEXTS = ("red", "a cat", "", "two", "sun")

# All ways to refine a scale; the threshold lies so that the tiny models redraw some tokens and keep others.
POLICIES = {
    "none": {},
    "simple": {"resampling_policy": "simple", "num_resampling_passes": 1},
    "masked": {"resampling_policy": "masked", "resampling_threshold": 0.1, "num_resampling_passes": 2},
    "remasked": {"resampling_policy": "remasked", "resampling_threshold": 0.1, "num_resampling_passes": 2},
}


@dataclass(frozen=True)
class Family:
    """
    A kind of model.

    Args:
        name (`str`): What tests call it.
        make_transformer (`Callable`): Makes its transformer.
        draws_from_texts (`bool`, defaults to `False`): Whether it is told texts, and not classes.
    """

    name: str
    make_transformer: Callable[[], ScaleTransformer]
    draws_from_texts: bool = False

    def new_pipeline(self) -> ScalePipeline:
        """A pipeline that draws, of new models, without a progress bar."""
        make = tiny_text_pipeline if self.draws_from_texts else tiny_pipeline
        return make(transformer=self.make_transformer())

    def pipeline(self, task: str = "draw", **scheduler: Any) -> ScalePipeline:
        """A pipeline over models that tests share, and must leave as they are; `scheduler` are config values."""
        cls = TASKS[task][self.draws_from_texts]
        return cls.from_pipe(_shared_pipeline(self), scheduler=tiny_scheduler(**scheduler))

    def told(self, *numbers: int) -> dict[str, Any]:
        """Arguments of a call that draws these of five things."""
        if self.draws_from_texts:
            return {"prompt": [TEXTS[number] for number in numbers]}
        return {"class_labels": [*numbers]}


@cache
def _shared_pipeline(family: Family) -> ScalePipeline:
    return family.new_pipeline()


# A further kind of model is a further line.
FAMILIES = (
    Family("class markov", tiny_transformer),
    Family("class causal", partial(tiny_transformer, "causal")),
    Family("class banded", partial(tiny_transformer, "banded")),
    Family("class windows", partial(tiny_transformer, attention_windows=[0, 0, 3])),
    Family("class history", tiny_history_transformer),
    Family("class causal history", partial(tiny_history_transformer, "causal")),
    Family("text markov", tiny_text_transformer, draws_from_texts=True),
    Family("text causal", partial(tiny_text_transformer, "causal"), draws_from_texts=True),
)

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def seeded(*seeds: int) -> list[torch.Generator]:
    """Generators, one for each image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
