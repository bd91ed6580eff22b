"""The sampling benchmarks run, on models far too small to say anything. Nothing here looks at a time."""

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_pipeline, tiny_vqvae
from tiny_texts import tiny_text_pipeline

from srdd import ScaleScheduler, SRDDPipeline
from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.conversion import __main__ as conversion
from srdd.conversion.families import FAMILIES
from srdd.models.guidance import guide
from srdd.scales import num_tokens_per_scale


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    names = ["measuring", "samplers", "official_var", "graph_check", "speed", "training_step", "training_run"]
    for name in (*names, "decoder_slices", "text_drawing", "random_checkpoint", "first_picture", "own_scale_headroom"):
        sys.modules.pop(name, None)


def tiny_model(speed) -> argparse.Namespace:
    """The arguments of one depth."""
    return argparse.Namespace(**{**vars(speed.parse_args(TINY)), "depth": 1})


def test_speed(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    arguments = [*TINY, "--rows", "causal", "sdd", "--num_rounds", "1", "--output", str(tmp_path / "speed.json")]
    speed.main(speed.parse_args([*arguments, "--profile"]))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    [setting] = results["settings"]
    assert setting["num_tokens"] == {"causal": 5, "sdd": 5}
    assert setting["agreement"] == setting["failures"] == {}  # there is no official code here
    assert "| row | tokens | median s | speed, causal = 1 (min–max) |" in report
    for name in ("causal", "sdd"):
        assert f"| {name} | 5 |" in report
        assert len(setting["seconds"][name]) == 1
        assert setting["warm_up_seconds"][name] < 0.1  # there was nothing to warm up any more
        assert set(setting["seconds_by_component"][name]) == {
            "transformer",
            "sampling",
            "quantizer",
            "decoder",
            "other",
        }
        assert len(setting["operator_shares"][name]) == 6
        assert 0.3 < sum(setting["operator_shares"][name].values()) <= 1
        assert setting["operator_seconds"][name] > 0
        largest = next(iter(setting["operator_shares"][name])).removeprefix("aten::")
        assert re.search(
            rf"^\| {name} \| {setting['num_operators'][name]} \| [\d.]+ \| {largest} ", report, flags=re.M
        )
    assert setting["gflop"]["sdd"] < setting["gflop"]["causal"]


def test_speed_of_several_sizes_goes_on_where_rows_fail(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    official = speed.PipelineSampler.__call__

    def out_of_memory(sampler, labels):
        if len(labels) == 3 and sampler.pipe.transformer.config.attention_pattern == "causal":
            raise torch.OutOfMemoryError("Tried to allocate\n\n1 | 2 GiB.\nMore.")
        return official(sampler, labels)

    monkeypatch.setattr(speed.PipelineSampler, "__call__", out_of_memory)
    words = [
        *TINY,
        "--rows",
        "sdd-6",
        "causal",
        "sdd-eager",
        "--num_rounds",
        "2",
        "--output",
        str(tmp_path / "speed.json"),
    ]
    speed.main(speed.parse_args([*words, "--depth", "1", "2", "--batch_size", "3", "1"]))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert [(x["depth"], x["batch_size"]) for x in results["settings"]] == [(1, 3), (1, 1), (2, 3), (2, 1)]
    for setting in results["settings"]:
        timed = ["sdd-eager"] if setting["batch_size"] == 3 else ["causal", "sdd-eager"]  # which can be tried again
        assert list(setting["seconds"]) == list(setting["seconds_by_component"]) == timed
        assert "`num_scales` must be in" in setting["failures"]["sdd-6"]
        assert ("causal" in setting["failures"]) == (setting["batch_size"] == 3)
    assert "| causal |  | failed: OutOfMemoryError: Tried to allocate 1 / 2 GiB. |  |  |  |" in report
    assert "speed, sdd-eager = 1" in report
    with pytest.raises(SystemExit, match="Not everything"):
        speed.main(speed.parse_args([*TINY, "--rows", "sdd-6"]))
    assert "Nothing was timed: sdd-6: ValueError: `num_scales`" in capsys.readouterr().out


class Official:
    """Stands where the official code stands: a pipeline, by one forward over all scales."""

    def __init__(self, samplers, pipe):
        self.samplers, self.pipe = samplers, pipe

    def __call__(self, labels, greedy):
        assert greedy
        scheduler = ScaleScheduler.from_config(self.pipe.scheduler.config, top_k=1, top_p=1.0)
        pipe = SRDDPipeline(**{**self.pipe.components, "scheduler": scheduler})
        sampler = self.samplers.row_sampler(pipe, "causal")
        images, self.token_ids = sampler(labels), sampler.token_ids
        return images

    def markov_logits(self, token_ids, labels):
        inputs = self.pipe.vqvae.teacher_forcing_inputs(token_ids)
        timesteps = [scale.timestep for scale in self.pipe.scheduler.visits]
        conditional, unconditional = (
            self.pipe.transformer(inputs, timesteps, classes).sample for classes in (labels, None)
        )
        weights = self.pipe.scheduler.guidance_weights(self.samplers.GUIDANCE_SCALE)
        return guide(conditional, unconditional, weights[:, None])


@pytest.mark.parametrize(("change", "message"), [("none", None), ("transformer", "causal tokens"), ("decoder", "Pix")])
def test_speed_refuses_to_time_what_differs(load, change, message):
    speed, samplers = load("speed"), load("samplers")
    pipe, other = (samplers.random_pipeline(tiny_model(speed)) for _ in range(2))
    if change == "transformer":
        other.transformer.blocks[0].ff.net[2].weight.data.mul_(-1)
    elif change == "decoder":
        other.vqvae.decoder.conv_out.weight.data.mul_(0.9)
    official, labels = Official(samplers, other), torch.tensor([0, 1])
    if message is None:
        agreement = speed.check_equal(pipe, official, labels)
        assert set(agreement) == {"pixels", "SDD logits"}
        assert agreement["pixels"] == 0
        return
    with pytest.raises(RuntimeError, match=f"{message}.* nothing was timed"):
        speed.check_equal(pipe, official, labels)


@pytest.mark.slow  # torch's compiler
def test_rows_say_how_they_are_drawn(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.random_pipeline(tiny_model(speed))
    labels = torch.tensor([0, 1])
    drawn = []
    for name in ("sdd", "sdd-eager-fused-compiled"):
        sampler = samplers.row_sampler(pipe, name, compile_backend="eager")
        drawn.append(sampler.pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt"))
    plain, compiled = drawn
    assert torch.equal(plain.token_ids, compiled.token_ids)
    torch.testing.assert_close(plain.images, compiled.images, atol=1e-5, rtol=0)
    ours, theirs = sampler.pipe.transformer, sampler.uncompiled.pipe.transformer
    assert ours.proj_out.weight is theirs.proj_out.weight is pipe.transformer.proj_out.weight
    assert sampler.pipe.vqvae.decoder.conv_in.weight is pipe.vqvae.decoder.conv_in.weight
    assert ours.blocks[0].attn.fused_projections
    assert not pipe.transformer.blocks[0].attn.fused_projections
    compiled_modules = [ours.blocks[0], sampler.pipe.vqvae.decoder]
    assert all(each._compiled_call_impl is not None for each in compiled_modules)
    assert all(each._compiled_call_impl is None for each in (theirs.blocks[0], pipe.vqvae.decoder))
    for name in ("sdd-eager-eager", "eager-sdd-compiled-compiled"):
        with pytest.raises(ValueError, match="every word once"):
            samplers.row_of(name)


def test_float32_is_float32_while_it_is_compared(load):
    measuring = load("measuring")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with contextlib.suppress(ValueError), measuring.without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        raise ValueError
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_graph_check(load, tmp_path, capsys):
    graph_check = load("graph_check")
    words = [*TINY, "--rows", "causal", "sdd", "--output", str(tmp_path / "graphs.json")]
    graph_check.main(graph_check.parse_args(words))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "graphs.json").read_text())
    for name in ("causal", "sdd"):
        assert re.search(rf"^\| {name} \| 22 \| [\d.]+ \| [\d.]+ \| 100.00%, 0e\+00 \| equal \|$", report, flags=re.M)
        assert len(results["rows"][name]["draws"]) == 22
    with pytest.raises(SystemExit):
        graph_check.main(graph_check.parse_args([*TINY, "--rows", "sdd-6"]))
    assert "| sdd-6 |  |  |  |  | failed: ValueError: `num_scales` must" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["old labels", "old guidance", "other pixels"])
def test_graph_check_sees_a_graph_that_draws_something_else(load, what, monkeypatch):
    graph_check, samplers = load("graph_check"), load("samplers")
    pipe = samplers.random_pipeline(graph_check.parse_args(TINY))
    draws = graph_check.draws_in_a_row(2)
    assert graph_check.check_graphs(pipe, draws[:3]) == 0
    assert len({(draw.batch_size, draw.guidance_scale == 1) for draw in draws}) == 3
    own_call, eager = SRDDPipeline.__call__, set()
    monkeypatch.setattr(SRDDPipeline, "disable_cuda_graphs", lambda pipe: eager.add(id(pipe)))

    def replay(pipe, labels, guidance_scale, **kwargs):
        if id(pipe) not in eager:
            labels = labels * 0 + 3 if what == "old labels" else labels
            guidance_scale = 2.5 if what == "old guidance" else guidance_scale
        output = own_call(pipe, labels, guidance_scale=guidance_scale, **kwargs)
        if id(pipe) not in eager and what == "other pixels":
            output.images += 0.01
        return output

    monkeypatch.setattr(SRDDPipeline, "__call__", replay)
    with pytest.raises(RuntimeError, match="With CUDA graphs .* nothing was timed"):
        graph_check.check_graphs(pipe, draws[:3])


@pytest.mark.parametrize("weights", ["var_d16", "mvar-d16", "hmar-d16", "d24", "Switti"])
def test_random_checkpoints_are_those_of_their_families(weights, load, tmp_path, capsys):
    script = load("random_checkpoint")
    name = script.FAMILY_OF[weights]
    sizes = ["--depth", "2", "--vae_channels", "32", "--dtype", "float16"]
    script.main(script.parse_args(["--weights", weights, "--output", str(tmp_path), *sizes]))
    command = shlex.split(capsys.readouterr().out)[3:]
    conversion.main(command)
    assert FAMILIES[name].title in capsys.readouterr().out
    pipe = FAMILIES[name].pipeline.from_pretrained(tmp_path / "converted")
    assert type(pipe.transformer) is FAMILIES[name].transformer
    config = pipe.transformer.config
    assert (config.num_layers, pipe.sample_size) == (2, (512, 512) if name == "switti" else (256, 256))
    assert config.attention_pattern == ("causal" if name == "var" else "markov")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("make_pipeline", [tiny_pipeline, tiny_text_pipeline])
def test_first_picture(make_pipeline, load, tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path)
    script = load("first_picture")
    script.main(script.parse_args([str(tmp_path), "--dtype", "bfloat16"]))
    pattern = r"\(1, 3, 8, 8\), finite: True; loading [\d.]+ s, drawing [\d.]+ s, peak [\d.]+ GiB\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


GPU_CHECK = BENCHMARKS / "gpu_check.sh"


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash and timeout")
def test_gpu_check_takes_16_minutes_at_most():
    assert subprocess.run(["bash", "-n", GPU_CHECK]).returncode == 0
    stages = r"^ *(?:graphs|tests|speed|training_step|stage) ([a-z]\w+) (\d+) "
    limits = {name: int(limit) for name, limit in re.findall(stages, GPU_CHECK.read_text(), flags=re.M)}
    assert len(limits) == 13
    assert sum(limits.values()) <= 940


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs bash and timeout")
def test_gpu_check_goes_on_after_a_failure(tmp_path):
    python = tmp_path / "python"  # in which one script fails
    python.write_text(f'#!/bin/sh\ncase "$1" in */speed.py) echo no >&2; exit 3;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": "out"}
    environment["STAGES"] = "speed_batch_1 training_step_grid_32 diffusers_suite"
    environment.pop("DIFFUSERS_SOURCE", None)
    run = subprocess.run(["bash", GPU_CHECK, "--small"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| speed_batch_1 | failed with exit code 3, see speed_batch_1.log |" in summary
    assert (tmp_path / "out" / "speed_batch_1.log").read_text() == "no\n"
    assert "| diffusers_suite | left out: DIFFUSERS_SOURCE is not set |" in summary
    assert "| training_step_grid_32 | done |" in summary
    assert "| markov, N x N mask |" in summary
    assert f"torch {torch.__version__}" in summary
    assert json.loads((tmp_path / "out" / "training_step_grid_32.json").read_text())["rows"]["num_tokens"] == 5
    assert json.loads((tmp_path / "out" / "speed_batch_1.json").read_text())["exit_code"] == 3


@pytest.mark.slow
def test_training_run(load, tmp_path, capsys):
    training_run = load("training_run")
    sizes = ["--max_train_steps", "3", "--train_batch_size", "4", "--num_layers", "1", "--num_attention_heads", "1"]
    words = [*sizes, "--num_pictures", "8", "--logging_steps", "1", "--device", "cpu"]
    training_run.main(training_run.parse_args([*words, "--output", str(tmp_path / "run.json")]))
    results = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert list(results["losses"]) == ["1", "2", "3"]
    assert results["draws"]
    assert "| yes |" in capsys.readouterr().out


def test_timers_are_taken_off_again(load):
    measuring, samplers = load("measuring"), load("samplers")
    module = torch.nn.Linear(2, 2)
    calls = [(module, "forward", "transformer"), (samplers, "draw_weights", "sampling")]
    with measuring.component_times(calls, torch.device("cpu")) as seconds:
        module(torch.ones(1, 2))
    assert set(seconds) == {"transformer"}
    assert "forward" not in vars(module)
    assert samplers.draw_weights.__module__ == "samplers"


def test_speed_refuses_unknown_rows(load, capsys):
    with pytest.raises(SystemExit):
        load("speed").parse_args(["--rows", "sdd", "sdd-fast"])
    assert "got 'sdd-fast'." in capsys.readouterr().err


def test_light_rows_have_another_decoder_and_nothing_else(load):
    speed, samplers = load("speed"), load("samplers")
    pipe = samplers.random_pipeline(tiny_model(speed))
    labels = torch.tensor([0, 1])
    light = samplers.row_sampler(pipe, "sdd-light-unguided")
    assert light.guidance_scale == 1.0
    assert light.pipe.transformer.proj_out.weight is pipe.transformer.proj_out.weight
    counts = [sum(p.numel() for p in each.vqvae.decoder.parameters()) for each in (light.pipe, pipe)]
    assert 0 < counts[0] < counts[1]
    assert light(labels).shape == samplers.row_sampler(pipe, "sdd")(labels).shape
    if MULTIPLIES_INT8:
        assert samplers.row_sampler(pipe, "sdd-light-int8vae")(labels).shape == (2, 3, 32, 32)


def test_speed_of_an_ablation_table(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    rows = {"SDD": {"model": "tiny"}, "SR": {"model": "tiny", "scheduler": {"resampling_policy": "simple"}}}
    tables = [{"name": "policies", "title": "Policies", "kind": "samples", "rows": rows}]
    (tmp_path / "tables.json").write_text(json.dumps({"tables": tables}))
    words = ["--config", str(tmp_path / "tables.json"), "--model", f"tiny={tmp_path / 'model'}", "--device", "cpu"]
    speed.main(speed.parse_args([*words, "--table", "policies", "--num_rounds", "2", "--batch_size", "7"]))
    report = capsys.readouterr().out
    assert report.startswith("Table policies, batch 7, ")
    assert re.search(r"^\| SDD \| 21 \| [0-9.]+ \| 1.00 \(1.00–1.00\) \|", report, flags=re.MULTILINE)
    assert re.search(r"^\| SR \| 21 \|", report, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=r"`table` must be among \['policies'\], got \['passes'\]"):
        speed.main(speed.parse_args([*words, "--table", "passes"]))


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


def test_decoder_slices(load, tmp_path, capsys):
    decoder_slices = load("decoder_slices")
    arguments = ["--image_size", "32", "--vae_channels", "32", "--batch_size", "3", "--num_rounds", "1"]
    arguments += ["--device", "cpu", "--images_per_slice", "1", "3", "--output", str(tmp_path / "slices.json")]
    decoder_slices.main(decoder_slices.parse_args(arguments))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "slices.json").read_text())["rows"]
    assert results["default"] == 3
    assert [row["images_per_slice"] for row in results["slices"]] == [1, 3]
    assert all(row["difference"] < 1e-4 for row in results["slices"])
    assert "| eager | 3 | " in report


def test_text_drawing(load, tmp_path, capsys):
    text_drawing = load("text_drawing")
    arguments = ["--depth", "1", "--vae_channels", "32", "--dtype", "float32", "--num_rounds", "1", "--device", "cpu"]
    arguments += ["--rows", "markov-eager", "causal", "--output", str(tmp_path / "text.json")]
    text_drawing.main(text_drawing.parse_args(arguments))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "text.json").read_text())
    for row, name in zip(results["rows"], ("markov-eager", "causal"), strict=True):
        assert row["row"] == name
        assert row["shape"] == [1, 3, 512, 512]
        assert f"| {name} | 512 x 512 | " in report
    with pytest.raises(argparse.ArgumentTypeError, match="rows must be a pattern"):
        text_drawing.row_name("markov-fast")


def test_decoder_slices_are_of_the_size_asked_for(load):
    decoder_slices = load("decoder_slices")
    args = decoder_slices.parse_args(["--image_size", "32", "--vae_channels", "32", "--device", "cpu"])
    vqvae, batch_sizes = decoder_slices.make_tokenizer(args), []
    vqvae.decoder.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(output)))
    latents = torch.randn(5, 32, 2, 2)
    for num_images, expected in ((2, [2, 2, 1]), (5, [5])):
        batch_sizes.clear()
        decoder_slices.in_slices(vqvae, latents, num_images)()
        assert batch_sizes == expected


