"""Every option of `train_srdd.py` does what it says."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_transformer, tiny_vqvae
from training.tiny_runs import assert_same_weights, load_script, read_log, train_transformer, weights

from srdd import MultiScaleVQModel, ScaleTransformer2DModel, SRDDPipeline
from srdd.training.lora import load_lora, save_lora


SCRIPT = load_script("train_srdd")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]
SCALES = ["1x1", "2x2", "4x4"]


def parse(*arguments):
    required = ["--output_dir", "out", "--pretrained_vqvae_name_or_path", "vqvae"]
    return SCRIPT.parse_args([str(argument) for argument in [*required, *arguments]])


def load(folder: Path) -> ScaleTransformer2DModel:
    return ScaleTransformer2DModel.from_pretrained(folder, subfolder="transformer")


def losses(folder: Path) -> list[dict]:
    return [record for record in read_log(folder) if "loss" in record]


def draw(folder: Path, labels=None) -> torch.Tensor:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.fixture(scope="module")
def run(image_folder, trained, tmp_path_factory):
    """A function that trains in a folder of its own, with one token cache for all."""
    root = tmp_path_factory.mktemp("runs")

    def start(name: str, *arguments, images: Path = image_folder) -> Path:
        cache = ["--token_cache_dir", root / "tokens"]
        train_transformer(images, trained / "tokenizer", root / name, *QUIET, *cache, *arguments)
        return root / name

    start.root = root
    return start


@pytest.fixture(scope="module")
def plain(run):
    """A run without options and without any chance, which others are compared to."""
    return run("plain", "--class_dropout_prob", 0)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_rank", 4], "`--lora_rank` needs `--pretrained_model_name_or_path`"),
        (["--attention_pattern", "full"], "invalid choice: 'full'"),
        (["--scale_loss_weights", "1,b"], "invalid float_list value: '1,b'"),
        (["--mixed_precision", "int8"], "invalid choice: 'int8'"),
        (["--max_train_steps", 0], "must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_an_attention_backend_for_training(run, plain):
    # The same attention by another name: nothing else changes.
    native = run("native", "--class_dropout_prob", 0, "--attention_backend", "native")
    assert_same_weights(load(native), load(plain))
    with pytest.raises(ValueError, match="must be one that has gradients on a CPU, got 'flex'"):
        run("flex", "--attention_backend", "flex")
    with pytest.raises(ValueError, match=r"must be one of .* got 'fast'"):
        run("fast", "--attention_backend", "fast")
    for name in ("flex", "fast"):
        assert not [path for path in (run.root / name).iterdir() if path.name != ".training.lock"]


def test_one_call_under_a_mask_trains_the_same_and_goes_on_from_calls_per_scale(run, plain, capsys):
    options = ["--class_dropout_prob", 0, "--attention_backend", "mask", "--checkpointing_steps", 2]
    masked = run("mask", *options)
    assert "one call for all scales under a dense mask (as `--attention_backend` says)" in capsys.readouterr().err
    assert_same_weights(load(masked), load(plain), atol=1e-5)
    for mine, others in zip(losses(masked), losses(plain), strict=True):
        assert mine == pytest.approx(others, rel=1e-5)
    shutil.copytree(masked / "checkpoint-2", run.root / "changed" / "checkpoint-2")
    changed = run("changed", *options, "--attention_backend", "per_scale", "--resume_from_checkpoint", "latest")
    assert "`attention_backend` 'per_scale' (before: 'mask')" in capsys.readouterr().out
    assert_same_weights(load(changed), load(plain), atol=1e-5)


def test_an_adapter_trains_the_same_under_a_mask(run, plain):
    options = ["--pretrained_model_name_or_path", plain / "transformer", "--lora_rank", 2, "--gradient_checkpointing"]
    options += ["--class_dropout_prob", 0, "--learning_rate", 1e-2, "--adam_epsilon", 1e-3]
    folders = [run(f"adapter {way}", *options, "--attention_backend", way) for way in ("per_scale", "mask")]
    adapters = [load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in folders]
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-5)
    assert_same_weights(*map(load, folders), atol=1e-5)


def test_a_tokenizer_is_needed(capsys):
    with pytest.raises(SystemExit):
        SCRIPT.parse_args(["--output_dir", "out"])
    assert "--pretrained_vqvae_name_or_path" in capsys.readouterr().err


def test_the_learning_rate_follows_from_what_is_trained():
    words = ["--output_dir", "out", "--pretrained_vqvae_name_or_path", "x"]
    of_pretrained = ["--pretrained_model_name_or_path", "y"]
    assert SCRIPT.parse_args(words).learning_rate == 1e-3
    assert SCRIPT.parse_args([*words, *of_pretrained]).learning_rate == 1e-4
    assert SCRIPT.parse_args([*words, "--scale_lr"]).learning_rate == 1e-4  # VAR's, for 256 images
    assert SCRIPT.parse_args([*words, *of_pretrained, "--learning_rate", "0"]).learning_rate == 0


def test_the_model_is_built_from_the_arguments_and_the_tokenizer():
    vqvae = tiny_vqvae()
    args = parse(
        "--num_layers", 3, "--num_attention_heads", 2, "--attention_head_dim", 4, "--attention_pattern", "banded",
        "--per_block_adaln", "--class_dropout_prob", 0.3, "--drop_path_rate", 0.2,
    )  # fmt: skip
    config = SCRIPT.build_model(args, vqvae, {0: "a", 1: "b"}).config
    expected = {
        "codebook_size": vqvae.config.codebook_size,
        "latent_channels": vqvae.config.latent_channels,
        "scale_sizes": vqvae.config.scale_sizes,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "attention_pattern": "banded",
        "shared_adaln": False,
        "class_dropout_prob": 0.3,
        "drop_path_rate": 0.2,
        "num_classes": 2,
        "id2label": {"0": "a", "1": "b"},
    }
    assert {name: config[name] for name in expected} == expected
    config = SCRIPT.build_model(parse(), vqvae, {}).config
    assert (config.attention_pattern, config.shared_adaln, config.num_classes) == ("markov", True, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codebook_size": 31}, "tokenizer's codebook_size, 32, got 31"),
        ({"latent_channels": 4}, "tokenizer's latent_channels, 8, got 4"),
        (
            {"scale_sizes": [1, 4]},
            r"tokenizer's scale_sizes, \[\[1, 1\], \[2, 2\], \[4, 4\]\], got \[\[1, 1\], \[4, 4",
        ),
    ],
)
def test_a_transformer_of_another_tokenizer_is_refused(tmp_path, overrides, message):
    tiny_transformer(**overrides).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path` must have the {message}"):
        SCRIPT.build_model(parse("--pretrained_model_name_or_path", tmp_path), tiny_vqvae(), {})


# Classes


def test_known_classes_keep_their_embedding_and_new_ones_start_as_the_null_class():
    model = tiny_transformer(id2label=dict(enumerate("abcde")))
    old = model.class_embed.weight.detach().clone()
    SCRIPT.fit_classes(model, {0: "new", 1: "d", 2: "a"})
    assert model.id2label == {0: "new", 1: "d", 2: "a"}
    assert model.config.num_classes == 3
    assert torch.equal(model.class_embed.weight, old[[5, 3, 0, 5]])
    assert model.class_embed.weight.requires_grad
    assert model(torch.zeros(2, 21, 8), class_labels=torch.tensor([2, 3])).sample.isfinite().all()


def test_the_same_classes_leave_the_embedding_alone():
    model = tiny_transformer(id2label=dict(enumerate("abcde")))
    embedding = model.class_embed
    SCRIPT.fit_classes(model, dict(enumerate("abcde")))
    assert model.class_embed is embedding


def test_data_without_classes_keep_the_null_class_alone():
    model = tiny_transformer()
    null_class = model.class_embed.weight[5].detach().clone()
    SCRIPT.fit_classes(model, {})
    assert model.config.num_classes == 0
    assert torch.equal(model.class_embed.weight, null_class[None])


def test_new_classes_survive_saving(tmp_path):
    model = tiny_transformer(id2label=dict(enumerate("abcde")))
    SCRIPT.fit_classes(model, {0: "x", 1: "e"})
    model.save_pretrained(tmp_path)
    again = ScaleTransformer2DModel.from_pretrained(tmp_path)
    assert again.id2label == {0: "x", 1: "e"}
    assert_same_weights(again, model)


def test_a_pretrained_transformer_takes_other_classes(image_folder, run, plain, tmp_path):
    images = tmp_path / "images"
    for name in ("warm", "hot", "boiling"):
        shutil.copytree(image_folder / "warm", images / name)
    folder = run(
        "classes", "--pretrained_model_name_or_path", plain / "transformer", "--learning_rate", 0, images=images
    )
    before, after = load(plain), load(folder)
    assert after.id2label == {0: "boiling", 1: "hot", 2: "warm"}
    names = {name: index for index, name in before.id2label.items()}
    assert torch.equal(after.class_embed.weight, before.class_embed.weight[[2, 2, names["warm"], 2]])
    assert_same_weights_but(before, after, "class_embed.weight")
    assert draw(folder, ["hot"]).isfinite().all()


def assert_same_weights_but(left, right, *names):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name in left.keys() - set(names):
        assert torch.equal(left[name], right[name]), name


def test_a_pretrained_transformer_keeps_its_sizes_and_takes_the_options(run, plain):
    folder = run(
        "pretrained", "--pretrained_model_name_or_path", plain / "transformer", "--learning_rate", 0, "--num_layers",
        5, "--class_dropout_prob", 0.4, "--drop_path_rate", 0.1, "--attention_pattern", "causal",
    )  # fmt: skip
    before, after = load(plain), load(folder)
    assert_same_weights(before, after)
    assert after.config.num_layers == 1
    assert (after.config.class_dropout_prob, after.config.drop_path_rate) == (0.4, 0.1)
    assert after.config.attention_pattern == "causal"
    assert before.config.attention_pattern == "markov"


@pytest.mark.parametrize(("pattern", "windows"), [(None, [0, 0, 3]), ("markov", [0, 0, 3]), ("causal", None)])
def test_windows_of_a_pretrained_transformer_go_with_their_pattern(pattern, windows, tmp_path):
    base = tiny_transformer(attention_windows=[0, 0, 3])
    base.save_pretrained(tmp_path)
    options = ["--attention_pattern", pattern] if pattern else []
    args = parse("--pretrained_model_name_or_path", tmp_path, *options)
    config = SCRIPT.build_model(args, tiny_vqvae(), base.id2label).config
    assert (config.attention_pattern, config.attention_windows) == (pattern or "markov", windows)


# Options of a run


def test_logs_have_loss_and_accuracy_of_every_scale(plain):
    assert [record["step"] for record in losses(plain)] == [1, 2, 3, 4]
    for record in losses(plain):
        per_scale = [record[f"loss/{name}"] for name in SCALES]
        assert record["loss"] == pytest.approx((per_scale[0] + 4 * per_scale[1] + 16 * per_scale[2]) / 21, rel=1e-5)
        assert all(0 <= record[f"accuracy/{name}"] <= 1 for name in SCALES)
    [validation] = [record for record in read_log(plain) if "val_loss" in record]
    assert validation.keys() == {"step", "val_loss", "val_per_scale", "val_accuracy", "val_scales"}


@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_models_that_look_back_are_trained_and_drawn_from(run, pattern):
    folder = run(pattern, "--attention_pattern", pattern)
    assert load(folder).config.attention_pattern == pattern
    assert draw(folder, ["warm", "cold"]).isfinite().all()


def test_a_flat_folder_gives_an_unconditional_model(image_folder, run, tmp_path):
    (tmp_path / "images").mkdir()
    for index, path in enumerate(sorted(image_folder.rglob("*.png"))):
        shutil.copy(path, tmp_path / "images" / f"{index}.png")
    folder = run("flat", images=tmp_path / "images")
    assert load(folder).config.num_classes == 0
    assert draw(folder).shape == (1, 3, 16, 16)
    assert "without labels" in (folder / "README.md").read_text()


def test_per_block_adaln_is_a_projection_in_every_block(run, plain):
    names = set(weights(load(run("adaln", "--per_block_adaln"))))
    assert "blocks.0.adaln.weight" in names
    assert "adaln.weight" not in names
    assert "adaln.weight" in weights(load(plain))


def test_gradient_checkpointing_changes_nothing(run, plain):
    folder = run("checkpointing", "--class_dropout_prob", 0, "--gradient_checkpointing")
    assert_same_weights(load(folder), load(plain), atol=1e-5)


def test_small_batches_add_up_to_a_large_one(run):
    options = ["--class_dropout_prob", 0, "--max_train_steps", 2, "--lr_warmup_steps", 0]
    options += ["--adam_epsilon", 1e-2, "--learning_rate", 1e-2]
    large = run("large", *options, "--train_batch_size", 8)
    small = run("small", *options, "--train_batch_size", 4, "--gradient_accumulation_steps", 2)
    assert_same_weights(load(small), load(large), atol=1e-5)
    assert (load(large).proj_out.weight.abs() > 1e-3).any()
    for mine, others in zip(losses(small), losses(large), strict=True):
        assert mine == pytest.approx(others, rel=1e-5, abs=1e-6)


def test_scale_weights_change_the_loss_but_not_its_parts(run, plain):
    weighted = losses(run("weights", "--class_dropout_prob", 0, "--scale_loss_weights", "8,1,0"))[0]
    first = losses(plain)[0]
    assert weighted["loss"] == pytest.approx((8 * first["loss/1x1"] + 4 * first["loss/2x2"]) / 12, rel=1e-5)
    assert {weighted[f"loss/{name}"] - first[f"loss/{name}"] for name in SCALES} == {0}


def test_as_many_scale_weights_as_scales(run):
    with pytest.raises(ValueError, match=r"`scale_weights` must be 3 numbers.*got \[1.0, 2.0\]"):
        run("two weights", "--scale_loss_weights", "1,2")


def test_label_smoothing_raises_the_loss_of_training_alone(run, plain):
    smooth = run("smooth", "--class_dropout_prob", 0, "--label_smoothing", 0.5, "--learning_rate", 0)
    sharp = run("sharp", "--class_dropout_prob", 0, "--learning_rate", 0)
    assert losses(smooth)[0]["loss"] != losses(sharp)[0]["loss"]
    validations = [
        [record["val_loss"] for record in read_log(folder) if "val_loss" in record] for folder in (smooth, sharp)
    ]
    assert validations[0] == validations[1]


def test_class_dropout_and_drop_path_are_at_work_in_training_alone(run, plain):
    for name, value in (("class_dropout_prob", 1.0), ("drop_path_rate", 0.9)):
        options = ["--num_layers", 2, "--learning_rate", 0, "--adam_weight_decay", 0]
        with_it, without = (
            run(f"{name} {chance}", *options, "--class_dropout_prob", 0, f"--{name}", chance) for chance in (value, 0)
        )
        assert_same_weights(load(with_it), load(without))
        assert load(with_it).config[name] == value
        logs = [read_log(folder) for folder in (with_it, without)]
        assert logs[0][-1]["val_loss"] == logs[1][-1]["val_loss"]


def test_random_crops_and_mirrored_images_are_rows_of_the_cache(image_folder, trained, tmp_path):
    def rows(name, *options):
        train_transformer(
            image_folder, trained / "tokenizer", tmp_path / name, *QUIET, "--max_train_steps", 1, *options
        )
        return sorted(len(np.load(path)) for path in (tmp_path / name / "tokens").glob("*.npy"))

    assert rows("plain") == [24, 24]  # validation images come in another order
    assert rows("crops", "--random_crops", 3) == [24, 72]
    assert rows("both", "--random_crops", 2, "--random_flip") == [24, 96]


def test_a_part_of_the_data(image_folder, trained, tmp_path):
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *QUIET, "--max_train_samples", 9)
    assert "9 training images, 2 classes" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.usefixtures("_own_precision")
def test_half_precision_finishes_with_a_finite_loss(run, plain):
    folder = run("bf16", "--class_dropout_prob", 0, "--mixed_precision", "bf16")
    assert all(math.isfinite(value) for record in losses(folder) for value in record.values())
    assert losses(folder)[0]["loss"] == pytest.approx(losses(plain)[0]["loss"], abs=1e-2)
    assert {tensor.dtype for tensor in weights(load(folder)).values()} == {torch.float32}
    assert draw(folder, ["warm"]).isfinite().all()


def test_a_loss_that_is_no_number_stops_the_run_with_step_and_scales(run):
    with pytest.raises(
        FloatingPointError, match=r"not finite at step [23]: \{'loss': .*'loss/1x1': .*'loss/4x4': "
    ) as e:
        run("explosion", "--learning_rate", 1e30)
    assert "--learning_rate" in str(e.value)
    assert not (run.root / "explosion" / "model_index.json").exists()
    assert not (run.root / "explosion" / "README.md").exists()


def test_a_label_column_that_does_not_exist_is_refused(run):
    with pytest.raises(ValueError, match=r"`label_column` must be one of \['image', 'label'\]"):
        run("label", "--label_column", "class")


def test_the_finished_weights_are_averages(run):
    fast = run("ema 0", "--ema_decay", 0)
    state = load_file(fast / "checkpoint-4" / "model.safetensors")
    for name, tensor in weights(load(fast)).items():
        torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=0)
    slow = run("ema 0.9", "--ema_decay", 0.9)
    assert not torch.equal(load(slow).proj_out.weight, load(fast).proj_out.weight)


def test_weights_that_are_not_finite_are_refused_at_the_start(image_folder, trained, run, plain, tmp_path):
    vqvae = MultiScaleVQModel.from_pretrained(trained / "tokenizer")
    with torch.no_grad():
        vqvae.encoder.conv_in.weight[0] = math.nan
    vqvae.save_pretrained(tmp_path / "vqvae")
    with pytest.raises(ValueError, match=r"vqvae.*MultiScaleVQModel.*encoder\.conv_in\.weight is not finite"):
        train_transformer(image_folder, tmp_path / "vqvae", tmp_path / "run", *QUIET)
    assert not (tmp_path / "run" / "README.md").exists()
    model = load(plain)
    with torch.no_grad():
        model.proj_in.bias[0] = math.inf
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"transformer.*ScaleTransformer2DModel.*proj_in\.bias is not finite"):
        run("infinite", "--pretrained_model_name_or_path", tmp_path / "transformer")


# LoRA


@pytest.fixture(scope="module")
def lora(image_folder, run, plain):
    """An adapter of rank 2 on a pretrained transformer, for one class more."""
    images = run.root / "lora images"
    shutil.copytree(image_folder, images)
    shutil.copytree(image_folder / "warm", images / "hot")
    return run(
        "lora", "--pretrained_model_name_or_path", plain / "transformer", "--lora_rank", 2, "--lora_alpha", 6,
        "--learning_rate", 1e-2, images=images,
    )  # fmt: skip


def test_an_adapter_is_merged_and_changes_nothing_else(plain, lora):
    before, after = weights(load(plain)), weights(load(lora))
    assert before.keys() == after.keys()
    adapter = load_file(lora / "lora" / "pytorch_lora_weights.safetensors")
    changed = set()
    for name, tensor in after.items():
        if name == "class_embed.weight":
            continue
        stem = name.removesuffix(".weight")
        pair = [
            adapter.get(f"transformer.{stem}.lora_{half}.weight", adapter.get(f"{stem}.lora_{half}.weight"))
            for half in "AB"
        ]
        if pair[0] is None:
            assert torch.equal(tensor, before[name]), name
            continue
        changed.add(stem.removeprefix("blocks.0.").removeprefix("attn."))
        difference = tensor - before[name]
        assert torch.linalg.matrix_rank(difference, atol=1e-4) <= 2
        assert difference.abs().max() > 0
        torch.testing.assert_close(difference, 6 / 2 * pair[1] @ pair[0], atol=1e-5, rtol=0)
    assert changed == set(SCRIPT.LORA_TARGETS)


def test_an_adapter_trains_the_classes_too(plain, lora):
    before, after = load(plain), load(lora)
    assert after.id2label == {0: "cold", 1: "hot", 2: "warm"}
    start = before.class_embed.weight[[0, 2, 1, 2]]
    assert (after.class_embed.weight[:3] - start[:3]).abs().amax(dim=1).min() > 1e-4
    assert draw(lora, ["hot", "cold"]).isfinite().all()


@torch.no_grad()
def test_an_adapter_loads_onto_its_base(plain, lora):
    base, merged = load(plain), load(lora)
    SCRIPT.fit_classes(base, merged.id2label)
    base.class_embed.load_state_dict(merged.class_embed.state_dict())
    base.load_lora_adapter(lora / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    inputs = torch.randn(3, 21, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 3])
    outputs = [model.eval()(inputs, class_labels=labels).sample for model in (base, merged)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_adapter_and_its_base_are_the_trained_model(plain, lora, tmp_path):
    base, merged = load(plain), load(lora)
    load_lora(base, lora / "lora")
    assert base.id2label == merged.id2label == {0: "cold", 1: "hot", 2: "warm"}
    assert base.config.num_classes == 3
    inputs = torch.randn(4, 21, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    outputs = [model.eval()(inputs, class_labels=labels).sample for model in (base, merged)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    base.fuse_lora()
    base.unload_lora()
    assert_same_weights(base, merged)
    base.save_pretrained(tmp_path)
    assert_same_weights(ScaleTransformer2DModel.from_pretrained(tmp_path), merged)


def test_diffusers_own_loading_leaves_nothing_out(run, plain):
    options = ["--pretrained_model_name_or_path", plain / "transformer", "--lora_rank", 2, "--learning_rate", 1e-2]
    folder = run("lora of the same classes", *options, "--attention_pattern", "causal")
    base = load(plain)
    base.register_to_config(attention_pattern="causal")
    base.load_lora_adapter(folder / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    again = load(plain)
    load_lora(again, folder / "lora")
    assert again.config.attention_pattern == "causal"
    inputs = torch.randn(3, 21, 4, generator=torch.Generator().manual_seed(0))
    models = [load(folder), base, again, load(plain)]
    with torch.no_grad():
        outputs = [model.eval()(inputs, class_labels=torch.arange(3)).sample for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    assert torch.equal(outputs[1], outputs[2])
    assert (outputs[3] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("windows", [[0, 0, 3], None])
def test_an_adapter_brings_its_windows(windows, tmp_path):
    trained = tiny_transformer(attention_windows=windows)
    trained.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    save_lora(trained, tmp_path)
    if windows is None:  # of version 0.1
        config = json.loads((tmp_path / "config.json").read_text())
        del config["attention_windows"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    base = tiny_transformer()
    load_lora(base, tmp_path)
    assert base.config.attention_windows == windows
    inputs = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(base(inputs).sample, trained(inputs).sample, atol=1e-5, rtol=0)


def test_an_adapter_needs_a_base_of_its_sizes(plain, lora, tmp_path):
    with pytest.raises(
        ValueError, match="`transformer` must have the codebook_size of the adapter's base, 16, got 32"
    ):
        load_lora(tiny_transformer(), lora / "lora")
    with pytest.raises(
        ValueError, match="`folder` must hold 'pytorch_lora_weights.safetensors' and 'config.json', got"
    ):
        load_lora(load(plain), tmp_path)


def edited(folder: Path, target: Path, change) -> Path:
    """A copy of an adapter with other weights."""
    shutil.copytree(folder, target)
    path = target / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(change(weights), path, metadata)
    return target


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen", "infinite"])
def test_every_tensor_of_an_adapter_is_looked_at(kind, plain, lora, tmp_path):
    names = list(load_file(lora / "lora" / "pytorch_lora_weights.safetensors"))
    assert len(names) > 10
    for name in names:

        def change(weights, name=name):
            tensor = weights.pop(name)
            if kind == "unexpected":
                return {**weights, name: tensor, f"{name}.old": tensor.clone()}
            if kind == "misshapen":
                return {**weights, name: tensor[:-1]}
            return {**weights, name: tensor / 0} if kind == "infinite" else weights

        says = {"misshapen": "must have shape", "infinite": "is not finite"}.get(kind, f"is {kind}")
        base = load(plain)
        with pytest.raises(ValueError, match=rf"{re.escape(name)}(\.old)? {says}"):
            load_lora(base, edited(lora / "lora", tmp_path / name, change))
        assert_same_weights(base, load(plain))
        assert base.config == load(plain).config


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["config.json", "pytorch_lora_weights.safetensors"])
def test_files_of_an_adapter_that_are_none(name, content, plain, lora, tmp_path):
    shutil.copytree(lora / "lora", tmp_path / "lora")
    (tmp_path / "lora" / name).write_bytes(content)
    with pytest.raises(ValueError, match="lora must be a saved adapter, but reading it failed with"):
        load_lora(load(plain), tmp_path / "lora")


def test_an_adapter_says_nothing_of_the_trainers_machine(run, lora):
    with safe_open(lora / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
    assert str(run.root) not in json.dumps(metadata)
    assert str(run.root) not in (lora / "lora" / "config.json").read_text()


def test_an_adapters_checkpoint_resumes_exactly(run, plain):
    options = ["--pretrained_model_name_or_path", plain / "transformer", "--lora_rank", 2, "--checkpointing_steps", 2]
    options += ["--gradient_checkpointing", "--drop_path_rate", 0.5]
    whole = run("lora whole", *options)
    shutil.copytree(whole / "checkpoint-2", run.root / "lora parts" / "checkpoint-2")
    parts = run("lora parts", *options, "--resume_from_checkpoint", "latest")
    assert_same_weights(load(parts), load(whole))


def test_a_transformer_learns_to_tell_two_colours(image_folder, run, trained):
    """Not only the bookkeeping is right: the loss falls to what is left to chance."""
    folder = run("longer", "--max_train_steps", 60, "--learning_rate", 1e-2, "--lr_warmup_steps", 5)
    log = losses(folder)
    assert log[0]["loss"] == pytest.approx(math.log(16), abs=0.1)
    assert sum(record["loss"] for record in log[-5:]) / 5 < 0.6 * log[0]["loss"]
