import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import tiny_pipeline
from training.launching import make_image_folder, start
from training.tiny_runs import load_script, run_script

from srdd.evaluation.distances import frechet_distance
from srdd.evaluation.features import EfficientNetLite0Features
from srdd.evaluation.image_sources import PipelineImages


NUM_SAMPLES = 14


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline and images to compare its drawings with."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_pipeline().save_pretrained(folder / "model")
    make_image_folder(folder / "images")
    return folder


def arguments(root, output_dir, *more) -> list:
    return [
        "--pretrained_model_name_or_path", root / "model", "--train_data_dir", root / "images", "--split", "train",
        "--cache_dir", root / "datasets", "--num_samples", NUM_SAMPLES, "--batch_size", 4, "--num_bootstrap", 5,
        "--output_dir", output_dir, *more,
    ]  # fmt: skip


def evaluate(root, output_dir, *more) -> dict:
    run_script("evaluate_srdd", *arguments(root, output_dir, *more))
    return json.loads((output_dir / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def evaluated(root):
    """Folder of an evaluation and its report."""
    return root / "evaluated", evaluate(root, root / "evaluated")


def test_numbers_are_those_of_the_drawings(root, evaluated):
    _, report = evaluated
    extractor = EfficientNetLite0Features()
    source = PipelineImages(tiny_pipeline(), NUM_SAMPLES)
    pictures = torch.cat(
        [source.read(range(start, min(start + 4, NUM_SAMPLES))) for start in range(0, NUM_SAMPLES, 4)]
    )
    module = load_script("evaluate_srdd")
    args = module.parse_args([str(argument) for argument in arguments(root, root / "unused")])
    reference, _ = module.load_reference(args, 8)
    real = reference.read(range(24))
    metric = report["metrics"]["FD (efficientnet-lite0)"]
    assert metric["value"] == pytest.approx(frechet_distance(extractor(real), extractor(pictures)), rel=1e-3)
    assert metric["interval"][0] < metric["value"] < metric["interval"][1]
    names = ("precision", "recall", "density", "coverage")
    assert set(report["metrics"]) == {
        *(f"{name} (efficientnet-lite0)" for name in ("FD", "KD", "IS", *names)),
    }


def test_reports_say_what_was_compared(root, evaluated):
    folder, report = evaluated
    samples, reference = report["settings"]["samples"], report["settings"]["reference"]
    assert samples["count"] == NUM_SAMPLES
    assert samples["guidance_scale"] == 2.5
    assert (samples["top_k"], samples["top_p"], samples["resampling_policy"]) == (0, 1.0, "none")
    assert (samples["seed"], samples["dtype"], samples["num_classes"]) == (0, "float32", 5)
    assert (reference["count"], reference["split"]) == (24, "train")
    assert report["settings"]["extractors"].keys() == {"efficientnet-lite0"}
    hashes = [samples["sha256"], reference["sha256"], samples["weights_sha256"]]
    assert all(re.fullmatch("[0-9a-f]{12}", digits) for digits in hashes)
    table = (folder / "evaluation.md").read_text()
    for row in ("| samples guidance scale | 2.5 |", "| samples scales | 1 2 4 |", "| reference count | 24 |"):
        assert row in table
    assert f"| reference sha256 | {reference['sha256']} |" in table
    assert Image.open(folder / "samples.png").size == (8 * 8, 8)


def test_no_number_is_called_fid(root, evaluated, capsys):
    folder, _ = evaluated
    evaluate(root, folder)  # all there: nothing is drawn again
    printed = capsys.readouterr().out
    assert printed == (folder / "evaluation.md").read_text()
    for text in (printed, (folder / "evaluation.json").read_text()):
        assert "FD (efficientnet-lite0)" in text
        assert not re.search(r"\b(FID|KID)\b", text)
        assert not re.search(r"\bIS\b(?! \(efficientnet-lite0\))", text)


def test_real_images_stand_beside_drawn_ones(evaluated):
    folder, report = evaluated
    distances = {name: metric["real"] for name, metric in report["metrics"].items() if "real" in metric}
    assert set(distances) == {"FD (efficientnet-lite0)", "KD (efficientnet-lite0)"}
    for real in distances.values():  # all 24 images are in the reference: halves of it
        assert (real["count"], real["reference_count"]) == (12, 12)
    table = (folder / "evaluation.md").read_text()
    assert f"{distances['FD (efficientnet-lite0)']['value']:.4g} (12 against 12) |" in table
    assert "real_images" not in report["settings"]


def test_as_many_real_images_are_read_where_there_are_others(root, tmp_path):
    report = evaluate(root, tmp_path, "--num_reference_images", 8)
    real = report["metrics"]["FD (efficientnet-lite0)"]["real"]
    assert (real["count"], real["reference_count"]) == (14, 8)
    assert report["settings"]["real_images"]["count"] == 14
    line = (tmp_path / "evaluation.md").read_text().splitlines()[2]
    assert line.endswith(f" {real['value']:.4g} |")  # as many as were drawn: nothing more to be said
    before = feature_files(tmp_path / "features")
    assert len(before) == 2 + 4 + 4  # reference, real images and samples
    assert evaluate(root, tmp_path, "--num_reference_images", 8) == report
    assert feature_files(tmp_path / "features") == before


def test_images_are_written_for_the_evaluator_of_others(root, evaluated, tmp_path):
    folder, report = evaluated
    assert evaluate(root, tmp_path, "--save_npz", tmp_path / "new" / "samples.npz") == report
    with np.load(tmp_path / "new" / "samples.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    source = PipelineImages(tiny_pipeline(), NUM_SAMPLES)
    drawn = [source.read(range(start, min(start + 4, NUM_SAMPLES))) for start in range(0, NUM_SAMPLES, 4)]
    assert torch.equal(images, torch.cat(drawn))
    # Ten files of features; the images are not kept twice.
    assert len(feature_files(tmp_path / "features")) == 10
    # They are what `--samples_dir` measures, and may be a reference.
    npz = tmp_path / "new" / "samples.npz"
    data = ["--train_data_dir", root / "images", "--split", "train", "--cache_dir", root / "datasets"]
    distance = report["metrics"]["FD (efficientnet-lite0)"]["value"]
    for name, reference, expected in (("a", data, distance), ("b", ["--reference_dir", npz], 0)):
        run_script(
            "evaluate_srdd", "--samples_dir", npz, *reference, "--num_bootstrap", 0, "--batch_size", 4,
            "--output_dir", tmp_path / name,
        )  # fmt: skip
        measured = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert measured["settings"]["samples"]["sha256"] == report["settings"]["samples"]["sha256"]
        assert measured["metrics"]["FD (efficientnet-lite0)"]["value"] == pytest.approx(expected, rel=1e-9)


def test_images_that_were_drawn_are_not_drawn_again_for_a_file(root, tmp_path, monkeypatch):
    module = load_script("evaluate_srdd")
    words = arguments(root, tmp_path, "--save_npz", tmp_path / "samples.npz")
    args = module.parse_args([str(word) for word in words])

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_npz", stop)
    with pytest.raises(KeyboardInterrupt):
        module.main(args)
    images = [path for path in feature_files(tmp_path / "features") if path.parent.name == "images"]
    assert len(images) == 4
    monkeypatch.setattr(PipelineImages, "draw", stop)
    evaluate(root, tmp_path, "--save_npz", tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert len(file["arr_0"]) == NUM_SAMPLES
    assert not [path for path in images if path.exists()]


def feature_files(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_an_interrupted_evaluation_goes_on(root, evaluated, tmp_path):
    folder, report = evaluated
    before = feature_files(folder / "features")
    assert len(before) == 6 + 4  # reference and samples
    lost = sorted(before)[3]
    lost.unlink()
    assert evaluate(root, folder) == report
    after = feature_files(folder / "features")
    assert {path for path in after if after[path] != before.get(path)} == {lost}


def test_features_are_shared_between_evaluations(root, evaluated, tmp_path):
    folder, report = evaluated
    before = feature_files(folder / "features")
    other = evaluate(root, tmp_path, "--feature_cache_dir", folder / "features", "--guidance_scale", 1)
    new = set(feature_files(folder / "features")) - set(before)
    assert len(new) == 4  # of the samples
    assert other["settings"]["reference"] == report["settings"]["reference"]
    assert other["settings"]["samples"]["sha256"] != report["settings"]["samples"]["sha256"]
    assert other["metrics"] != report["metrics"]


def test_the_scheduler_is_as_asked(root, tmp_path):
    report = evaluate(
        root, tmp_path, "--scales", "1,4", "--top_k", 5, "--top_p", 0.9, "--temperature", 0.8, "--resampling_policy",
        "masked", "--resampling_threshold", 0.2, "--num_resampling_passes", "0,2,1", "--guidance_schedule", "constant",
        "--guidance_start", 0.1, "--guidance_stop", 0.9, "--seed", 3,
    )  # fmt: skip
    samples = report["settings"]["samples"]
    expected = {
        "scales": [[1, 1], [4, 4]], "top_k": 5, "top_p": 0.9, "temperature": 0.8, "resampling_policy": "masked",
        "resampling_threshold": 0.2, "num_resampling_passes": [0, 2, 1],
        "guidance_schedule": "constant", "guidance_start": 0.1, "guidance_stop": 0.9, "seed": 3,
    }  # fmt: skip
    assert {name: samples[name] for name in expected} == expected


@pytest.mark.slow
def test_two_processes_give_the_same_report(root, evaluated, tmp_path):
    folder, report = evaluated
    words = [*arguments(root, tmp_path / "two"), "--save_npz", tmp_path / "two.npz"]
    start("evaluate_srdd", *words, output=tmp_path / "log.txt", num_processes=2).finish()
    assert (tmp_path / "two" / "evaluation.json").read_text() == (folder / "evaluation.json").read_text()
    # Both have worked: each wrote files of its own.
    files = feature_files(tmp_path / "two" / "features")
    assert {path.name for path in files} == {path.name for path in feature_files(folder / "features")}
    evaluate(root, tmp_path / "one", "--save_npz", tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])


def test_processes_that_do_not_know_of_each_other_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`WORLD_SIZE` must be the number of processes that work together, 1, got 2"):
        evaluate(root, tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures, and blurred copies of them under the same names."""
    folder = tmp_path_factory.mktemp("folders")
    noise = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(noise, size=(16, 16), mode="bicubic").clamp(0, 1)
    for name, pixels in (("originals", images), ("blurred", F.avg_pool2d(images, 3, stride=1, padding=1))):
        (folder / name).mkdir()
        for index, image in enumerate(pixels.mul(255).round().byte()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / f"{index}.png")
    return folder


def compare_folders(folders, output_dir, *more) -> dict:
    run_script(
        "evaluate_srdd", "--samples_dir", folders / "blurred", "--reference_dir", folders / "originals",
        "--output_dir", output_dir, "--num_bootstrap", 5, *more,
    )  # fmt: skip
    return json.loads((output_dir / "evaluation.json").read_text())


def test_pictures_of_others_are_measured(folders, tmp_path):
    report = compare_folders(folders, tmp_path)
    assert report["metrics"]["FD (efficientnet-lite0)"]["value"] > 0
    assert "PSNR" not in report["metrics"]
    assert report["settings"]["samples"]["folder"] == str(folders / "blurred")
    assert report["settings"]["samples"]["count"] == report["settings"]["reference"]["count"] == 9
    assert report["settings"]["resolution"] == 16


def test_reports_count_real_pictures_and_errors_name_the_others(folders, tmp_path):
    copy = shutil.copytree(folders, tmp_path / "folders")
    (copy / "blurred" / ".ipynb_checkpoints").mkdir()
    shutil.copy(copy / "blurred" / "0.png", copy / "blurred" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (copy / "blurred" / "._0.png").write_text("x")
    report = compare_folders(copy, tmp_path / "out", "--num_bootstrap", 0)
    assert report["settings"]["samples"]["count"] == 9
    (copy / "blurred" / "9.png").write_bytes((copy / "blurred" / "0.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"`samples_dir` must hold readable pictures, got '.*blurred/9\.png'"):
        compare_folders(copy, tmp_path / "out", "--num_bootstrap", 0)
    with pytest.raises(ValueError, match=r"`reference_dir` must be a folder with pictures, got '.*nowhere'"):
        compare_folders(folders, tmp_path / "out", "--reference_dir", tmp_path / "nowhere")


def test_tables_are_written_to_any_console(folders, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    compare_folders(folders, tmp_path / "out")
    console.flush()
    assert "| +- " in console.buffer.getvalue().decode("ascii")
    assert "| ± " in (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")


def test_pairs_are_compared(folders, tmp_path):
    report = compare_folders(folders, tmp_path / "pairs", "--paired")
    metrics = report["metrics"]
    assert 10 < metrics["PSNR"]["value"] < 40
    assert 0 < metrics["SSIM"]["value"] < 1
    low, high = metrics["SSIM"]["interval"]
    assert low < metrics["SSIM"]["value"] < high
    assert metrics["perceptual distance (efficientnet-lite0)"]["value"] > 0
    assert not any("LPIPS" in name for name in metrics)
    same = compare_folders(folders, tmp_path / "same", "--paired", "--samples_dir", folders / "originals")["metrics"]
    assert same["PSNR"] == {"value": "inf"}
    assert same["SSIM"]["value"] == pytest.approx(1)
    assert same["FD (efficientnet-lite0)"]["value"] == 0


def test_pairs_need_equal_names(folders, tmp_path):
    os.link(folders / "originals" / "0.png", folders / "originals" / "more.png")
    try:
        with pytest.raises(ValueError, match=r"same names, got \['more'\] in one folder only"):
            compare_folders(folders, tmp_path, "--paired")
    finally:
        (folders / "originals" / "more.png").unlink()
    assert not feature_files(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples_dir", "x"], "Give either `pretrained_model_name_or_path` or `samples_dir`, got"),
        (["--reference_dir", "x"], "Give one of `dataset_name`, `train_data_dir` and `reference_dir`, got"),
        (["--paired"], "`paired` must come with `samples_dir` and `reference_dir`"),
        (["--save_npz", "samples.png"], "`save_npz` must be a file whose name ends in .npz, got 'samples.png'"),
        (["--lpips"], "`lpips` must come with `paired`"),
        (["--features_weights", "a.pth"], "`features_weights` must come with `features` inception"),
        (["--num_bootstrap", -1], "`num_bootstrap` must be at least 0, got -1"),
        (["--num_samples", 5], "`num_samples` must be at least 6, got 5 images"),
        (["--num_reference_images", 4], "`num_reference_images` must be at least 6, got 4 images"),
        (["--split", "validation"], "`split` must be one the data set has, got 'validation'"),
        (["--top_p", 2], r"`top_p` must be a finite number above 0 and of at most 1, got 2"),
    ],
)
def test_arguments_are_checked_before_anything_is_drawn(root, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        evaluate(root, tmp_path, *more)
    assert not feature_files(tmp_path)


def test_pairs_have_names(folders, tmp_path):
    with pytest.raises(
        ValueError, match="`reference_dir` must be a folder with `paired`, got 'a.npz': it has no names"
    ):
        compare_folders(folders, tmp_path, "--paired", "--reference_dir", "a.npz")


def test_folders_have_no_scheduler(folders, tmp_path):
    with pytest.raises(ValueError, match="`top_k` must come with a pipeline"):
        compare_folders(folders, tmp_path, "--top_k", 3)
    with pytest.raises(ValueError, match="`num_samples` must be at most 9, the number of pictures, got 10"):
        compare_folders(folders, tmp_path, "--num_samples", 10)
