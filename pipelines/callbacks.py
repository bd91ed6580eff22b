"""Callbacks of diffusers' form: what they are given, and what they may change."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from srdd.checks import shown
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


# What a callback may ask for.
TENSOR_INPUTS = ("latents", "token_ids")


def callback_tensor_inputs(callback: Any, tensor_inputs: Any) -> list[str]:
    """
    The names of what a callback is given.

    Args:
        callback (`Callable`, *optional*): The callback. diffusers' own kinds say themselves what they want.
        tensor_inputs (`list[str]`, *optional*): What the caller asks for; "latents" by default.

    Returns:
        `list[str]`

    Raises:
        ValueError: If the callback cannot be called, or something unknown is asked for.
    """
    if callback is not None and not callable(callback):
        raise ValueError(
            "`callback_on_step_end` must be callable as callback(pipe, step_index, timestep, callback_kwargs), got"
            f" {shown(callback)}."
        )
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    names = ["latents"] if tensor_inputs is None else tensor_inputs
    are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not are_names or not {*names} <= {*TENSOR_INPUTS}:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of {TENSOR_INPUTS}, got {shown(tensor_inputs)}."
        )
    return list(dict.fromkeys(names))


class StepEnd:
    """
    Calls a callback after a pass, and checks what it returns before the run goes on with it.

    Args:
        pipe ([`ScalePipeline`]): What the callback is given.
        callback (`Callable`): The callback.
        tensor_inputs (`Sequence[str]`): Which tensors it is given.
    """

    def __init__(self, pipe: Any, callback: Callable[[Any, int, int, dict], dict], tensor_inputs: Sequence[str]):
        self.pipe = pipe
        self.callback = callback
        self.tensor_inputs = tensor_inputs
        self.codebook_size = pipe.vqvae.config.codebook_size

    def __call__(self, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """
        Args:
            index (`int`): The pass.
            timestep (`int`): Its timestep.
            tensors (`dict[str, torch.Tensor]`): "latents" and "token_ids".

        Returns:
            `dict`: `tensors` with what the callback has changed, "guidance_scale" and "interrupt".

        Raises:
            ValueError: If the callback returns no dictionary, a name that it may not change, or a tensor that the run
                cannot go on with.
        """
        given = {name: tensors[name] for name in self.tensor_inputs}
        changed = self.callback(self.pipe, index, timestep, given)
        if not isinstance(changed, dict) or any(name not in tensors for name in changed):
            raise ValueError(
                f"`callback_on_step_end` must return a dictionary with some of {list(tensors)}, or an empty one, got"
                f" {shown(changed if not isinstance(changed, dict) else list(changed))}."
            )
        for name, tensor in changed.items():
            if tensor is not tensors[name]:
                self._check(name, tensor, tensors[name])
        guidance_scale = self.pipe.guidance_scale
        if not isinstance(guidance_scale, Real) or not abs(guidance_scale) < float("inf"):
            raise ValueError(
                f"`_guidance_scale`, which a callback set, must be a finite number, got {shown(guidance_scale)}."
            )
        return {**tensors, **changed, "guidance_scale": guidance_scale, "interrupt": self.pipe.interrupt}

    def _check(self, name: str, tensor: Any, replaced: torch.Tensor) -> None:
        """Raise a `ValueError` for a tensor that cannot stand in the place of another."""
        right = (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == replaced.shape
            and tensor.is_floating_point() == replaced.is_floating_point()
            and tensor.dtype != torch.bool
        )
        if right and name == "token_ids":
            is_drawn = replaced != MASK_TOKEN_ID
            right = bool(torch.where(is_drawn, (tensor >= 0) & (tensor < self.codebook_size), tensor < 0).all())
        elif right:
            right = bool(tensor.isfinite().all())
        if not right:
            rule = (
                f"ids in [0, {self.codebook_size - 1}] where one is drawn" if name == "token_ids" else "finite floats"
            )
            is_tensor = isinstance(tensor, torch.Tensor)
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if is_tensor else shown(tensor)
            raise ValueError(
                f"`callback_on_step_end` must return {name!r} that are {rule}, of shape {tuple(replaced.shape)}, got"
                f" {given}{' with others' if is_tensor and tensor.shape == replaced.shape else ''}."
            )
