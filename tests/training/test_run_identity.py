"""A checkpoint is gone on from by the same run alone: the same data, classes, models and settings."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training.launching import make_image_folder
from training.tiny_runs import read_log, train_tokenizer, train_transformer

from srdd import MultiScaleVQModel
from srdd.data.images import LabelledImages, load_labelled_images
from srdd.training.run_identity import check_same_run, images_fingerprint, run_identity
from srdd.training.settings import MAY_CHANGE, TrainingSettings, TransformerSettings


OPTIONS = ["--report_to", "none", "--logging_steps", 1, "--lr_scheduler", "constant", "--lr_warmup_steps", 0]


def load(folder: Path, **options) -> LabelledImages:
    return load_labelled_images(train_data_dir=str(folder), **options)


def fingerprint(images: LabelledImages) -> str:
    return images_fingerprint(images.train, images.image_column, images.label_column)


# Images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return make_image_folder(tmp_path / "images", images_per_class=3)


def test_images_are_the_same_wherever_they_lie(folder, tmp_path):
    before = fingerprint(load(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "pictures")
    assert fingerprint(load(tmp_path / "elsewhere" / "pictures")) == before
    assert fingerprint(load(folder, cache_dir=str(tmp_path / "other cache"))) == before


@pytest.mark.parametrize(
    "change", ["changed", "renamed", "removed", "added", "other class", "reordered", "unlabelled"]
)
def test_other_images_have_another_fingerprint(folder, change):
    images = load(folder)
    before = fingerprint(images)
    path = folder / "cold" / "1.png"
    if change == "changed":
        Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(path)
    elif change == "added":
        shutil.copy(path, folder / "cold" / "9.png")
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(folder / "cold" / "7.png")
    elif change == "other class":
        path.rename(folder / "warm" / "1b.png")
    if change == "reordered":
        images.train = images.train.select([1, 0, 2, 3, 4, 5])
    elif change == "unlabelled":
        images.label_column = None
    else:
        images = load(folder)
    assert fingerprint(images) != before


def test_pictures_inside_of_a_table_have_a_fingerprint(folder):
    images = load(folder)
    pictures = [{"bytes": Path(path).read_bytes(), "path": None} for path in sorted(map(str, folder.rglob("*.png")))]

    def of(pictures: list[dict]) -> str:
        features = datasets.Features({"image": datasets.Image(), "label": images.train.features["label"]})
        table = datasets.Dataset.from_dict({"image": pictures, "label": images.train["label"][:]}, features=features)
        return images_fingerprint(table, "image", "label")

    assert of(pictures) == of(list(pictures))
    assert of(pictures) != of([pictures[1], pictures[0], *pictures[2:]])
    pictures[0] = {"bytes": pictures[0]["bytes"][:-1] + b"x", "path": None}
    assert of(pictures) != fingerprint(images)


# Settings


def compare(before: dict, after: dict, images=(None, None), num_processes=(1, 1), models=(None, None)) -> dict:
    settings = [TransformerSettings(output_dir="out", **options) for options in (before, after)]
    identities = [
        run_identity(setting, count, some, frozen=model and {"tokenizer": model})
        for setting, count, some, model in zip(settings, num_processes, images, models, strict=True)
    ]
    return check_same_run(settings[1], Path("checkpoint-4"), *identities)


def test_what_may_change_is_listed():
    before = {"max_train_steps": 10, "learning_rate": 1e-3, "report_to": "none"}
    after = {"max_train_steps": 20, "learning_rate": 1e-4, "report_to": "wandb", "logging_dir": "x", "cache_dir": "y"}
    changes = {"max_train_steps": [10, 20], "learning_rate": [1e-3, 1e-4], "report_to": ["none", "wandb"]}
    changes |= {"lr_warmup_steps": [0, 1], "validation_steps": [1, 2]}  # follow from the number of steps
    assert compare(before, after) == changes
    assert compare(before, {**before, "hub_token": "secret", "resume_from_checkpoint": "latest"}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_batch_size", 7), ("gradient_accumulation_steps", 3), ("seed", 1), ("random_flip", True),
        ("max_train_samples", 5), ("label_smoothing", 0.1), ("scale_loss_weights", [1.0, 2.0]), ("random_crops", 2),
        ("mixed_precision", "bf16"), ("label_column", "class"), ("min_image_size", 9),
    ],
)  # fmt: skip
def test_what_must_not_change_is_refused(name, value):
    default = getattr(TransformerSettings(output_dir="out"), name)
    with pytest.raises(ValueError, match=rf"`{name}` was .*, now .*start anew in another `output_dir`") as e:
        compare({}, {name: value, "learning_rate": 5.0})
    assert f"`{name}` was {default!r}, now {value!r}" in str(e.value)
    assert "learning_rate" not in str(e.value)
    assert "'checkpoint-4'" in str(e.value)


def test_a_checkpoint_that_does_not_know_a_setting_had_its_default():
    settings = TrainingSettings(output_dir="out")
    saved = run_identity(settings, 1)
    del saved["settings"]["seed"], saved["settings"]["ema_decay"]
    assert check_same_run(settings, Path("c"), saved, run_identity(settings, 1)) == {}
    settings.seed = 3
    with pytest.raises(ValueError, match="`seed` was 0, now 3"):
        check_same_run(settings, Path("c"), saved, run_identity(settings, 1))


def test_the_number_of_processes_must_not_change():
    with pytest.raises(ValueError, match="the number of processes was 2, now 4"):
        compare({}, {}, num_processes=(2, 4))


def test_names_of_settings_exist():
    scripts = ("train_srdd", "train_tokenizer", "train_baseline", "distill_srdd", "distill_decoder")
    text = "".join((Path(__file__).parents[2] / "training_scripts" / f"{name}.py").read_text() for name in scripts)
    flags = set(TransformerSettings.__dataclass_fields__)
    assert [name for name in MAY_CHANGE - flags if f"    {name}: " not in text] == []


def test_other_weights_of_the_tokenizer_are_refused(trained):
    vqvae, other = (MultiScaleVQModel.from_pretrained(trained / "tokenizer") for _ in range(2))
    assert compare({}, {}, models=(vqvae, other)) == {}
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="the weights of the tokenizer are others"):
        compare({}, {}, models=(vqvae, other))


# Whole runs


@pytest.fixture(scope="module")
def stopped(image_folder, trained, tmp_path_factory):
    """A finished run of four steps, with a checkpoint of its last."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"
    train_transformer(image_folder, trained / "tokenizer", output_dir, *OPTIONS, "--learning_rate", 1e-3)
    return output_dir


