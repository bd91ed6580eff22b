"""The sampling benchmarks run, on models far too small to say anything. Nothing here looks at a time."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_vqvae

from srdd.acceleration.cpu import MULTIPLIES_INT8


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    benchmarks = ("speed", "memory", "decoders", "linear_layers", "training_step", "table_speed")
    for name in ("measuring", "samplers", *benchmarks):
        sys.modules.pop(name, None)


def test_speed(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    arguments = [*TINY, "--rows", "causal", "sdd", "--num_rounds", "1", "--output", str(tmp_path / "speed.json")]
    speed.main(speed.parse_args([*arguments, "--profile"]))
    report, found = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert found["num_tokens"] == 5
    assert set(found["agreement"]) == {"pixels"}
    for name in ("reference", "causal", "sdd"):
        assert f"| {name} |" in report
        assert len(found["seconds"][name]) == 1
        assert set(found["seconds_by_part"][name]) == {"transformer", "sampling", "quantizer", "decoder", "other"}
        assert len(found["operator_shares"][name]) == 6
        assert 0.3 < sum(found["operator_shares"][name].values()) <= 1
        assert f"| {name} | {next(iter(found['operator_shares'][name])).removeprefix('aten::')} " in report
    assert found["gflop"]["sdd"] < found["gflop"]["causal"] < found["gflop"]["reference"]


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_decoders(load, tmp_path, clock):
    benchmark = load("decoders")
    tiny_vqvae(block_out_channels=[32, 64]).save_pretrained(tmp_path)
    arguments = ["--tokenizer", str(tmp_path), "--num_rounds", "2", "--batch_size", "3", "--device", "cpu"]
    args = benchmark.parse_args([*arguments, "--clock", clock])
    found = benchmark.measure(args)
    int8 = found.pop("int8", None)
    assert (int8 is not None) == MULTIPLIES_INT8
    if int8 is not None:
        # As many multiplications, though not all by operators that torch knows.
        assert {**int8, "seconds": None} == {**found["own"], "seconds": None}
    assert [len(row["seconds"]) for row in found.values()] == [2, 2, 2]
    for name in ("parameters", "gflop"):
        own, light, lighter = (row[name] for row in found.values())
        assert own > 5 * light > 5 * lighter
    report = benchmark.report(args, found)
    assert "| light, [8, 16], 0 + 1 layers |" in report
    assert "| 1.00 (1.00–1.00) |" in report
    assert f"2 rounds, {clock} time." in report


def test_decibels(load):
    images = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    found = load("decoders").decibels(images, images + 0.2)
    assert found == pytest.approx(20.0, abs=1e-4)  # a tenth of the range
    assert load("decoders").decibels(images + 7.0, images + 9.0) == torch.inf  # both are white


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


def test_rows_by_name(load):
    samplers = load("samplers")
    assert samplers.row_of("causal") == samplers.Row("causal")
    assert samplers.row_of("sdd-6-unguided-int8-light") == samplers.Row(
        "markov", kept=(0, 2, 4, 6, 8, 9), guidance_scale=1.0, linears="int8", light_decoder=True
    )
    assert samplers.row_of("sdd-light-int8vae") == samplers.Row("markov", light_decoder=True, int8_decoder=True)
    for name in ("var", "sdd-7", "sdd-int8-torch", "sdd-6-6", ""):
        with pytest.raises(ValueError, match=rf"Rows must be named causal or sdd, .* got '{name}'"):
            samplers.row_of(name)


def test_speed_refuses_unknown_rows(load, capsys):
    with pytest.raises(SystemExit):
        load("speed").parse_args(["--rows", "sdd", "sdd-fast"])
    assert "got 'sdd-fast'." in capsys.readouterr().err


def test_rows_change_what_they_say_and_nothing_else(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.our_pipeline(speed.parse_args(TINY))
    labels = torch.tensor([0, 1])

    def sampler(name):
        return samplers.PipelineSampler(pipe, samplers.row_of(name))

    def layer(name):
        return sampler(name).pipe.transformer.blocks[0].ff.net[2]

    layers = pipe.transformer.blocks[0].ff.net
    assert layer("sdd-torch").fast is False
    assert layer("sdd-torch").weight is layers[2].weight
    assert layer("sdd-bf16").weight.dtype == torch.bfloat16
    light = sampler("sdd-light")
    assert light.pipe.transformer is pipe.transformer
    assert sum(p.numel() for p in light.pipe.vqvae.decoder.parameters()) < sum(
        p.numel() for p in pipe.vqvae.decoder.parameters()
    )
    images, light_images = sampler("sdd")(labels, greedy=True), light(labels, greedy=True)
    assert light_images.shape == images.shape
    assert not torch.equal(light_images, images)
    for name in ("sdd-bf16-light", "sdd-interval-torch", "sdd-unguided"):
        assert sampler(name)(labels).shape == images.shape
    if MULTIPLIES_INT8:
        int8 = sampler("sdd-int8vae")
        weights = (vae.decoder.conv_out.weight for vae in (int8.pipe.vqvae, pipe.vqvae))
        assert len(set(map(id, weights))) == 1
        int8_images = int8(labels, greedy=True)
        assert not torch.equal(int8_images, images)
        assert (int8_images - images).norm() < 0.1 * images.norm()
        assert sampler("sdd-light-int8vae")(labels).shape == images.shape
    assert torch.equal(sampler("sdd")(labels, greedy=True), images)
    pytest.importorskip("torchao")
    assert layer("sdd-int8").weight.qdata.dtype == torch.int8
    assert layers[2].weight.dtype == torch.float32
    assert layers[2].fast is None


@pytest.fixture
def table(tmp_path):
    """A table of two rows for a tiny model, as words of the command line."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    rows = {"SDD": {"model": "tiny"}, "SR": {"model": "tiny", "scheduler": {"resampling_policy": "simple"}}}
    tables = [
        {"name": "policies", "title": "Policies", "kind": "samples", "rows": rows},
        {"name": "bits", "title": "B", "kind": "likelihood", "rows": {"SDD": {"model": "tiny"}}},
    ]
    (tmp_path / "tables.json").write_text(json.dumps({"tables": tables}))
    words = ["--config", str(tmp_path / "tables.json"), "--model", f"tiny={tmp_path / 'model'}", "--device", "cpu"]
    return [*words, "--num_rounds", "2", "--batch_size", "3"]


