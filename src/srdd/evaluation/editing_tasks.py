"""Inpainting, outpainting and enlarging as tasks with a known answer, and fillings to compare with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from srdd import SRDDInpaintPipeline, SRDDPipeline, SRDDSuperResolutionPipeline
from srdd.evaluation.editing_masks import MASK_KINDS, make_mask
from srdd.pipelines.known_region import extend_known
from srdd.pipelines.pixel_regions import resize


EDITING_TASKS = (*MASK_KINDS, "outpaint", "2x", "4x")

FILLINGS = ("mean", "smooth")


def editing_mask(task: str, height: int, width: int, seeds: Sequence[int]) -> torch.Tensor:
    """
    Masks of one task, 1 where pixels are hidden.

    Args:
        task (`str`): One of RePaint's kinds ([`~srdd.evaluation.editing_masks.make_mask`]), or `"outpaint"`: all but
            the middle half of each side.
        height (`int`): Height of the images.
        width (`int`): Width of the images.
        seeds (`Sequence[int]`): One for each image.

    Returns:
        `torch.Tensor` of shape `(len(seeds), 1, height, width)`, float32.
    """
    if task == "outpaint":
        mask = torch.ones(len(seeds), 1, height, width)
        mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
        return mask
    return torch.stack([make_mask(task, height, width, torch.Generator().manual_seed(seed)) for seed in seeds])


def given_pixels(task: str, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """
    What a task shows of images: hidden pixels grey, or a small image in large squares.

    Args:
        task (`str`): One of `EDITING_TASKS`.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
        seeds (`Sequence[int]`): One for each image.
    """
    if factor := _factor(task):
        return F.interpolate(_small(images, factor), size=images.shape[-2:], mode="nearest")
    return torch.where(editing_mask(task, *images.shape[-2:], seeds).to(images) > 0, 0.5, images)


def fill(task: str, images: torch.Tensor, seeds: Sequence[int], filling: str = "mean") -> torch.Tensor:
    """
    Results of a method that draws nothing: enlargements are bicubic, holes are filled.

    Args:
        task (`str`): One of `EDITING_TASKS`.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
        seeds (`Sequence[int]`): One for each image.
        filling (`str`, defaults to `"mean"`): Of holes: the `"mean"` colour of the known pixels, or a `"smooth"`
            continuation of them ([`~srdd.pipelines.known_region.extend_known`]).

    Returns:
        `torch.Tensor` of the shape of `images`, in [0, 1].

    Raises:
        ValueError: If `task` or `filling` is unknown.
    """
    if filling not in FILLINGS:
        raise ValueError(f"`filling` must be one of {FILLINGS}, got {filling!r}.")
    if factor := _factor(task):
        return resize(_small(images, factor) * 2 - 1, images.shape[-2:]).add(1).div(2)
    given = 1 - editing_mask(task, *images.shape[-2:], seeds).to(images)
    if filling == "smooth":
        return extend_known(images, given).clamp(0, 1)
    mean = (images * given).sum(dim=(2, 3), keepdim=True) / given.sum(dim=(2, 3), keepdim=True)
    return torch.where(given > 0, images, mean)


@torch.no_grad()
def edit(
    pipe: SRDDPipeline,
    task: str,
    images: torch.Tensor,
    class_labels: list[int] | None,
    seeds: Sequence[int],
    guidance_scale: float | None = None,
    **options,
) -> torch.Tensor:
    """
    Solve a task with the parts of a pipeline.

    Args:
        pipe ([`SRDDPipeline`]): Its tokenizer, transformer and scheduler are used.
        task (`str`): One of `EDITING_TASKS`.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1], of the model's size.
        class_labels (`list[int]`, *optional*): One for each image.
        seeds (`Sequence[int]`): One for each image: of its mask and of what is drawn.
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
        options: More arguments of the inpainting or super-resolution pipeline.

    Returns:
        `torch.Tensor` of the shape of `images`, in [0, 1].
    """
    options = {
        "class_labels": class_labels,
        "guidance_scale": guidance_scale,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        **options,
    }
    factor = _factor(task)
    editor = (SRDDSuperResolutionPipeline if factor else SRDDInpaintPipeline)(**pipe.components)
    editor.set_progress_bar_config(disable=True)
    if factor:
        return editor(_small(images, factor), factor, **options).images
    height, width = images.shape[-2:]
    if task == "outpaint":
        top, left = height // 4, width // 4
        middle = images[..., top : height - top, left : width - left]
        return editor.outpaint(middle, (left, top, left, top), **options).images
    return editor(images, editing_mask(task, height, width, seeds), **options).images


def _factor(task: str) -> int:
    """How many times a task enlarges; 0 if it does not."""
    if task not in EDITING_TASKS:
        raise ValueError(f"`task` must be one of {EDITING_TASKS}, got {task!r}.")
    return int(task[:-1]) if task.endswith("x") else 0


def _small(images: torch.Tensor, factor: int) -> torch.Tensor:
    return resize(images * 2 - 1, [side // factor for side in images.shape[-2:]]).add(1).div(2)