TINY_STEP = ["--num_layers", "1", "--batch_size", "1", "--num_rounds", "1", "--device", "cpu"]


def test_training_step(load, tmp_path, capsys):
    training_step = load("training_step")
    path = tmp_path / "step.json"
    training_step.main(training_step.parse_args([*TINY_STEP, "--grid_size", "2", "--output", str(path)]))
    report, results = capsys.readouterr().out, json.loads(path.read_text())["rows"]
    assert set(results["seconds"]) == set(training_step.VARIANTS)
    assert 0 < results["difference"] < 1e-4
    assert "The default of the training scripts here: a call per scale." in report
    for name in training_step.VARIANTS:
        assert len(results["seconds"][name]) == 1
        assert f"| {name} |" in report


def test_compiled_training_steps_train_the_same_weights(load):
    training_step = load("training_step")
    step = training_step.Step(training_step.parse_args([*TINY_STEP, "--grid_size", "2"]))
    assert step.compiled is None  # on a CPU there are no variants to compile for
    assert not set(step.variants) & set(training_step.FLEX_VARIANTS)
    twin = training_step.sharing_parameters(step.model)
    assert all(ours is theirs for ours, theirs in zip(twin.parameters(), step.model.parameters(), strict=True))
    twin.register_to_config(attention_pattern="causal")
    assert step.model.config.attention_pattern == "markov"
    assert twin.blocks[0].attn is not step.model.blocks[0].attn


