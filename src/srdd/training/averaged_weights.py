"""Averaged weights (EMA) of models whose parameters may be sharded over processes."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class AveragedWeights(EMAModel):
    """
    diffusers' `EMAModel`, also for the sharded parameters of FSDP2: each process averages its shards, and checkpoints
    and copies hold whole tensors. `state_dict`, `load_state_dict` and `copy_to` are called on all processes.

    A parameter that is frozen from the start is its own average, so that an adapter's base is not kept twice:
    `load_state_dict` writes into it, as loading the model does.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        parameters = list(parameters)
        # Sharded parameters that are frozen, as a LoRA's are, cannot be copied many at a time.
        one_by_one = any(isinstance(parameter, DTensor) and not parameter.requires_grad for parameter in parameters)
        super().__init__([], decay=decay, foreach=not one_by_one)
        self.shadow_params = [
            parameter.clone().detach() if parameter.requires_grad else parameter.detach() for parameter in parameters
        ]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "shadow_params": [whole(shadow) for shadow in self.shadow_params]}

    def load_state_dict(self, state_dict: dict) -> None:
        own = self.shadow_params
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for shadow, loaded in zip(own, self.shadow_params, strict=True):
                loaded = loaded.to(shadow.device, shadow.dtype)
                if isinstance(shadow, DTensor):
                    loaded = distribute_tensor(loaded, shadow.device_mesh, shadow.placements)
                shadow.copy_(loaded)
        self.shadow_params = own

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter, shadow in zip(parameters, self.shadow_params, strict=True):
            parameter.copy_(whole(shadow))
