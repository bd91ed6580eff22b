"""The folder of a finished run: what its card says, and what is not in it."""

import json
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_pipeline, tiny_transformer, tiny_vqvae
from training.tiny_runs import assert_same_weights, load_script, read_log, train_tokenizer, train_transformer

from srdd import MultiScaleVQModel, SRDDPipeline
from srdd.data.images import LabelledImages, image_to_tensor, load_labelled_images
from srdd.evaluation.reconstruction import evaluate_reconstruction
from srdd.training.model_card import draw_curve, model_card
from srdd.training.publishing import finish_pipeline, finish_tokenizer, not_published
from srdd.training.settings import TransformerSettings


QUIET = ["--report_to", "none", "--max_train_steps", 1]


def configurations(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.json") if "checkpoint-" not in str(path)]


def metadata(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


# Whole runs


@pytest.mark.parametrize(("folder", "picture"), [("tokenizer", "reconstruction"), ("model", "samples")])
def test_a_run_ends_with_a_card_that_the_hub_reads(trained, folder, picture):
    card = ModelCard.load(trained / folder / "README.md")
    assert card.data.library_name == "srdd"
    assert "license" not in card.data.to_dict()
    assert {"srdd", "diffusers"} <= set(card.data.tags)
    for file in (f"{picture}.png", "training_curve.png"):
        assert f"]({file})" in card.text
        with Image.open(trained / folder / file) as opened:
            opened.load()
    assert card.text.count("```") % 2 == 0


def test_a_card_shows_the_last_pictures(trained):
    assert (trained / "model" / "samples.png").read_bytes() == (trained / "model" / "samples-000004.png").read_bytes()


def test_a_card_says_how_to_use_the_model(trained):
    card = (trained / "model" / "README.md").read_text()
    snippet = card.split("```py\n")[1].split("```")[0].replace('"model"', repr(str(trained / "model")))
    names: dict = {}
    exec(snippet, names)
    assert names["image"].size == (16, 16)
    card = (trained / "tokenizer" / "README.md").read_text()
    snippet = card.split("```py\n")[1].split("```")[0].replace('"tokenizer"', repr(str(trained / "tokenizer")))
    names = {"pixels": torch.zeros(2, 3, 16, 16)}
    exec(snippet, names)
    assert names["token_ids"].shape == (2, 21)
    assert names["reconstruction"].shape == (2, 3, 16, 16)


def test_a_card_counts_images_classes_and_parameters(trained):
    card = (trained / "model" / "README.md").read_text()
    assert "`images`\n\n24 training images, 2 classes. Licence of the weights: not stated." in card
    model = SRDDPipeline.from_pretrained(trained / "model").transformer
    assert f"| `transformer` | {model.num_parameters() / 1e6:.1f} M | scales 1 2 4; codebook_size 16," in card
    assert "attention_pattern markov" in card
    card = (trained / "tokenizer" / "README.md").read_text()
    assert "24 training images, without labels" in card
    assert "| `tokenizer` |" in card


def test_a_card_has_the_last_validation_as_a_table(trained):
    card = (trained / "model" / "README.md").read_text()
    last = read_log(trained / "model")[-1]
    assert f"At step 4, averaged weights: loss {last['val_loss']:.4g}." in card
    values = " | ".join(f"{value:.3g}" for value in last["val_per_scale"])
    assert f"| scale | 1x1 | 2x2 | 4x4 |\n|---|---|---|---|\n| per_scale | {values} |" in card
    card = (trained / "tokenizer" / "README.md").read_text()
    last = read_log(trained / "tokenizer")[-1]
    assert f"psnr {last['val_psnr']:.4g}" in card
    assert "| usage | " in card
    assert "| perplexity | " in card


@pytest.mark.parametrize("folder", ["tokenizer", "model"])
def test_saved_configurations_name_no_folder_of_the_trainer(trained, folder):
    found = configurations(trained / folder)
    assert found
    for path in found:
        assert "_name_or_path" not in json.loads(path.read_text())
        assert str(trained) not in path.read_text()


def test_a_model_from_pretrained_parts_names_no_folder_either(image_folder, trained, tmp_path):
    train_transformer(
        image_folder, trained / "tokenizer", tmp_path / "run", *QUIET, "--pretrained_model_name_or_path",
        trained / "model" / "transformer",
    )  # fmt: skip
    for path in configurations(tmp_path / "run"):
        assert str(trained) not in path.read_text()
        assert "_name_or_path" not in path.read_text()
    SRDDPipeline.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    "words", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub_tok", "hf_secret"]]
)
def test_a_card_has_the_command_without_the_token(image_folder, trained, tmp_path, words):
    description = "pears -- not 'apples'"
    train_transformer(
        image_folder, trained / "tokenizer", tmp_path / "run", *QUIET, *words, "--data_description", description,
        "--license", "cc0-1.0", "--lr_scheduler=constant",
    )  # fmt: skip
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path
    card = (tmp_path / "run" / "README.md").read_text()
    assert "hub_tok" not in card
    command = card.split("```sh\n")[1].split("```")[0]
    words = shlex.split(command)
    assert words[:2] == ["accelerate", "launch"]
    assert words[words.index("--data_description") + 1] == description
    assert words[words.index("--max_train_steps") + 1] == "4"
    assert words[words.index("--report_to") + 1] == "none"
    assert "--lr_scheduler=constant" in words
    assert command.count("\n") >= len([word for word in words if word.startswith("--")])
    assert f"{description}\n\n24 training images" in card
    assert "Licence of the weights: cc0-1.0" in card
    assert metadata(tmp_path / "run")["license"] == "cc0-1.0"


def test_weights_may_be_stored_in_half_precision(image_folder, trained, tmp_path):
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *QUIET, "--save_dtype", "float16")
    for part in ("transformer", "vqvae"):
        stored = load_file(tmp_path / "run" / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    pipe = SRDDPipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.dtype == torch.float32
    assert pipe("warm", output_type="pt").images.isfinite().all()
    half = SRDDPipeline.from_pretrained(tmp_path / "run", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16
    assert "stored as float16" in (tmp_path / "run" / "README.md").read_text()


def test_a_tokenizer_may_be_stored_in_half_precision(image_folder, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--save_dtype", "bfloat16")
    stored = load_file(tmp_path / "run" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = MultiScaleVQModel.from_pretrained(tmp_path / "run")
    assert model(torch.zeros(1, 3, 16, 16)).sample.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tokenizer_with_another_decoder_still_fits_its_transformers(image_folder, trained, tmp_path, dtype):
    start = ["--pretrained_model_name_or_path", trained / "tokenizer", "--train_decoder_only", "--save_dtype", dtype]
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, *start)
    vqvae = MultiScaleVQModel.from_pretrained(tmp_path / "run")
    before = MultiScaleVQModel.from_pretrained(trained / "tokenizer")
    assert vqvae.config.codebook_fingerprint == before.config.codebook_fingerprint
    pipe = SRDDPipeline.from_pretrained(trained / "model", vqvae=vqvae)
    assert pipe("warm", output_type="pt").images.isfinite().all()
    sentence = "1 steps of 8 images per process, of the decoder alone."
    assert sentence in (tmp_path / "run" / "README.md").read_text()
    assert "alone" not in (trained / "tokenizer" / "README.md").read_text()


@pytest.mark.parametrize("folder", ["tokenizer", "model"])
def test_saving_in_full_precision_casts_nothing(trained, folder, caplog, tmp_path):
    # diffusers warns of every cast, whatever the model.
    images = some_images()
    settings = make_settings(tmp_path / "run")
    write_log(tmp_path / "run")
    if folder == "tokenizer":
        finish_tokenizer(settings, MultiScaleVQModel.from_pretrained(trained / folder), images)
    else:
        finish_pipeline(settings, SRDDPipeline.from_pretrained(trained / folder), images, 2.5)
    assert "Casting directly" not in caplog.text


def test_a_card_says_how_well_the_tokenizer_gives_the_pictures_back(image_folder, trained):
    card = (trained / "model" / "README.md").read_text()
    vqvae = MultiScaleVQModel.from_pretrained(trained / "tokenizer")
    images = load_labelled_images(train_data_dir=str(image_folder), cache_dir=str(image_folder.parent / "datasets"))
    pixels = torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])
    metrics, _ = evaluate_reconstruction(vqvae, [{"pixel_values": pixels}])
    assert f"\n\nTraining images come back of their tokens at {metrics['psnr']:.1f} dB PSNR.\n\n" in card
    assert "PSNR" not in (trained / "tokenizer" / "README.md").read_text()


# The end of a run by itself


def make_settings(output_dir: Path, **options) -> TransformerSettings:
    defaults = {
        "train_data_dir": "/home/me/pictures",
        "license": "apache-2.0",
        "command": ["train_srdd.py", "--output_dir", "run"],
        "seed": 3,
        "max_train_steps": 20,
        "train_batch_size": 8,
    }
    kind = load_script("train_srdd").SRDDSettings
    return kind(output_dir=str(output_dir), **{**defaults, **options})


def some_images(num_validation: int | None = None, description: str = "") -> LabelledImages:
    train = datasets.Dataset.from_dict(
        {"image": list(range(1234))}, info=datasets.DatasetInfo(description=description)
    )
    validation = None if num_validation is None else train.select(range(num_validation))
    return LabelledImages(train, validation, "image", "label", {0: "it's", 1: "b"})


def write_log(folder: Path, *records: dict) -> list[dict]:
    folder.mkdir(exist_ok=True)
    records = list(records or [{"step": 10, "loss": 2.0, "lr": 1e-4}, {"step": 20, "loss": 1.0, "lr": 0.0}])
    (folder / "train_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def finish(folder: Path, pipe: SRDDPipeline | None = None, images: LabelledImages | None = None, **options) -> str:
    if not (folder / "train_log.jsonl").exists():
        write_log(folder)
    finish_pipeline(make_settings(folder, **options), pipe or tiny_pipeline(), images or some_images(), 2.5)
    return (folder / "README.md").read_text()


def test_a_run_without_validation_says_so(tmp_path):
    card = finish(tmp_path / "run")
    assert "No validation was run." in card
    assert (tmp_path / "run" / "training_curve.png").is_file()


def test_data_are_described_by_the_user_or_by_the_data_set_or_by_their_name(tmp_path):
    card = finish(tmp_path / "1", images=some_images(description="From the data set."), data_description="My own.")
    assert "My own.\n\n1,234 training images, 2 classes." in card
    assert "From the data set." not in card
    card = finish(tmp_path / "2", images=some_images(56, description=" From the data set.\n"))
    assert "From the data set.\n\n1,234 training images, 56 for validation, 2 classes." in card
    card = finish(tmp_path / "3")
    assert "## Training data\n\n`pictures`\n" in card
    assert "/home/me" not in card
    assert "`someone/fruit`" not in card
    assert "`fruit`" in finish(tmp_path / "4", train_data_dir=None, dataset_name="someone/fruit")


def test_a_card_names_the_model_that_it_started_from_and_takes_its_licence(tmp_path):
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: cc-by-sa-4.0\nbase_model: someone/first\n---\n# Base\n")
    command = ["/home/me/train.py", "--train_data_dir", "/home/me/pictures", "--cache_dir=/home/me/cache"]
    start = {"pretrained_model_name_or_path": str(base / "transformer"), "command": command}
    card = finish(tmp_path / "run", license=None, **start)
    assert metadata(tmp_path / "run")["license"] == "cc-by-sa-4.0"
    assert metadata(tmp_path / "run")["base_model"] == "someone/first"
    assert "Licence of the weights: cc-by-sa-4.0, that of the base model." in card
    assert "accelerate launch train.py \\\n    --train_data_dir pictures \\\n    --cache_dir=cache\n" in card
    assert str(tmp_path) not in card
    card = finish(tmp_path / "own", license="cc0-1.0", **start)
    assert metadata(tmp_path / "own")["license"] == "cc0-1.0"
    assert "Licence of the weights: cc0-1.0." in card


def test_a_base_of_the_hub_is_named_though_it_cannot_be_reached(tmp_path):
    # No repository can have this name, so that nothing is asked of a network.
    finish(tmp_path / "run", pretrained_model_name_or_path="some/lost/folder")
    assert metadata(tmp_path / "run")["base_model"] == "some/lost/folder"


def test_a_card_says_if_it_was_validated_on_training_images(tmp_path):
    sentence = "There is no validation split: these are training images."
    assert sentence in finish(tmp_path / "1")
    assert sentence not in finish(tmp_path / "2", images=some_images(5))


def test_a_card_uses_a_class_of_the_model(tmp_path):
    pipe = tiny_pipeline(transformer=tiny_transformer(id2label={0: "it's", 4: "x"}))
    assert """pipe("it's", guidance_scale=2.5)""" in finish(tmp_path / "named", pipe)
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0))
    assert "image = pipe().images[0]" in finish(tmp_path / "none", pipe)
    pipe = tiny_pipeline(transformer=tiny_transformer(guidance_distilled=True))
    assert "image = pipe('apple').images[0]" in finish(tmp_path / "distilled", pipe)


