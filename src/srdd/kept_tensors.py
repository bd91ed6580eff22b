"""Tensors that follow from a few numbers, such as masks: made once, for all calls that want them."""

from collections.abc import Callable
from typing import Any

import torch


class KeptTensors(dict):
    """
    What a function returns, by its arguments: `kept[arguments]`, a tuple. It is called where that is not known yet.

    What is kept serves calls of every kind: training may want what an evaluation in inference mode has made. While
    `torch.export` or a compiler traces, or under a `FakeTensorMode`, tensors have shapes and no numbers. Those serve
    nobody else and are not kept. A look-up is the dictionary's own, and costs no call of a Python function.

    Args:
        make (`Callable`): The function. It makes tensors of its arguments alone.
        maxsize (`int`): How many results are kept; before there are more, all are let go.
    """

    def __init__(self, make: Callable[..., Any], maxsize: int):
        super().__init__()
        self.make, self.maxsize = make, maxsize

    def __missing__(self, arguments: tuple) -> Any:
        with torch.inference_mode(False):
            made = self.make(*arguments)
            is_traced = torch.compiler.is_compiling() or type(torch.empty(0, device="meta")) is not torch.Tensor
        if not is_traced:
            if len(self) >= self.maxsize:
                self.clear()
            self[arguments] = made
        return made
