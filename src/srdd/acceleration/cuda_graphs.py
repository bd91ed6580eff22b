"""
Calls that are recorded as CUDA graphs and replayed, where the host takes longer to launch kernels than the device to
run them. Nothing here knows our models.

A graph is a list of kernels with the addresses that they read and write. It is replayed where these addresses are
still those of the weights, and its results count where nothing else has changed on which a call depends.
"""

import contextlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
import torch.nn as nn
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# Recording and replaying, in all threads: graphs of a device share its memory.
_one_at_a_time = threading.RLock()

Inputs = TypeVar("Inputs")
Outputs = tuple[torch.Tensor, ...]

# Tensors that are what they seem: those of quantized and sharded weights are not.
PLAIN = (nn.Parameter, torch.Tensor, nn.Buffer) if hasattr(nn, "Buffer") else (nn.Parameter, torch.Tensor)

# What code that looks at, or moves, what passes a module leaves on it: hooks of torch, accelerate and diffusers.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")

CONTAINERS = {dict, OrderedDict, FrozenDict, list, tuple, set}

MAY_BE_FREED = (nn.Module, torch.Tensor, FunctionType, MethodType, dict)


class ModuleState:
    """
    What calls of modules depend on beside their inputs and the numbers in their weights: which modules there are, of
    which classes, with which settings, adapters and processors, and where their weights lie.

    Args:
        modules (`Sequence[nn.Module]`): The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        parts = [part for module in modules for part in module.modules()]
        settings, values, tensors = _all_of(parts)
        self.is_watched = any(each.get(name) for name in HOOKS for each in settings)
        self.is_plain = all(type(tensor) in PLAIN for tensor in tensors)
        self.devices = {tensor.device for tensor in tensors}
        self._roots = [*map(id, modules)]
        self._parts = [*map(weakref.ref, parts)]
        self._classes = [*map(type, parts)]
        self._places = [*map(id, values)]
        # Modules, tensors and what refers to them may be freed: they are known by their places and addresses. All else
        # is kept, for the place of a number that is gone could become that of another one.
        self._kept = [value for value in values if not isinstance(value, MAY_BE_FREED)]
        self._tensors = [*map(weakref.ref, tensors)]
        self._addresses = [*map(torch.Tensor.data_ptr, tensors)] if self.is_plain else []
        self._layouts = [(tensor.dtype, tensor.shape) for tensor in tensors]

    def is_in_place(self) -> bool:
        """Whether all weights still lie where they lay: looks at nothing else, and is quick."""
        tensors = [reference() for reference in self._tensors]
        return [*map(_address, tensors)] == self._addresses

    def is_that_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether nothing has changed."""
        parts = [reference() for reference in self._parts]
        if self._roots != [*map(id, modules)] or self._classes != [*map(type, parts)]:
            return False
        _, values, tensors = _all_of(parts)
        return (
            self._places == [*map(id, values)]
            and self._addresses == [*map(torch.Tensor.data_ptr, tensors)]
            and self._layouts == [(tensor.dtype, tensor.shape) for tensor in tensors]
        )


def _all_of(parts: list[nn.Module]) -> tuple[list[dict], list, list[torch.Tensor]]:
    """Settings of modules, all that is in them, and their tensors."""
    settings = [*map(vars, parts)]
    settings += [vars(each["processor"]) for each in settings if hasattr(each.get("processor"), "__dict__")]
    values = [*chain.from_iterable(map(dict.values, settings))]
    containers = [value for value in values if value.__class__ in CONTAINERS and value]
    for container in containers:
        values += container.values() if isinstance(container, dict) else container
    tensors = [
        tensor
        for part in parts
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    ]
    return settings, values, tensors


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def float32_precisions() -> tuple:
    """What float32 matrix products and convolutions are computed in."""
    matmul, conv = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)
    if conv is None:  # before torch 2.9
        return matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return matmul.fp32_precision, conv.fp32_precision


class DeviceGraphs:
    """
    What all graphs of a device share. They are never replayed at the same time, and take their memory from one pool.

    Args:
        device (`torch.device`): The device.
    """

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            self.stream, self.is_idle = torch.cuda.Stream(), torch.cuda.Event()
            self.pool = torch.cuda.graph_pool_handle()
            self.is_idle.record()


class CudaGraph:
    """
    A call that is recorded as a CUDA graph, after a first one on the same stream that compiles what it must.

    Args:
        call (`Callable[[], tuple[torch.Tensor, ...]]`): Reads and writes tensors at fixed addresses, and does not look
            at them.
        device (`torch.device`): Where these lie.

    `outputs` are overwritten by every replay, of other graphs as well.
    """

    _shared: dict[torch.device, DeviceGraphs] = {}

    def __init__(self, call: Callable[[], Outputs], device: torch.device):
        if device not in self._shared:
            self._shared[device] = DeviceGraphs(device)
        self.device, self.shared, self.graph = device, self._shared[device], torch.cuda.CUDAGraph()
        stream = self.shared.stream
        with self.in_turn():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on with what they do on the device.
            with torch.cuda.graph(self.graph, self.shared.pool, stream, capture_error_mode="thread_local"):
                self.outputs = call()

    def replay(self) -> None:
        """Run the recorded kernels on the current stream."""
        self.graph.replay()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """What the device is told here it does after all that it was told for other graphs, whatever the streams."""
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.shared.is_idle)
            try:
                yield
            finally:
                self.shared.is_idle.record()


