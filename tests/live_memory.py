"""How many bytes of tensors are there at once: what a device's allocator would count, found without the device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """
    Counts the storages that operators return for as long as anything refers to them, those of meta tensors too. What
    kernels take for themselves, such as cuDNN's copies, is not seen.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return outputs


def peak_bytes(model: torch.nn.Module, call: Callable[..., Any], *inputs: torch.Tensor) -> tuple[int, int]:
    """The peak during a call without gradients, and what of it a model and the inputs have taken before."""
    counter = LiveBytes()
    for tensor in (*model.parameters(), *inputs):
        counter.add(tensor.data)
    before = counter.now
    with torch.no_grad(), counter:
        call(*inputs)
    return counter.peak, before
