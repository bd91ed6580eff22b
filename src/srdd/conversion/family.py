"""What conversion must know of a family of public weights; each has a file, and `families.py` the table of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from srdd.conversion.official_config import KNOWN_SCALES, OfficialTransformer, Shapes, transformer_config
from srdd.conversion.official_layout import TRANSFORMER_BUFFERS, Origin, transformer_origins
from srdd.models import ScaleTransformer2DModel
from srdd.pipelines import SRDDPipeline
from srdd.pipelines.scale_pipeline import ScalePipeline


@dataclass(frozen=True)
class PublishedSettings:
    """
    How the authors draw with one of their models for their numbers.

    Args:
        name (`str`): The file of the weights, without its ending, or the repository of the Hub.
        depth (`int`): Number of blocks.
        guidance_scale (`float`): In diffusers' sense: `1 + cfg` of their code. It grows linearly over the scales.
        top_k (`int`): As in [`ScaleScheduler`].
        top_p (`float`): As in [`ScaleScheduler`].
        scale_sizes (`tuple[int, ...]`, *optional*): Its scales; those of 256 pixels by default.
        num_guided_scales (`int`, *optional*): How many of them are drawn with guidance, from the coarsest on; all by
            default.
        unguided_temperature (`float`, defaults to 1.0): The temperature of the others.
    """

    name: str
    depth: int
    guidance_scale: float
    top_k: int
    top_p: float
    scale_sizes: tuple[int, ...] = KNOWN_SCALES[256]
    num_guided_scales: int | None = None
    unguided_temperature: float = 1.0

    def scheduler_options(self, scale_sizes: list[int]) -> dict[str, Any]:
        """
        Options of [`ScaleScheduler`] by which models of some scales draw. What is said of single scales holds for
        those of the published model alone.
        """
        options = {"guidance_scale": self.guidance_scale, "top_k": self.top_k, "top_p": self.top_p}
        if self.num_guided_scales is not None and tuple(scale_sizes) == self.scale_sizes:
            num_scales, num_guided = len(scale_sizes), self.num_guided_scales
            options["guidance_stop"] = num_guided / num_scales
            options["temperature"] = [1.0] * num_guided + [self.unguided_temperature] * (num_scales - num_guided)
        return options


@dataclass(frozen=True)
class Family:
    """
    A family of public weights: a transformer of ours that can stand for theirs, behind VAR's tokenizer.

    Args:
        title (`str`): Its name, as its authors write it.
        prefix (`str`): With what keys of its transformers begin. Where it is that of several families, containers and
            tables tell; where several are in a state dict, the one that stands last in the table of families.
        published ([`PublishedSettings`]): The settings of its models.
        source (`str`): Where its code is.
        licence (`dict[str, str]`): As the header of a model card has it.
        licence_note (`str`): What is to be known of it.
        citation (`str`): In BibTeX.
        attention_pattern (`str`): That of its models, where `config` does not say it.
        model_names (`tuple[str, ...]`, defaults to `()`): What training checkpoints of it call the transformer.
        is_sure (`Callable`, *optional*): Whether a transformer's state dict can be of no other family that has the
            same prefix; never by default.
        transformer (`type`, *optional*): The class that stands for its transformer; [`ScaleTransformer2DModel`] by
            default.
        pipeline (`type`, *optional*): The class of its pipelines; [`SRDDPipeline`] by default.
        config (`Callable`, *optional*): Arguments of `transformer`; those of VAR's by default.
        origins (`Callable`, *optional*): Where the tensors of `transformer` are, by our key, from our shapes and those
            of the state dict; as in VAR's by default.
        left_out (`re.Pattern`, *optional*): Keys that are not converted; VAR's tables by default.
        about (`str`, defaults to `""`): What is special about its models, and what of them is not converted.
    """

    title: str
    prefix: str
    published: tuple[PublishedSettings, ...]
    source: str
    licence: Mapping[str, str]
    licence_note: str
    citation: str
    attention_pattern: str
    model_names: tuple[str, ...] = ()
    is_sure: Callable[[Mapping[str, torch.Tensor]], bool] = lambda state: False
    transformer: type[ModelMixin] = ScaleTransformer2DModel
    pipeline: type[ScalePipeline] = SRDDPipeline
    config: Callable[[OfficialTransformer], dict[str, Any]] = transformer_config
    origins: Callable[[Shapes, Shapes], dict[str, Origin]] = transformer_origins
    left_out: re.Pattern = TRANSFORMER_BUFFERS
    about: str = ""

    @property
    def published_scales(self) -> tuple[tuple[int, ...], ...]:
        """The lists of scales of its models."""
        return tuple(dict.fromkeys(settings.scale_sizes for settings in self.published))

    def of_depth(self, depth: int) -> list[PublishedSettings]:
        """The settings of models of a depth, or of those that are next to it."""
        distance = min(abs(settings.depth - depth) for settings in self.published)
        return [settings for settings in self.published if abs(settings.depth - depth) == distance]

    def settings(self, depth: int, scale_sizes: list[int], path: Path) -> PublishedSettings:
        """The settings of a model of a depth; where its authors have several, those of its scales and file's name."""
        return min(
            self.of_depth(depth),
            key=lambda settings: (settings.scale_sizes != tuple(scale_sizes), settings.name != path.stem),
        )