@pytest.mark.parametrize("kind", ["equal", "independent"])
def test_headroom_is_what_tokens_tell_of_each_other(kind, load, tmp_path):
    script = load("own_scale_headroom")
    words = ["--dataset_name", "x", "--pretrained_vqvae_name_or_path", "x", "--folder", str(tmp_path)]
    sizes = ["--num_layers", "1", "--num_attention_heads", "1", "--max_train_steps", "300", "--learning_rate", "5e-3"]
    args = script.parse_args([*words, *sizes, "--device", "cpu"])
    vqvae, rng = tiny_vqvae().eval().requires_grad_(False), np.random.default_rng(0)
    counts, codebook_size = num_tokens_per_scale(vqvae.config.scale_sizes), vqvae.config.codebook_size
    pyramids = rng.integers(codebook_size, size=(640, sum(counts)))
    if kind == "equal":  # all tokens of a scale
        pyramids = rng.integers(codebook_size, size=(640, len(counts))).repeat(counts, axis=1)
    tokens = script.TokenDataset(pyramids.astype(np.uint16), np.zeros(640, dtype=np.int64))
    probe = script.Probe(args, vqvae, num_classes=1)
    script.train(args, probe, tokens)
    ordinary, shown = probe.headroom(tokens, share=0.75)
    headroom = [before - after for before, after in zip(ordinary, shown)]
    assert headroom[-1] > 1 if kind == "equal" else abs(headroom[-1]) < 0.1
    going_on = script.Probe(args, vqvae, num_classes=1)
    script.train(args, going_on, tokens)  # nothing is left to do
    assert going_on.headroom(tokens, share=0.75) == (ordinary, shown)
