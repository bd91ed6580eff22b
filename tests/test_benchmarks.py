"""The sampling benchmarks run, on models far too small to say anything. Nothing here looks at a time."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("measuring", "samplers", "speed", "memory", "growth", "training_step"):
        sys.modules.pop(name, None)


def test_speed(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    arguments = [*TINY, "--rows", "causal", "sdd", "--num_rounds", "1", "--output", str(tmp_path / "speed.json")]
    speed.main(speed.parse_args(arguments))
    report, found = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert found["num_tokens"] == 5
    assert set(found["agreement"]) == {"pixels"}
    for name in ("reference", "causal", "sdd"):
        assert f"| {name} |" in report
        assert len(found["seconds"][name]) == 1
        assert set(found["seconds_by_part"][name]) == {"transformer", "sampling", "quantizer", "decoder", "other"}
    assert found["gflop"]["sdd"] < found["gflop"]["causal"] < found["gflop"]["reference"]


def test_speed_refuses_to_time_what_differs(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.our_pipeline(speed.parse_args(TINY))
    other = samplers.our_pipeline(speed.parse_args(TINY))
    other.transformer.blocks[0].ff.net[2].weight.data.mul_(-1)
    with pytest.raises(RuntimeError, match=r"tokens differ .* nothing was timed"):
        speed.check_equal(pipe, samplers.RecipeSampler(other), torch.tensor([0, 1]))


def test_timers_are_taken_off_again(load):
    measuring, samplers = load("measuring"), load("samplers")
    module = torch.nn.Linear(2, 2)
    calls = [(module, "forward", "transformer"), (samplers, "draw_weights", "sampling")]
    with measuring.part_times(calls, torch.device("cpu")) as seconds:
        module(torch.ones(1, 2))
    assert set(seconds) == {"transformer"}
    assert "forward" not in vars(module)
    assert samplers.draw_weights.__module__ == "samplers"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(load):
    memory = load("memory")
    peaks = memory.measure(memory.parse_args([*TINY, "--batch_sizes", "1", "2", "--measure", "sdd"]))
    assert set(peaks) == {1, 2}
    assert all(peak >= 0 for peak in peaks.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mebibytes", [200, 50])
def test_peak_memory_of_a_known_allocation(load, mebibytes):
    measuring, cpu = load("measuring"), torch.device("cpu")

    def allocate(mebibytes):
        return torch.ones(mebibytes * 2**18).sum()  # float32, freed before the call ends

    allocate(400)  # an earlier peak must not count
    kept = torch.ones(100 * 2**18)  # nor what is there before
    assert measuring.peak_memory(lambda: allocate(mebibytes), cpu) == pytest.approx(mebibytes, rel=0.1)
    assert measuring.peak_memory(lambda: None, cpu) < 5
    assert kept.all()