def test_a_card_tells_versions_and_settings(tmp_path):
    card = finish(tmp_path / "run")
    assert f"torch {torch.__version__}" in card
    assert "seed 3, 20 steps of 8 images per process" in card
    assert "(EMA 0.999), stored as float32" in card


def test_models_that_are_not_square_have_readable_scales(tmp_path):
    vqvae = tiny_vqvae(sample_size=(8, 12), scale_sizes=[[1, 1], [2, 3], [4, 6]])
    log = write_log(tmp_path, {"step": 5, "val_psnr": 20.25, "val_usage": [0.5, 0.25, 1]})
    card = model_card(make_settings(tmp_path), some_images(), {"tokenizer": vqvae}, "code", "reconstruction", log)
    assert "scales 1 2x3 4x6;" in card
    assert "| scale | 1x1 | 2x3 | 4x6 |" in card
    assert "| usage | 0.5 | 0.25 | 1 |" in card
    assert "psnr 20.25" in card


def test_the_picture_of_the_last_step_is_shown_whatever_lies_around(tmp_path):
    folder = tmp_path / "run"
    write_log(folder)
    for step, colour in ((10, "red"), (20, "green"), (999_999, "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / f"samples-{step:06d}.png")
    finish(folder)
    assert (folder / "samples.png").read_bytes() == (folder / "samples-000020.png").read_bytes()


def test_files_of_others_in_the_folder_are_left_as_they_are(tmp_path):
    folder = tmp_path / "run"
    write_log(folder)
    (folder / "notes").mkdir()
    others = {
        folder / "list.json": "[1, 2]",
        folder / "notes" / "broken.json": "{",
        folder / "notes" / "mine.json": '{"_name_or_path": "mine"}',
    }
    for path, text in others.items():
        path.write_text(text)
    finish(folder)
    assert {path: path.read_text() for path in others} == others


def test_a_curve_is_drawn_of_any_log(tmp_path):
    logs = {
        "training": [{"step": step, "loss": 1 / step} for step in range(1, 9)],
        "validation": [{"step": 1, "loss": 1.0}, {"step": 1, "val_loss": 2.0}, {"step": 2, "val_loss": 1.0}],
        "quality": [{"step": 1, "loss": 1.0}, {"step": 1, "val_psnr": 20.0}],
        "schedules": [
            {"step": 1, "loss": 1.0},
            {"step": 1, "val_loss": 2.0, "val_loss/1-2": 2.0, "val_loss/1-4": 1.0},
        ],
        "nan": [{"step": 1, "loss": float("nan")}],
    }
    for name, log in logs.items():
        draw_curve(log, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (700, 400)
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 5


def test_a_folder_that_is_saved_twice_is_as_if_saved_once(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    first = finish(tmp_path / "run", SRDDPipeline.from_pretrained(trained / "model"))
    assert finish(tmp_path / "run", SRDDPipeline.from_pretrained(trained / "model")) == first
    assert_same_weights(
        SRDDPipeline.from_pretrained(tmp_path / "run").transformer,
        SRDDPipeline.from_pretrained(trained / "model").transformer,
    )


def test_checkpoints_logs_and_caches_stay_at_home_wherever_they_lie(tmp_path):
    folder = tmp_path / "run"

    def published(**options) -> set[str]:
        files = [
            "README.md", "model_index.json", "vqvae/config.json", "lora/pytorch_lora_weights.safetensors",
            "samples.png", "checkpoint-2/optimizer.bin", "partial-4/model.safetensors", "stage-1/README.md",
            "logs/run/events", "stage-1/checkpoint-2/optimizer.bin", "tokens/tokens-1.npy", "my/tokens/1.npy",
            "data/pears.arrow", "samples-000004.png", "logbook.txt",
        ]  # fmt: skip
        patterns = not_published(make_settings(folder, **options))
        return set(filter_repo_objects(files, ignore_patterns=patterns))

    kept = {
        "README.md", "model_index.json", "vqvae/config.json", "lora/pytorch_lora_weights.safetensors", "samples.png",
        "logbook.txt",
    }  # fmt: skip
    here = {"token_cache_dir": str(folder / "tokens"), "cache_dir": str(folder / "data")}
    assert published(**here) == kept | {"my/tokens/1.npy"}
    there = {"token_cache_dir": str(folder / "my" / "tokens"), "cache_dir": str(tmp_path), "logging_dir": "./data"}
    assert published(**there) == kept | {"tokens/tokens-1.npy", "logs/run/events"}


@pytest.mark.parametrize("part", ["transformer", "vqvae"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, part):
    pipe = tiny_pipeline()
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"the trained {part} as float32 must have finite weights, got NaN or inf"):
        finish(tmp_path / "run", pipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train_log.jsonl"]


def test_weights_that_are_too_large_for_their_dtype_are_not_saved(tmp_path):
    vqvae = tiny_vqvae()
    with torch.no_grad():
        vqvae.quantize.codebook.weight[0, 0] = 1e5
    write_log(tmp_path / "run")
    settings = make_settings(tmp_path / "run", save_dtype="float16")
    with pytest.raises(ValueError, match="the trained tokenizer as float16 must .* tensors: quantize.codebook.weight"):
        finish_tokenizer(settings, vqvae, some_images())
    assert not (tmp_path / "run" / "config.json").exists()
