"""Calls of pipelines, for processes with and without srdd: nothing here may import it."""

from collections.abc import Callable
from typing import Any

import torch


def image(side: int) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def mask() -> torch.Tensor:
    half = torch.zeros(1, 1, 8, 8)
    half[..., :4] = 1
    return half


# What is told by class and from texts, and what editing is told beside that.
BY_CLASS = {"class_labels": "quince"}
FROM_TEXTS = {"prompt": "a cat", "negative_prompt": "fog"}
TASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "draw": dict,
    "inpaint": lambda: {"image": image(8), "mask_image": mask()},
    "super_resolution": lambda: {"image": image(4), "scale_factor": 2},
}


def draw_modular(pipe: Any, task: str) -> torch.Tensor:
    """What [`draw`] gives, of a modular pipeline for all tasks."""
    pipe.set_progress_bar_config(disable=True)
    told = FROM_TEXTS if "text_encoder" in pipe.components else BY_CLASS
    generator = torch.Generator().manual_seed(0)
    return pipe(**told, **TASKS[task](), generator=generator, output_type="pt", output="images")


def draw(pipe: Any, task: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    told = FROM_TEXTS if "text_encoder" in pipe.components else BY_CLASS
    generator = torch.Generator().manual_seed(0)
    return pipe(**told, **TASKS[task](), generator=generator, output_type="pt").images