def resume(image_folder, trained, stopped, output_dir, *more) -> Path:
    shutil.copytree(stopped, output_dir)
    options = [*OPTIONS, "--learning_rate", 1e-3, "--max_train_steps", 8, "--resume_from_checkpoint", "latest", *more]
    train_transformer(image_folder, trained / "tokenizer", output_dir, *options)
    return output_dir


def test_changed_options_hold_are_said_and_stand_in_the_card(image_folder, trained, stopped, tmp_path, capsys):
    run = resume(
        image_folder, trained, stopped, tmp_path / "run", "--learning_rate", 1e-5, "--adam_weight_decay", 0.5,
        "--ema_decay", 0.5, "--adam_epsilon", 1e-7, "--adam_beta2", 0.9,
    )  # fmt: skip
    assert [record["lr"] for record in read_log(run) if "lr" in record] == [1e-3] * 4 + [1e-5] * 4
    groups = torch.load(run / "checkpoint-8" / "optimizer.bin", weights_only=False)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {(group["eps"], group["betas"]) for group in groups} == {(1e-7, (0.9, 0.9))}
    averages = torch.load(run / "checkpoint-8" / "custom_checkpoint_1.pkl", weights_only=False)
    assert averages["decay"] == 0.5
    sentence = (
        "Resumed at step 4 with `adam_beta2` 0.9 (before: 0.95), `adam_epsilon` 1e-07 (before: 1e-08),"
        " `adam_weight_decay` 0.5 (before: 0.05), `ema_decay` 0.5 (before: 0.999), `learning_rate` 1e-05 (before:"
        " 0.001), `max_train_steps` 8 (before: 4)."
    )
    card = (run / "README.md").read_text()
    assert sorted(sentence.removesuffix(".").split(" with ")[1].split(", ")) == sorted(
        capsys.readouterr().out.split("Resumed at step 4 with ")[1].split(".\n")[0].split(", ")
    )
    assert "8 steps of" in card
    assert "(EMA 0.5)" in card
    assert "Resumed at step 4 with " in card
    again = resume(image_folder, trained, run, tmp_path / "again", "--learning_rate", 1e-5, "--adam_weight_decay", 0.5,
        "--ema_decay", 0.5, "--adam_epsilon", 1e-7, "--adam_beta2", 0.9, "--max_train_steps", 9)  # fmt: skip
    card = (again / "README.md").read_text()
    assert card.count("Resumed at step") == 2
    assert "Resumed at step 8 with `max_train_steps` 9 (before: 8)." in card
    capsys.readouterr()
    options = ["--learning_rate", 1e-5, "--adam_weight_decay", 0.5, "--ema_decay", 0.5, "--adam_epsilon", 1e-7]
    options += ["--adam_beta2", 0.9, "--max_train_steps", 10, "--validation_steps", 7, "--license", "cc0-1.0"]
    third = resume(image_folder, trained, again, tmp_path / "third", *options)
    assert "`validation_steps` 7 (before: 4)" in capsys.readouterr().out
    card = (third / "README.md").read_text()
    assert "Resumed at step 9 with `max_train_steps` 10 (before: 9)." in card


