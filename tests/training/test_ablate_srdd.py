import json
import shutil

import pytest
import torch
from PIL import Image
from training.tiny_runs import run_script

from srdd import SRDDPipeline
from srdd.data.images import image_to_tensor, load_labelled_images, validation_images
from srdd.evaluation.image_sources import DataSetImages


# The model is all but untrained: what it draws hardly depends on guidance.
MASKED = {"model": "SDD", "scheduler": {"resampling_policy": "masked", "resampling_threshold": 0.1}}
SWEEP = {"axis": "temperature", "values": [0, 2.0], "curves": {"SDD": {"model": "SDD"}}}
TABLES = [
    {
        "name": "policies",
        "title": "P",
        "kind": "samples",
        "seeds": [0, 1],
        "rows": {"SDD": {"model": "SDD"}, "MR": MASKED},
    },
    {"name": "temperature", "title": "G", "kind": "samples", "sweep": SWEEP},
    {
        "name": "editing",
        "title": "E",
        "kind": "editing",
        "tasks": ["thick", "2x"],
        "rows": {"filled": {"model": "none", "options": {"filling": "smooth"}}, "SDD": {"model": "SDD"}},
    },
    {"name": "bits", "title": "B", "kind": "likelihood", "rows": {"SDD": {"model": "SDD"}}},
    {"name": "signal", "title": "S", "kind": "signal_to_noise", "rows": {"SDD": {"model": "SDD"}}},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({"defaults": {"num_images": 8}, "tables": TABLES}))
    return path


def ablate(image_folder, config, trained, output_dir, *more):
    run_script(
        "ablate_srdd", "--config", config, "--train_data_dir", image_folder, "--cache_dir",
        image_folder.parent / "datasets", "--model", f"SDD={trained / 'model'}", "--output_dir", output_dir,
        "--num_reference_images", 12, "--batch_size", 5, "--num_bootstrap", 2, *more,
    )  # fmt: skip


def test_tables_figures_and_pictures_are_made_and_not_made_again(image_folder, trained, config, tmp_path, capsys):
    ablate(image_folder, config, trained, tmp_path)
    first = capsys.readouterr().out
    stored = json.loads((tmp_path / "ablations.json").read_text())
    kinds = [entry["cell"]["kind"] for entry in stored["cells"]]
    samples = ["samples"] * 4 + ["real images"] + ["samples"] * 2  # both tables have eight images: once for both
    assert kinds == [*samples, *["editing"] * 4, "likelihood", "signal_to_noise"]
    # Another seed, policy or temperature draws other pictures.
    distances = [entry["result"]["frechet_distance"] for entry in stored["cells"][:7]]
    assert len(set(distances)) == len(distances)
    assert all(distance > 0 for distance in distances)
    assert 0 < stored["cells"][-2]["result"]["all"] < 8
    files = {f"{name}.{kind}" for name in ("policies", "temperature", "editing") for kind in ("md", "png")}
    assert {path.name for path in tmp_path.iterdir()} == {"ablations.json", "bits.md", "signal.md", *files}
    # Two images for each task, each as original, as given and as two rows.
    assert Image.open(tmp_path / "editing.png").size == (2 * 4 * 16, 2 * 16)
    assert Image.open(tmp_path / "policies.png").size == (10 * 16, 2 * 16)

    # Eight of the twelve images that are not in the reference.
    for name in ("policies", "temperature"):
        row = (tmp_path / f"{name}.md").read_text().splitlines()[-1]
        assert row.startswith(f"| real images | {distances[4]:.1f} (")
        assert row.endswith(" |  |")

    stored["cells"][3]["result"]["frechet_distance"] = -1.0
    (tmp_path / "ablations.json").write_text(json.dumps(stored, indent=1) + "\n")
    ablate(image_folder, config, trained, tmp_path)
    assert json.loads((tmp_path / "ablations.json").read_text()) == stored
    second = capsys.readouterr().out
    assert second != first
    assert second.split("## G")[1] == first.split("## G")[1]


def test_a_part_of_the_reference_is_compared_where_there_are_no_other_images(image_folder, config, trained, tmp_path):
    more = ["--table", "policies", "--num_reference_images", 24]
    ablate(image_folder, config, trained, tmp_path, *more)
    row = (tmp_path / "policies.md").read_text().splitlines()[-1]
    assert row.startswith("| real images (8 against 16) | ")


def test_the_reference_is_the_first_of_the_held_out_images(image_folder):
    images = load_labelled_images(train_data_dir=str(image_folder), cache_dir=str(image_folder.parent / "datasets"))
    held_out = validation_images(images, 20)
    reference = DataSetImages(images, "train", 12, 16)
    pixels = [image_to_tensor(image, 16) for image in held_out["image"][:12]]
    assert torch.equal(reference.read(range(12)), torch.stack(pixels).add(1).mul(127.5).round().byte())


