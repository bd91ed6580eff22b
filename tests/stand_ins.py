"""What stands for a CUDA graph where there is no GPU."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.fx.experimental.proxy_tensor import make_fx


class FrozenGraph:
    """What it replays are the numbers of its recording, whatever has changed: a replay that is out of date is seen."""

    def __init__(self, call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device):
        self.outputs = [output.clone() for output in call()]
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        yield


class TracedGraph(FrozenGraph):
    """A list of operators with the tensors that they read, as a CUDA graph is one of kernels with addresses."""

    def __init__(self, call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device):
        super().__init__(call, device)
        self.graph = make_fx(lambda: call())()

    def replay(self) -> None:
        super().replay()
        for output, new in zip(self.outputs, self.graph(), strict=True):
            output.copy_(new)