def test_a_longer_schedule_is_gone_on_with(image_folder, trained, tmp_path):
    # The learning rate follows the new course from the checkpoint on, as if the run had been meant to be so long.
    schedule = ["--report_to", "none", "--logging_steps", 1, "--lr_scheduler", "linear", "--learning_rate", 1]
    schedule += ["--lr_warmup_steps", 0, "--adam_epsilon", 1e6]
    rates = {}
    for name, steps in (("short", [4, 8]), ("long", [8])):
        for count in steps:
            options = [*schedule, "--max_train_steps", count, "--resume_from_checkpoint", "latest"]
            train_transformer(image_folder, trained / "tokenizer", tmp_path / name, *options)
        rates[name] = [record["lr"] for record in read_log(tmp_path / name) if "lr" in record]
    assert rates["short"][4:] == rates["long"][4:] == [0.375, 0.25, 0.125, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_train_steps", 3], "`max_train_steps` must be more than 4, .*checkpoint-4' has already, got 3"),
        (
            ["--max_train_steps", 4],
            "`max_train_steps` must be more than 4, .*checkpoint-4' has and is finished, got 4",
        ),
        (["--num_layers", 2], "`num_layers` was 1, now 2"),
        (["--train_batch_size", 4], "`train_batch_size` was 8, now 4"),
        (["--label_column", ""], "`label_column` was 'auto', now ''.*without .'cold', 'warm'."),
    ],
)
def test_another_run_is_refused(image_folder, trained, stopped, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        resume(image_folder, trained, stopped, tmp_path / "run", *options)
    assert read_log(tmp_path / "run") == read_log(stopped)


def test_a_run_that_has_its_steps_but_no_card_is_finished(image_folder, trained, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "README.md").unlink()
    options = [*OPTIONS, "--learning_rate", 1e-3, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *options)
    assert (tmp_path / "run" / "README.md").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("renamed", r"the classes are without \['warm'\] and with \['hot'\], in the order \['cold', 'hot'\]"),
        ("added", r"the classes are with \['mild'\], in the order \['cold', 'mild', 'warm'\]"),
        ("removed", "the number of training images was 24, now 23"),
        ("repainted", "the training images have other names, labels, captions, sizes or contents"),
    ],
)
def test_other_data_are_refused(image_folder, trained, stopped, tmp_path, change, message):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    if change == "renamed":
        (images / "warm").rename(images / "hot")
    elif change == "added":
        shutil.copytree(images / "warm", images / "mild")
    elif change == "removed":
        (images / "warm" / "3.png").unlink()
    else:
        Image.new("RGB", (20, 20)).save(images / "warm" / "3.png")
    with pytest.raises(ValueError, match=message):
        resume(images, trained, stopped, tmp_path / "run")


def test_another_tokenizer_is_refused(image_folder, trained, stopped, tmp_path):
    train_tokenizer(image_folder, tmp_path / "tokenizer", "--report_to", "none", "--seed", 1)
    with pytest.raises(ValueError, match="the weights of the tokenizer are others"):
        resume(
            image_folder, trained, stopped, tmp_path / "run", "--pretrained_vqvae_name_or_path", tmp_path / "tokenizer"
        )


def test_a_checkpoint_of_version_0_1_is_gone_on_from_with_a_warning(image_folder, trained, stopped, tmp_path, caplog):
    shutil.copytree(stopped, tmp_path / "old")
    for name in ("run.json", "SHA256SUMS"):
        (tmp_path / "old" / "checkpoint-4" / name).unlink()
    resume(image_folder, trained, tmp_path / "old", tmp_path / "run")
    assert "does not say which data, classes and settings it was made with" in caplog.text
