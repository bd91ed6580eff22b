"""The sampling benchmarks run, on models far too small to say anything. Nothing here looks at a time."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_vqvae


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("samplers", "speed", "memory", "light_decoder", "linear_layers"):
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


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_light_decoder(load, tmp_path, clock):
    benchmark = load("light_decoder")
    tiny_vqvae(block_out_channels=[32, 64]).save_pretrained(tmp_path)
    arguments = ["--teacher", str(tmp_path), "--num_rounds", "2", "--batch_size", "3", "--device", "cpu"]
    args = benchmark.parse_args([*arguments, "--clock", clock])
    found = benchmark.measure(args)
    assert [len(row["seconds"]) for row in found.values()] == [2, 2, 2]
    for name in ("parameters", "gflop"):
        teacher, light, lighter = (row[name] for row in found.values())
        assert teacher > 5 * light > 5 * lighter
    report = benchmark.report(args, found)
    assert "| light, [8, 16], 0 + 1 layers |" in report
    assert "| 1.0 (1.0–1.0) |" in report
    assert f"2 rounds, {clock} time." in report


def test_speed_refuses_to_time_what_differs(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.our_pipeline(speed.parse_args(TINY))
    other = samplers.our_pipeline(speed.parse_args(TINY))
    other.transformer.blocks[0].ff.net[2].weight.data.mul_(-1)
    with pytest.raises(RuntimeError, match=r"tokens differ .* nothing was timed"):
        speed.check_equal(pipe, samplers.RecipeSampler(other), torch.tensor([0, 1]))


def test_timers_are_taken_off_again(load):
    samplers = load("samplers")
    module = torch.nn.Linear(2, 2)
    calls = [(module, "forward", "transformer"), (samplers, "draw_weights", "sampling")]
    with samplers.part_times(calls, torch.device("cpu")) as seconds:
        module(torch.ones(1, 2))
    assert set(seconds) == {"transformer"}
    assert "forward" not in vars(module)
    assert samplers.draw_weights.__module__ == "samplers"


def test_speed_of_other_linear_layers(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.our_pipeline(speed.parse_args(TINY))
    layers = pipe.transformer.blocks[0].ff.net
    torchs = samplers.PipelineSampler(pipe, samplers.Row("markov", linears="torch")).pipe.transformer.blocks[0].ff.net
    assert torchs[2].fast is False
    assert torchs[2].weight is layers[2].weight
    pytest.importorskip("torchao")
    int8 = samplers.PipelineSampler(pipe, samplers.Row("markov", linears="int8")).pipe.transformer.blocks[0].ff.net
    assert int8[2].weight.qdata.dtype == torch.int8
    assert layers[2].weight.dtype == torch.float32
    assert layers[2].fast is None


def test_linear_layers(load, capsys):
    pytest.importorskip("torchao")
    linear_layers, threads = load("linear_layers"), torch.get_num_threads()
    arguments = ["--width", "16", "--num_rows", "2", "3", "--num_rounds", "1", "--num_elements", "1"]
    linear_layers.main(linear_layers.parse_args(arguments))
    torch.set_num_threads(threads)
    report = capsys.readouterr().out
    for shape in ("projection", "MLP in + GELU", "MLP out"):
        assert f"| {shape}: rows | torch, ms | oneDNN | torchao | int8 |" in report


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(load):
    memory = load("memory")
    peaks = memory.measure(memory.parse_args([*TINY, "--batch_sizes", "1", "2", "--measure", "sdd"]))
    assert set(peaks) == {1, 2}
    assert all(peak >= 0 for peak in peaks.values())