class Recording:
    """A graph, its inputs, what it depends on, and constants that it reads."""

    def __init__(self, graph: CudaGraph, inputs: Any, state: ModuleState, constants: Any):
        self.graph, self.inputs, self.state, self.constants = graph, inputs, state, constants


class CudaGraphs:
    """
    The recorded calls of one owner, a few of them. Copies of the owner start without any.

    Args:
        record (`Callable`, defaults to [`CudaGraph`]): Records a call.
        device_type (`str`, defaults to `"cuda"`): Where it can.
        max_recordings (`int`, defaults to 4): How many are kept; the one that was used longest ago goes.
    """

    def __init__(
        self, record: Callable[..., CudaGraph] = CudaGraph, device_type: str = "cuda", max_recordings: int = 4
    ):
        self.is_enabled = True
        self.device_type = device_type
        self._record, self._max_recordings = record, max_recordings
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        # What calls that were not recorded depended on: where that changes from call to call, none is.
        self._seen: OrderedDict[Hashable, ModuleState] = OrderedDict()
        self._refused: deque[Hashable] = deque(maxlen=64)

    def __reduce__(self):
        return type(self), (self._record, self.device_type, self._max_recordings), {"is_enabled": self.is_enabled}

    def __len__(self) -> int:
        return len(self._recordings)

    def clear(self) -> None:
        """Forget what was recorded, and give back its memory."""
        with _one_at_a_time:
            for memory in (self._recordings, self._seen, self._refused):
                memory.clear()

    def __call__(
        self,
        call: Callable[[Inputs], Outputs],
        modules: Sequence[nn.Module],
        key: Hashable,
        allocate: Callable[[], Inputs],
        fill: Callable[[Inputs], None],
        constants: Any = None,
    ) -> Outputs | None:
        """
        Replay a call, or record it if it is the second of its kind in a row that depends on the same.

        Args:
            call (`Callable`): What is recorded. It must not look at the device.
            modules (`Sequence[nn.Module]`): What it uses.
            key (`Hashable`): What it depends on beside these and the numbers in its inputs.
            allocate (`Callable`): Makes inputs.
            fill (`Callable`): Puts the numbers of this call into them.
            constants (`Any`, *optional*): What it reads beside these, to be kept.

        Returns:
            `tuple[torch.Tensor, ...]`, *optional*: What `call` returns. `None` if this one is not recorded: the first
            of its kind, one under autocast, one whose weights are moved about or whose modules are watched by hooks,
            and one for which there is no memory.
        """
        if not self.is_enabled or torch.is_autocast_enabled(self.device_type):
            return None
        key = (key, *float32_precisions())
        with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
            recording = self._recordings.get(key)
            if recording is not None and not recording.state.is_in_place():
                del self._recordings[key]
                recording = None
            if recording is None:
                if key in self._refused:
                    return None
                state = self._seen.pop(key, None)
                if state is not None and state.is_that_of(modules):
                    return self._record_and_replay(call, state, key, allocate, fill, constants)
                self._see(key, modules)
                return None
            self._recordings.move_to_end(key)
            with recording.graph.in_turn():
                fill(recording.inputs)
                recording.graph.replay()
                # Looked at while the device is busy.
                if recording.state.is_that_of(modules):
                    return tuple(output.clone() for output in recording.graph.outputs)
                del self._recordings[key]
                self._see(key, modules)
                return call(recording.inputs)

    def _see(self, key: Hashable, modules: Sequence[nn.Module]) -> None:
        self._seen[key] = ModuleState(modules)
        if len(self._seen) > 2 * self._max_recordings:
            self._seen.popitem(last=False)

    def _record_and_replay(self, call, state, key, allocate, fill, constants) -> Outputs | None:
        is_recordable = state.is_plain and not state.is_watched
        if not is_recordable or [device.type for device in state.devices] != [self.device_type]:
            return None
        [device], inputs, graph = state.devices, None, None
        try:
            inputs = allocate()
            fill(inputs)
            graph = self._record(lambda: call(inputs), device)
        except RuntimeError as error:  # as all of torch's, where there is no memory, too
            logger.warning(f"Drawing goes on without a CUDA graph: {type(error).__name__}: {error}")
            self._recordings.clear()
            self._refused.append(key)
        if graph is None:
            return call(inputs) if inputs is not None else None
        self._recordings[key] = Recording(graph, inputs, state, constants)
        if len(self._recordings) > self._max_recordings:
            self._recordings.popitem(last=False)
        with graph.in_turn():
            graph.replay()
            return tuple(output.clone() for output in graph.outputs)
