"""The scripts train and distil a transformer with a history as they do the usual one."""

import math

import pytest
import torch
from tiny_models import tiny_history_transformer, tiny_vqvae
from training.tiny_runs import assert_same_weights, distill, load_script, read_log, train_transformer

from srdd import ScaleHistoryTransformer2DModel, SRDDPipeline
from srdd.training.lora import load_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformer of the tokenizer's sizes that has seen nothing."""
    folder = tmp_path_factory.mktemp("history") / "base"
    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "latent_channels": 4, "num_classes": 2, "history_window": 2}
    model = tiny_history_transformer(**sizes, id2label={0: "cold", 1: "warm"})
    model.init_weights()
    model.save_pretrained(folder)
    return folder


def load(folder) -> SRDDPipeline:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def run(base, trained, image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quiet = ["--report_to", "none", "--logging_steps", 1, "--token_cache_dir", root / "tokens"]

    def start(name, *options):
        options = [*quiet, "--pretrained_model_name_or_path", base, "--learning_rate", 1e-2, *options]
        train_transformer(image_folder, trained / "tokenizer", root / name, *options)
        return root / name

    start.quiet = quiet
    return start


@pytest.fixture(scope="module")
def model(run):
    return run("model", "--max_train_steps", 40, "--checkpointing_steps", 40, "--validation_steps", 40)


def test_the_loss_falls_and_the_folder_draws(model):
    log = [record["loss"] for record in read_log(model) if "loss" in record]
    assert log[0] == pytest.approx(math.log(16), abs=0.1)
    assert sum(log[-5:]) / 5 < 0.8 * log[0]
    pipe = load(model)
    assert isinstance(pipe.transformer, ScaleHistoryTransformer2DModel)
    assert pipe.transformer.config.history_window == 2
    assert pipe(["warm", "cold"], generator=torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()


def test_an_adapter_and_its_base_are_the_trained_model(run, base):
    folder = run("lora", "--lora_rank", 2, "--gradient_checkpointing")
    merged, transformer = load(folder).transformer, ScaleHistoryTransformer2DModel.from_pretrained(base)
    assert (merged.history.to_k.weight - transformer.history.to_k.weight).abs().max() > 1e-4
    started = transformer.class_embed.weight  # each class of the data has one of these at first
    assert torch.cdist(merged.class_embed.weight, started).amin(dim=1).min() > 1e-3
    load_lora(transformer, folder / "lora")
    transformer.fuse_lora()
    transformer.unload_lora()
    assert_same_weights(transformer, merged, atol=1e-6)
    other = tiny_history_transformer(codebook_size=16, latent_channels=4, history_window=3)
    with pytest.raises(ValueError, match="`transformer` must have the history_window of the adapter's base, 2, got 3"):
        load_lora(other, folder / "lora")


def test_a_student_has_a_history_too(run, model, image_folder, tmp_path):
    distill(image_folder, model, tmp_path / "student", *run.quiet, "--scales", "1,4", "--guidance_scale", 3)
    pipe = load(tmp_path / "student")
    assert isinstance(pipe.transformer, ScaleHistoryTransformer2DModel)
    assert pipe.transformer.config.guidance_distilled
    assert pipe("warm", output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("pattern", [None, "causal"])
def test_a_pretrained_transformer_takes_another_pattern(pattern, base):
    script, options = load_script("train_srdd"), ["--attention_pattern", pattern] if pattern else []
    needed = ["--output_dir", "out", "--pretrained_vqvae_name_or_path", "vqvae"]
    args = script.parse_args([*needed, "--pretrained_model_name_or_path", str(base), *options])
    model = script.build_model(args, tiny_vqvae(codebook_size=16, latent_channels=4), {0: "cold", 1: "warm"})
    assert model.config.attention_pattern == (pattern or "markov")
    assert "attention_windows" not in model.config