def test_tables_can_be_chosen(image_folder, trained, config, tmp_path, capsys):
    ablate(image_folder, config, trained, tmp_path, "--table", "bits")
    assert (tmp_path / "bits.md").exists()
    assert not (tmp_path / "signal.md").exists()
    with pytest.raises(ValueError, match="`table` must be among"):
        ablate(image_folder, config, trained, tmp_path, "--table", "bytes")


def bits(folder) -> dict:
    (cell,) = json.loads((folder / "ablations.json").read_text())["cells"]
    return cell["result"]


def test_a_model_that_was_trained_anew_is_measured_anew(image_folder, trained, config, tmp_path, caplog):
    ablate(image_folder, config, trained, tmp_path / "kept", "--table", "bits")
    before = bits(tmp_path / "kept")
    pipe = SRDDPipeline.from_pretrained(trained / "model")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1)
    pipe.save_pretrained(tmp_path / "model")
    caplog.clear()
    for folder in ("kept", "new"):
        ablate(image_folder, config, tmp_path, tmp_path / folder, "--table", "bits")
    assert bits(tmp_path / "kept") == bits(tmp_path / "new") != before
    lines = [record.getMessage() for record in caplog.records if "cells are forgotten" in record.getMessage()]
    assert len(lines) == 1
    assert "has other models by the names ['SDD']: 1 of its 1 cells" in lines[0]


def test_files_that_say_nothing_of_models_are_measured_anew(image_folder, trained, config, tmp_path):
    ablate(image_folder, config, trained, tmp_path, "--table", "bits")
    stored = json.loads((tmp_path / "ablations.json").read_text())
    settings = {name: value for name, value in stored["settings"].items() if name != "images"}
    older = {"settings": settings, "cells": [{**stored["cells"][0], "result": {"all": 9.0}}]}
    (tmp_path / "ablations.json").write_text(json.dumps(older))
    ablate(image_folder, config, trained, tmp_path, "--table", "bits")
    assert json.loads((tmp_path / "ablations.json").read_text()) == stored


def test_other_data_of_the_same_name_is_refused(image_folder, trained, config, tmp_path):
    ablate(image_folder, config, trained, tmp_path / "out", "--table", "bits")
    before = (tmp_path / "out" / "ablations.json").read_bytes()
    moved = shutil.copytree(image_folder, tmp_path / "moved" / image_folder.name)
    ablate(moved, config, trained, tmp_path / "out", "--table", "bits")
    picture = moved / "warm" / "3.png"
    with Image.open(picture) as image:
        turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_180)
    turned.save(picture)
    with pytest.raises(ValueError, match="`path` must hold measurements under the same settings"):
        ablate(moved, config, trained, tmp_path / "out", "--table", "bits")
    with pytest.raises(ValueError, match="`path` must hold measurements under the same settings"):
        ablate(image_folder, config, trained, tmp_path / "out", "--table", "bits", "--label_column", "")
    assert (tmp_path / "out" / "ablations.json").read_bytes() == before


def test_images_may_have_no_labels(image_folder, trained, config, tmp_path):
    results = []
    for labels in ("auto", ""):
        folder = tmp_path / f"labels {labels}"
        ablate(image_folder, config, trained, folder, "--table", "bits", "--label_column", labels)
        results.append(bits(folder)["all"])
    assert results[0] != results[1]


def test_there_is_no_seed_of_the_choice_of_images(image_folder, trained, config, tmp_path):
    with pytest.raises(SystemExit):
        ablate(image_folder, config, trained, tmp_path, "--seed", 7)


@pytest.mark.parametrize("kind", ["editing", "likelihood", "signal_to_noise"])
def test_tables_of_more_images_than_there_are_measure_nothing(image_folder, trained, tmp_path, kind):
    fine, large = ({"name": f"{kind} {count}", "title": "T", "num_images": count} for count in (24, 25))
    tables = [{**table, "kind": kind, "tasks": ["2x"], "rows": {"SDD": {"model": "SDD"}}} for table in (fine, large)]
    (tmp_path / "config.json").write_text(json.dumps({"tables": tables}))
    message = f"'num_images' of the table '{kind} 25' must be at most 24, the number of held-out images, got 25"
    with pytest.raises(ValueError, match=message):
        ablate(image_folder, tmp_path / "config.json", trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_must_be_named(image_folder, config, tmp_path):
    with pytest.raises(ValueError, match="`model` must say where"):
        run_script(
            "ablate_srdd",
            "--config",
            config,
            "--train_data_dir",
            image_folder,
            "--output_dir",
            tmp_path,
            "--model",
            "x=y",
        )
