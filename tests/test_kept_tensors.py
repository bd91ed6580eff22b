"""Tensors that are made once, and whom they may serve."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from srdd.kept_tensors import KeptTensors


def test_results_are_made_once_and_let_go_when_there_are_too_many():
    kept = KeptTensors(torch.arange, maxsize=2)
    first = kept[(1,)]
    assert kept[(1,)] is first
    assert torch.equal(kept[0, 2], torch.arange(2))
    kept[(3,)]
    assert list(kept) == [(3,)]


def test_what_inference_mode_asks_for_serves_training():
    kept = KeptTensors(torch.ones, maxsize=2)
    with torch.inference_mode():
        kept[(3,)]
    weights = torch.ones(3, requires_grad=True)
    (weights * kept[(3,)]).sum().backward()
    assert torch.equal(weights.grad, torch.ones(3))


def test_what_has_no_numbers_is_not_kept():
    kept = KeptTensors(torch.arange, maxsize=2)
    with FakeTensorMode():
        assert kept[(3,)].shape == (3,)
    assert not kept
    assert torch.equal(kept[(3,)], torch.arange(3))


def test_compiled_code_keeps_nothing():
    kept = KeptTensors(torch.arange, maxsize=2)
    compiled = torch.compile(lambda x: x + kept[(3,)], backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3)), torch.arange(3.0))
    assert not kept
