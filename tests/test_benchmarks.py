"""The sampling benchmarks run, on models far too small to say anything. Nothing here looks at a time."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pipeline

from srdd import ScaleScheduler, SRDDPipeline
from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.models.guidance import guide


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("measuring", "samplers", "official_var", "speed", "training_step", "decoder_slices"):
        sys.modules.pop(name, None)


def test_speed(load, tmp_path, capsys, monkeypatch):
    speed = load("speed")
    monkeypatch.setitem(speed.MATRIX_SIDES, "cpu", 64)
    arguments = [*TINY, "--rows", "causal", "sdd", "--num_rounds", "1", "--output", str(tmp_path / "speed.json")]
    speed.main(speed.parse_args([*arguments, "--profile"]))
    report, results = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert results["num_tokens"] == {"causal": 5, "sdd": 5}
    assert results["agreement"] == {}  # there is no official code here
    assert "| row | tokens | median s | speed, causal = 1 (min–max) |" in report
    for name in ("causal", "sdd"):
        assert f"| {name} | 5 |" in report
        assert len(results["seconds"][name]) == 1
        assert set(results["seconds_by_component"][name]) == {
            "transformer",
            "sampling",
            "quantizer",
            "decoder",
            "other",
        }
        assert len(results["operator_shares"][name]) == 6
        assert 0.3 < sum(results["operator_shares"][name].values()) <= 1
        assert f"| {name} | {next(iter(results['operator_shares'][name])).removeprefix('aten::')} " in report
    assert results["gflop"]["sdd"] < results["gflop"]["causal"]


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
    pipe, other = (samplers.random_pipeline(speed.parse_args(TINY)) for _ in range(2))
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
    pipe = samplers.random_pipeline(speed.parse_args(TINY))
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
    report, results = capsys.readouterr().out, json.loads((tmp_path / "slices.json").read_text())
    assert results["default"] == 3
    assert [row["images_per_slice"] for row in results["rows"]] == [1, 3]
    assert all(row["difference"] < 1e-4 for row in results["rows"])
    assert "| eager | 3 | " in report


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
    report, results = capsys.readouterr().out, json.loads(path.read_text())
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
