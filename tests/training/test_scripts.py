import json
import math
import shutil

import pytest
import torch
from PIL import Image
from training.tiny_runs import assert_same_weights, run_script, train_tokenizer, train_transformer

from srdd import MultiScaleVQModel, SRDDPipeline


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


def test_how_often_a_run_validates_changes_nothing_of_what_it_learns(image_folder, trained, tmp_path):
    often = ["--validation_steps", 1]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", *often)
    assert_same_weights(
        SRDDPipeline.from_pretrained(tmp_path / "model").transformer,
        SRDDPipeline.from_pretrained(trained / "model").transformer,
    )
    random = ["--scale_dropout_prob", 0.5]  # without it there is no chance in the steps
    train_tokenizer(image_folder, tmp_path / "seldom", *random)
    train_tokenizer(image_folder, tmp_path / "often", *random, *often)
    assert_same_weights(*(MultiScaleVQModel.from_pretrained(tmp_path / name) for name in ("seldom", "often")))


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
    alike = [tmp_path / "first.png", tmp_path / "second.png"]
    for seed, path in enumerate(alike):
        run_script(
            "sample_srdd", "--pretrained_model_name_or_path", trained / "model", "--top_k", 1, "--seed", seed,
            "--device", "cpu", "--output", path,
        )  # fmt: skip
    assert alike[0].read_bytes() == alike[1].read_bytes()


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


def evaluate(image_folder, trained, capsys, *more) -> dict:
    run_script(
        "evaluate_tokenizer", "--pretrained_vqvae_name_or_path", trained / "tokenizer", "--train_data_dir",
        image_folder, "--cache_dir", image_folder.parent / "datasets", "--device", "cpu", *more,
    )  # fmt: skip
    return json.loads(capsys.readouterr().out)


def test_evaluation_of_a_part_of_the_images(image_folder, trained, capsys):
    def part(seed):
        return evaluate(
            image_folder, trained, capsys, "--split", "train", "--no_rfd", "--max_samples", 7, "--batch_size", 3,
            "--seed", seed,
        )  # fmt: skip

    first = part(0)
    assert first["num_images"] == 7
    assert "rfd" not in first
    assert part(0) == first
    assert part(1)["psnr"] != first["psnr"]


def test_evaluation_needs_its_split(image_folder, trained, capsys):
    with pytest.raises(ValueError, match="`split` must be one the data set has, got 'validation'"):
        evaluate(image_folder, trained, capsys)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("other", ["codebook", "scales"])
def test_a_teacher_must_have_the_same_tokens(image_folder, trained, tmp_path, capsys, other, signed):
    if other == "codebook":
        teacher = MultiScaleVQModel.from_pretrained(trained / "tokenizer")
        torch.nn.init.normal_(teacher.quantize.codebook.weight)
    else:
        config = MultiScaleVQModel.load_config(trained / "tokenizer")
        teacher = MultiScaleVQModel.from_config(config, scale_sizes=[1, 3, 4])
    teacher.register_to_config(codebook_fingerprint=None)
    if signed:
        teacher.sign_codebook()
    teacher.save_pretrained(tmp_path)
    name = {"codebook": "codebook_fingerprint", "scales": "scale_sizes"}[other]
    with pytest.raises(ValueError, match=f"`teacher_vqvae_name_or_path` must be .* same tokens, whose `{name}` is"):
        evaluate(image_folder, trained, capsys, "--split", "train", "--teacher_vqvae_name_or_path", tmp_path)


def test_a_measured_tokenizer_is_the_one_that_was_logged(image_folder, trained, capsys):
    last = json.loads((trained / "tokenizer" / "train_log.jsonl").read_text().splitlines()[-1])
    report = evaluate(image_folder, trained, capsys, "--split", "train", "--no_rfd")
    for name in ("num_images", "psnr", "ssim", "codes_used", "usage", "perplexity"):
        assert report[name] == pytest.approx(last[f"val_{name}"], abs=1e-3)


def test_sampling_needs_no_classes(image_folder, trained, tmp_path):
    options = ["--label_column", "", "--report_to", "none", "--max_train_steps", 1]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "model", *options)
    run_script(
        "sample_srdd", "--pretrained_model_name_or_path", tmp_path / "model", "--num_images_per_prompt", 3,
        "--enlarge", 1, "--device", "cpu", "--output", tmp_path / "row.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "row.png").height == 16
