from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


Images = TypeVar("Images")
Told = ParamSpec("Told")


@dataclass
class SRDDPipelineOutput(BaseOutput, Generic[Images]):
    """
    Output of the SRDD pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            For `output_type` "pil" a list of pictures; for "np" an array of shape `(batch, height, width, 3)` in
            [0, 1]; for "pt" a tensor of shape `(batch, 3, height, width)` in [0, 1]; for "latent" the latent state of
            shape `(batch, latent_channels, latent_height, latent_width)`.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`):
            The packed token pyramid over the scheduler's scales.
    """

    images: Images
    token_ids: torch.LongTensor


class Drawing(Protocol[Told]):
    """What type checkers know of a method that draws: its own signature, and what follows from two of its options."""

    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **told: Any) -> tuple[Any, torch.LongTensor]: ...
    @overload
    def __call__(self, *args: Any, output_type: Literal["np"], **told: Any) -> SRDDPipelineOutput[np.ndarray]: ...
    @overload
    def __call__(
        self, *args: Any, output_type: Literal["pt", "latent"], **told: Any
    ) -> SRDDPipelineOutput[torch.Tensor]: ...
    @overload
    def __call__(self, *args: Any, output_type: str, **told: Any) -> SRDDPipelineOutput[Any]: ...
    @overload
    def __call__(self, *args: Told.args, **told: Told.kwargs) -> SRDDPipelineOutput[list[PIL.Image.Image]]: ...


def draws(method: Callable[Concatenate[Any, Told], SRDDPipelineOutput | tuple]) -> Drawing[Told]:
    """Decorator of methods with `output_type`, "pil" by default, and `return_dict`, for type checkers alone."""
    return method