def test_table_speed(load, table, tmp_path, capsys):
    table_speed = load("table_speed")
    cells = {f"seed {seed}": {"metrics": {"frechet_distance": 100.0 + seed}} for seed in (0, 2)}
    (tmp_path / "found.json").write_text(json.dumps({"cells": {"policies": {"SR": cells}}}))
    words = [*table, "--table", "policies", "--measurements", str(tmp_path / "found.json")]
    table_speed.main(table_speed.parse_args(words))
    sdd, sr = capsys.readouterr().out.splitlines()[-2:]
    assert sdd.startswith("| SDD | ")
    assert sdd.endswith(" | 1.00 (1.00–1.00) |  |")
    assert sr.startswith("| SR | ")
    assert sr.endswith(" | 101 (88–114) |")  # Student's: 12.71 standard errors to either side


def test_table_speed_refuses_what_draws_nothing(load, table):
    table_speed = load("table_speed")
    with pytest.raises(ValueError, match="`table` must be one that draws samples, got 'bits', whose kind is 'likelih"):
        table_speed.main(table_speed.parse_args([*table, "--table", "bits"]))
    with pytest.raises(ValueError, match=r"`table` must be among \['policies', 'bits'\], got \['passes'\]"):
        table_speed.main(table_speed.parse_args([*table, "--table", "passes"]))


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


TINY_STEP = ["--num_layers", "1", "--batch_size", "1", "--num_rounds", "1", "--device", "cpu"]


def test_training_step(load, tmp_path, capsys):
    training_step = load("training_step")
    path = tmp_path / "step.json"
    training_step.main(training_step.parse_args([*TINY_STEP, "--grid_size", "2", "--output", str(path)]))
    report, found = capsys.readouterr().out, json.loads(path.read_text())
    assert set(found["seconds"]) == set(training_step.VARIANTS)
    assert found["difference"] < 1e-4
    for name in training_step.VARIANTS:
        assert len(found["seconds"][name]) == 1
        assert f"| {name} |" in report


def test_compiled_training_steps_train_the_same_weights(load):
    training_step = load("training_step")
    step = training_step.Step(training_step.parse_args([*TINY_STEP, "--grid_size", "2"]))
    assert step.compiled is None  # on a CPU there are no variants to compile for
    assert not set(step.variants) & set(training_step.FLEX_VARIANTS)
    twin = training_step.twin(step.model)
    assert all(ours is theirs for ours, theirs in zip(twin.parameters(), step.model.parameters(), strict=True))
    twin.register_to_config(attention_pattern="causal")
    assert step.model.config.attention_pattern == "markov"
    assert twin.blocks[0].attn is not step.model.blocks[0].attn


def test_training_steps_that_would_not_fit_are_left_out(load, tmp_path, capsys):
    training_step = load("training_step")
    words = [*TINY_STEP, "--grid_size", "16"]
    step = training_step.Step(training_step.parse_args(words))
    per_scale, masked = (step.expected_memory(f"causal (VAR), {how}") for how in ("a call per scale", "N x N mask"))
    path, between = tmp_path / "step.json", (per_scale + masked) / 2 / 1024
    words += ["--memory", str(between), "--output", str(path)]
    training_step.main(training_step.parse_args(words))
    printed, found = capsys.readouterr(), json.loads(path.read_text())
    assert set(found["seconds"]) == {"markov, a call per scale", "causal (VAR), a call per scale"}
    assert found["difference"] is None  # there was nothing to compare with
    assert f"| markov, N x N mask | left out: only {between * 1024:,.0f} MiB | | | {masked:,.0f} |" in printed.out
    assert f"markov, N x N mask is left out: it needs {masked:,.0f} MiB" in printed.err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing"], ["--batch_size", "2"]])
@pytest.mark.parametrize("name", ["markov, a call per scale", "causal (VAR), N x N mask"])
def test_training_steps_need_what_is_expected(load, options, name):
    training_step = load("training_step")
    words = [*TINY_STEP, "--grid_size", "16", "--num_layers", "2", *options]
    step = training_step.Step(training_step.parse_args(words))
    step.time(name)  # the optimizer makes its state
    assert step.peak_memory(name) == pytest.approx(step.expected_memory(name), rel=0.25)


def test_training_step_refuses_no_memory(load, capsys):
    with pytest.raises(SystemExit):
        load("training_step").parse_args(["--memory", "0"])
    assert "`--memory` must be above 0, got 0.0." in capsys.readouterr().err
