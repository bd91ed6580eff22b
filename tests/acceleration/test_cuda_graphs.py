"""Which calls are recorded, which are replayed, and which recordings are out of date."""

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
from diffusers.utils import logging
from stand_ins import FrozenGraph

from srdd.acceleration.cuda_graphs import CudaGraph, CudaGraphs, ModuleState, float32_precisions


@dataclass
class Processor:
    backend: str | None = None


class Layer(nn.Module):
    """What models and their adapters keep."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.factor = 1.0
        self.scaling = {"adapter": 1.0}
        self.merged = []
        self.processor = Processor()

    def forward(self, x):
        return self.norm(self.linear(x) * self.factor)


class Calls:
    """Calls of a layer, and how they came about."""

    def __init__(self, record=FrozenGraph, **settings):
        self.layer = Layer().eval()
        self.graphs = CudaGraphs(record, "cpu", **settings)
        self.num_allocated = self.num_filled = 0

    def __call__(self, x: float = 1.0, key: Any = "key", modules=None):
        def allocate():
            self.num_allocated += 1
            return torch.zeros(2, 3)

        def fill(inputs):
            self.num_filled += 1
            inputs.fill_(x)

        with torch.no_grad():
            return self.graphs(lambda inputs: (self.layer(inputs),), modules or [self.layer], key, allocate, fill)

    def expected(self, x: float = 1.0):
        with torch.no_grad():
            return self.layer(torch.full((2, 3), x))

    @property
    def replays(self) -> list[int]:
        return [recording.graph.num_replays for recording in self.graphs._recordings.values()]


def recorded(**settings) -> Calls:
    calls = Calls(**settings)
    assert calls() is None
    assert torch.equal(calls()[0], calls.expected())
    assert calls.replays == [1]
    return calls


def test_the_first_call_is_left_alone_the_second_recorded_and_later_ones_replayed():
    calls = recorded()
    for count in (2, 3):
        [output] = calls()
        assert torch.equal(output, calls.expected())
        assert calls.replays == [count]
    assert (calls.num_allocated, calls.num_filled) == (1, 3)
    assert calls()[0] is not calls()[0]  # nobody is given what the next replay overwrites


def test_each_kind_of_call_has_a_recording_of_its_own():
    calls = recorded()
    assert calls(2.0, key="other") is None
    assert torch.equal(calls(2.0, key="other")[0], calls.expected(2.0))
    assert torch.equal(calls()[0], calls.expected())
    assert len(calls.graphs) == 2


def test_the_recording_used_longest_ago_goes():
    calls = Calls(max_recordings=2)
    for key in "aabbaacc":
        calls(key=key)
    assert [key for key, *_ in calls.graphs._recordings] == ["a", "c"]
    assert calls(key="b") is None  # as if it had never come
    assert calls(key="b") is not None
    assert [key for key, *_ in calls.graphs._recordings] == ["c", "b"]


CHANGES = {
    "another weight": lambda layer: setattr(layer.linear, "weight", nn.Parameter(torch.ones(3, 3))),
    "a weight moved": lambda layer: setattr(layer.linear.weight, "data", layer.linear.weight.data.clone() * 2),
    "another buffer": lambda layer: setattr(layer.norm, "running_mean", torch.ones(3)),
    "another module": lambda layer: setattr(layer, "linear", nn.Linear(3, 3)),
    "one module more": lambda layer: layer.add_module("more", nn.Identity()),
    "another class": lambda layer: setattr(layer.linear, "__class__", type("Adapted", (nn.Linear,), {})),
    "another number": lambda layer: setattr(layer, "factor", 2.0),
    "another mode": lambda layer: layer.norm.train(),
    "another number in a dictionary": lambda layer: layer.scaling.update(adapter=0.5),
    "one name more in a list": lambda layer: layer.merged.append("adapter"),
    "another processor": lambda layer: setattr(layer, "processor", Processor()),
    "another setting of a processor": lambda layer: setattr(layer.processor, "backend", "flex"),
    "another forward": lambda layer: setattr(layer, "forward", lambda x: x),
    "a compiled call": lambda layer: layer.compile(backend="eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_out_of_date_is_not_used(change):
    calls = recorded()
    CHANGES[change](calls.layer)
    output = calls(3.0)
    if output is None:  # weights lie elsewhere: nothing was replayed
        output = [calls.expected(3.0)]
    assert torch.equal(output[0], calls.expected(3.0))
    assert calls.replays in ([], [1])
    calls(3.0)
    assert torch.equal(calls(3.0)[0], calls.expected(3.0))


def test_what_changes_from_call_to_call_is_not_recorded():
    calls = Calls()
    for count in range(6):
        calls.layer.scaling["adapter"] = float(count % 2)
        assert calls() is None
    assert calls() is not None  # as the one before
    calls.layer.scaling["adapter"] = 0.5
    calls()
    assert len(calls.graphs) == 0
    for _ in range(2):
        assert torch.equal(calls()[0], calls.expected())
    assert calls.replays == [2]


def test_other_modules_of_the_same_kind_have_no_share_in_a_recording():
    calls = recorded()
    calls.layer = copy.deepcopy(calls.layer)
    calls.layer.linear.bias.data += 1
    assert calls() is None
    assert torch.equal(calls()[0], calls.expected())


def test_new_numbers_in_the_same_weights_need_no_new_recording():
    calls = recorded()
    with torch.no_grad():
        calls.layer.linear.weight.mul_(2)
    calls()
    assert calls.replays == [2]


def test_recordings_keep_no_weights():
    calls = recorded()
    weight = calls.layer.linear.weight
    alive = torch.utils.weak.WeakIdRef(weight)
    calls.layer.linear = nn.Linear(3, 3)
    del weight
    assert alive() is None
    assert calls() is None
    assert torch.equal(calls()[0], calls.expected())


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "accelerate", "diffusers"])
def test_modules_that_are_watched_are_not_recorded(hook):
    calls = recorded()
    seen = []
    if hook == "accelerate":
        calls.layer.linear._hf_hook = object()
    elif hook == "diffusers":
        calls.layer.linear._diffusers_hook = object()
    else:
        getattr(calls.layer.linear, f"register_{hook}_hook")(lambda *_: seen.append(1))
    for _ in range(3):
        calls()
    assert len(calls.graphs) == 0
    assert calls() is None


def test_nor_are_quantized_weights_and_those_on_other_devices():
    calls = Calls()
    calls.layer.linear.weight = nn.Parameter(
        torch.Tensor._make_subclass(type("Quantized", (torch.Tensor,), {}), torch.ones(3, 3))
    )
    for elsewhere in (calls, Calls()):
        if elsewhere is not calls:
            elsewhere.graphs.device_type = "cuda"
        assert elsewhere() is None
        assert elsewhere() is None
        assert len(elsewhere.graphs) == 0


class NoMemory(FrozenGraph):
    def __init__(self, call, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_without_memory_calls_go_on_with_their_own_inputs(caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("srdd.acceleration.cuda_graphs"), "propagate", True)
    calls = Calls(NoMemory)
    assert calls() is None
    assert torch.equal(calls(2.0)[0], calls.expected(2.0))
    assert calls.num_filled == 1  # what is random was drawn once
    assert calls() is None
    assert calls.num_allocated == 1
    assert caplog.text.count("without a CUDA graph: OutOfMemoryError: CUDA out of memory") == 1


def test_other_errors_are_not_hidden():
    calls = Calls()
    calls.layer.forward = lambda x: [][0]
    assert calls() is None
    with pytest.raises(IndexError):
        calls()


def test_it_can_be_switched_off_and_cleared():
    calls = recorded()
    calls.graphs.is_enabled = False
    assert calls() is None
    calls.graphs.is_enabled = True
    assert calls() is not None
    calls.graphs.clear()
    assert len(calls.graphs) == 0
    assert calls() is None


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda graphs: pickle.loads(pickle.dumps(graphs))])
def test_copies_are_empty(make):
    calls = recorded()
    calls.graphs.is_enabled = False
    other = make(calls.graphs)
    assert len(other) == 0
    assert not other.is_enabled
    assert other.device_type == "cpu"
    assert len(calls.graphs) == 1


def test_under_autocast_nothing_is_recorded():
    calls = recorded()
    with torch.autocast("cpu", torch.bfloat16):
        assert calls() is None
    assert calls() is not None


def test_another_precision_is_another_kind():
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    calls, before = recorded(), float32_precisions()
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert float32_precisions() != before
        assert calls() is None
        torch.backends.cuda.matmul.allow_tf32 = False
        assert calls() is not None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old


def test_recordings_of_inference_mode_serve_without_it():
    calls = Calls()
    with torch.inference_mode():
        calls()
        calls()
    assert torch.equal(calls(4.0)[0], calls.expected())  # frozen numbers: it was replayed
    assert calls.replays == [2]


class Slow(FrozenGraph):
    """Others would write over the inputs, if they were let in."""

    def __init__(self, call, device):
        super().__init__(call, device)
        self.call = call

    def replay(self):
        threading.Event().wait(0.002)
        self.outputs = [output.clone() for output in self.call()]


def test_threads_take_turns():
    calls, wrong = Calls(Slow), []
    calls(), calls()
    expected = {x: calls.expected(x) for x in (1.0, 2.0, 3.0)}

    def work(x):
        for _ in range(10):
            if not torch.equal(calls(x)[0], expected[x]):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_looking_at_whether_weights_moved_is_quick_and_says_so():
    layer = Layer()
    state = ModuleState([layer])
    assert state.is_in_place()
    assert state.is_that_of([layer])
    layer.linear.to(torch.float64)
    assert not state.is_in_place()


@pytest.mark.cuda
def test_on_a_gpu():
    calls = Calls(CudaGraph)
    calls.graphs.device_type = "cuda"
    calls.layer.cuda()
    inputs = torch.zeros(2, 3, device="cuda")

    def call(x):
        def fill(static):
            static.copy_(torch.full((2, 3), x))

        with torch.no_grad():
            return calls.graphs(lambda static: (calls.layer(static),), [calls.layer], 1, lambda: inputs.clone(), fill)

    assert call(1.0) is None
    for x in (1.0, 2.0, 5.0):
        torch.testing.assert_close(call(x)[0], calls.layer(torch.full((2, 3), x, device="cuda")))
    assert len(calls.graphs) == 1
