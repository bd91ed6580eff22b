"""What conversion must know of a family of public weights; each has a file, and `families.py` the table of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srdd.conversion.official_config import Shapes, transformer_config
from srdd.conversion.official_layout import TRANSFORMER_BUFFERS, Origin, transformer_origins


@dataclass(frozen=True)
class PublishedSettings:
    """
    How the authors draw with one of their models for their numbers.

    Args:
        name (`str`): The file of the weights, without its ending.
        depth (`int`): Number of blocks.
        guidance_scale (`float`): In diffusers' sense: `1 + cfg` of their code. It grows linearly over the scales.
        top_k (`int`): As in [`ScaleScheduler`].
        top_p (`float`): As in [`ScaleScheduler`].
    """

    name: str
    depth: int
    guidance_scale: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Family:
    """
    A family of public weights, of VAR's transformer or one that it can stand for.

    Args:
        title (`str`): Its name, as its authors write it.
        model_names (`tuple[str, ...]`): What training checkpoints of it call the transformer.
        prefix (`str`): With what at least one key of its transformers begins.
        published ([`PublishedSettings`]): The settings of its models.
        source (`str`): Where its code is.
        licence (`dict[str, str]`): As the header of a model card has it.
        licence_note (`str`): What is to be known of it.
        citation (`str`): In BibTeX.
        attention_pattern (`str`): That of its models.
        is_sure (`Callable`): Whether a transformer's state dict can be of no other family.
        config (`Callable`): Arguments of [`ScaleTransformer2DModel`], from shapes, scale sizes, codebook size and
            latent channels.
        origins (`Callable`): Where its tensors are, by our key, from our shapes and those of the state dict.
        left_out (`re.Pattern`): Keys that are not converted.
        about (`str`, defaults to `""`): What is special about its models, and what of them is not converted.
    """

    title: str
    model_names: tuple[str, ...]
    prefix: str
    published: tuple[PublishedSettings, ...]
    source: str
    licence: Mapping[str, str]
    licence_note: str
    citation: str
    attention_pattern: str
    is_sure: Callable[[Mapping[str, torch.Tensor]], bool]
    config: Callable[[Shapes, Sequence[int], int, int], dict[str, Any]] = transformer_config
    origins: Callable[[Shapes, Shapes], dict[str, Origin]] = transformer_origins
    left_out: re.Pattern = TRANSFORMER_BUFFERS
    about: str = ""

    def of_depth(self, depth: int) -> list[PublishedSettings]:
        """The settings of models of a depth, or of those that are next to it."""
        distance = min(abs(settings.depth - depth) for settings in self.published)
        return [settings for settings in self.published if abs(settings.depth - depth) == distance]

    def settings(self, depth: int, path: Path) -> PublishedSettings:
        """The settings of a model of a depth; where its authors have several, those of the file's name."""
        settings = self.of_depth(depth)
        return next((each for each in settings if each.name == path.stem), settings[0])
