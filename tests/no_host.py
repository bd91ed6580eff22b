"""
What code for accelerators must not do where the host shall not wait, found without one.

It runs on the device "meta", whose tensors have shapes but no numbers: to read one is an error.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


# Functions that send numbers from the host, which waits until the device has them.
SENDING = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor}


class RefuseTransfers(TorchFunctionMode):
    """Raises an error where numbers are sent to a device, and where anything is computed beside it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in SENDING:
            raise AssertionError(f"{function.__name__} sends numbers from the host")
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if "cpu" in devices and isinstance(result, torch.Tensor):
            raise AssertionError(f"{function.__name__} works on {sorted(devices)}")
        return result
