import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srdd import MultiScaleVQModel, SRDDPipeline


SCRIPTS = Path(__file__).parents[2] / "training_scripts"


def run_script(name: str, *arguments: str | Path) -> None:
    """Run a training script in this process."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A stranger's folder: two classes of small pictures of different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, colour in (("cold", (20, 40, 200)), ("warm", (220, 80, 20))):
        (root / name).mkdir()
        for index in range(12):
            height, width = rng.integers(16, 24, size=2)
            pixels = np.clip(rng.normal(colour, 20, size=(height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def train_tokenizer(image_folder, output_dir, *more):
    run_script(
        "train_tokenizer", "--train_data_dir", image_folder, "--cache_dir", output_dir.parent / "datasets",
        "--output_dir", output_dir, "--resolution", 16, "--scale_sizes", "1,2,4", "--block_out_channels", "32,32",
        "--codebook_size", 16, "--latent_channels", 4, "--perceptual_weight", 0, "--train_batch_size", 8,
        "--max_train_steps", 4, "--revive_steps", 2, "--checkpointing_steps", 2, "--validation_steps", 4,
        "--lr_warmup_steps", 1, *more,
    )  # fmt: skip


def train_transformer(image_folder, tokenizer, output_dir, *more):
    run_script(
        "train_srdd", "--train_data_dir", image_folder, "--cache_dir", output_dir.parent / "datasets",
        "--output_dir", output_dir, "--pretrained_vqvae_name_or_path", tokenizer, "--num_layers", 1,
        "--num_attention_heads", 2, "--attention_head_dim", 8, "--train_batch_size", 8, "--max_train_steps", 4,
        "--checkpointing_steps", 2, "--validation_steps", 4, "--num_validation_images", 2, "--lr_warmup_steps", 1,
        *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    train_tokenizer(image_folder, root / "tokenizer")
    train_transformer(image_folder, root / "tokenizer", root / "model")
    return root


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_folder_of_images_becomes_a_pipeline(trained):
    pipe = SRDDPipeline.from_pretrained(trained / "model")
    assert pipe.id2label == {0: "cold", 1: "warm"}
    assert_same_weights(pipe.vqvae, MultiScaleVQModel.from_pretrained(trained / "tokenizer"))
    images = pipe(["cold", "warm"], output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


@pytest.mark.parametrize("folder", ["tokenizer", "model"])
def test_logs_pictures_and_checkpoints_are_written(trained, folder):
    log = [json.loads(line) for line in (trained / folder / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [4, 4]
    assert all(math.isfinite(log[0][name]) for name in ("loss", "lr"))
    assert any(name.startswith("val_") for name in log[1])
    assert {path.name for path in (trained / folder).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert len(list((trained / folder).glob("*-000004.png"))) == 1
    assert list((trained / folder / "logs").rglob("events.out.tfevents.*"))


def test_tokenizer_resumes_where_it_was(image_folder, trained, tmp_path):
    shutil.copytree(trained / "tokenizer" / "checkpoint-2", tmp_path / "tokenizer" / "checkpoint-2")
    train_tokenizer(image_folder, tmp_path / "tokenizer", "--resume_from_checkpoint", "latest")
    assert_same_weights(
        MultiScaleVQModel.from_pretrained(tmp_path / "tokenizer"),
        MultiScaleVQModel.from_pretrained(trained / "tokenizer"),
    )


def test_transformer_resumes_where_it_was(image_folder, trained, tmp_path):
    shutil.copytree(trained / "model" / "checkpoint-2", tmp_path / "model" / "checkpoint-2")
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", "--resume_from_checkpoint", "latest")
    assert_same_weights(
        SRDDPipeline.from_pretrained(tmp_path / "model").transformer,
        SRDDPipeline.from_pretrained(trained / "model").transformer,
    )


def test_training_without_labels_gives_an_unconditional_model(image_folder, trained, tmp_path):
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", "--label_column", "")
    pipe = SRDDPipeline.from_pretrained(tmp_path / "model")
    assert pipe.transformer.config.num_classes == 0
    assert len(pipe().images) == 1


def test_unknown_checkpoint_is_refused(image_folder, trained, tmp_path):
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` must be 'latest' or one of \[\], got 'nope'"):
        train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", "--resume_from_checkpoint", "nope")


def test_too_large_a_batch_is_refused(image_folder, trained, tmp_path):
    with pytest.raises(ValueError, match="`train_batch_size` must be at most 24, the number of training images"):
        train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", "--train_batch_size", 25)


def test_sample_script_writes_a_labelled_grid(trained, tmp_path):
    output = tmp_path / "grid.png"
    run_script(
        "sample_srdd", "--pretrained_model_name_or_path", trained / "model", "--num_images_per_prompt", 3,
        "--enlarge", 1, "--device", "cpu", "--output", output,
    )  # fmt: skip
    picture = Image.open(output)
    assert picture.height == 2 * 16
    assert picture.width > 3 * 16


def test_evaluation_script_prints_numbers(image_folder, trained, tmp_path, capsys):
    output = tmp_path / "pairs.png"
    run_script(
        "evaluate_tokenizer", "--pretrained_vqvae_name_or_path", trained / "tokenizer", "--train_data_dir",
        image_folder, "--split", "train", "--num_pictures", 4, "--device", "cpu", "--output", output,
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["num_images"] == 24
    assert 0 < report["psnr"] < 60
    assert len(report["usage"]) == len(report["perplexity"]) == 3
    assert Image.open(output).size == (4 * 16, 2 * 16)
