"""Whether losses and gradients are numbers, asked without making the host wait for the device."""

import math
from collections.abc import Callable

import torch


# What is raised, from the step and those values that are not finite.
Message = Callable[[int, dict[str, float]], str]


class FiniteCheck:
    """
    Finds the first values that are not finite.

    On a CPU they are read as they come. From an accelerator they are not: a host that reads in every step cannot work
    ahead of its device. Values stay there until [`~FiniteCheck.read`] is called, which takes them all at once.

    Args:
        device (`torch.device`): Where the values are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reads_at_once = device.type == "cpu"
        self._unread: list[tuple[int, list[str], torch.Tensor, Message]] = []

    def add(self, step: int, values: dict[str, torch.Tensor], message: Message) -> None:
        """
        Check the values of a step, on accelerators when they are read.

        Args:
            step (`int`): The step that is being taken.
            values (`dict[str, torch.Tensor]`): Scalars.
            message (`Callable`): Called with the step and a dictionary of the values that are not finite.

        Raises:
            FloatingPointError: On CPUs, if one of the values is not finite.
        """
        stacked = torch.stack([value.detach().float() for value in values.values()]).to(self.device, non_blocking=True)
        self._unread.append((step, list(values), stacked, message))
        if self.reads_at_once:
            self.read()

    def read(self) -> None:
        """
        Wait for all values since the last call.

        Raises:
            FloatingPointError: If one of them is not finite, with the message of the first step that has such values.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        numbers = iter(torch.cat([stacked for _, _, stacked, _ in unread]).tolist())
        for step, names, _, message in unread:
            values = {name: next(numbers) for name in names}
            bad = {name: value for name, value in values.items() if not math.isfinite(value)}
            if bad:
                raise FloatingPointError(message(step, bad))
