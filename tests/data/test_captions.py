"""Pictures with captions, from folders and data sets: each has its own text, or an error says which has none."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from srdd.data.images import LabelledImages, load_labelled_images
from srdd.training.run_identity import images_fingerprint


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "images"


def write_pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name)
    return root


def write_lines(folder: Path, *lines: dict | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def caption(name: str, text) -> dict:
    return {"file_name": name, "text": text}


def load(root: Path, column: str = "text", **options) -> LabelledImages:
    return load_labelled_images(train_data_dir=str(root), caption_column=column, **options)


def pairs(split: datasets.Dataset, column: str = "text") -> dict[int, str]:
    """Captions by the red of their pictures."""
    return {picture.getpixel((0, 0))[0]: text for picture, text in zip(split["image"], split[column])}


def test_captions_of_a_folder_stand_beside_its_pictures(root, caplog):
    write_pictures(root, "b.png", "a.png", "c.jpg")
    write_lines(root, caption("a.png", "one 犬\u2028line"), "", caption("./b.png", "two"), caption("c.jpg", "three"))
    images = load(root)
    assert pairs(images.train) == {0: "two", 1: "one 犬\u2028line", 2: "three"}
    assert images.caption_column == "text"
    assert images.label_column is None
    assert images.id2label == {}
    assert images.validation is None
    assert "3 pictures to train on" in images.summary
    assert "captions of 'text'" in images.summary
    assert caplog.text == ""


def test_folders_are_no_classes_and_each_may_have_captions(root, caplog):
    write_pictures(root, "0.png", "x/1.png", "x/y/2.png", "z/3.png")
    write_lines(root, caption("0.png", "zero"), caption("z/3.png", "three"))
    write_lines(root / "x", caption("1.png", "one"), caption("y/2.png", "two"))
    assert pairs(load(root).train) == {0: "zero", 1: "one", 2: "two", 3: "three"}
    assert caplog.text == ""


@pytest.mark.parametrize("where", ["in each split", "above"])
def test_splits_have_their_own_captions(root, where):
    write_pictures(root, "train/0.png", "train/a/1.png", "validation/0.png")
    lines = {"train": [caption("0.png", "zero"), caption("a/1.png", "one")], "validation": [caption("0.png", "two")]}
    for split, entries in lines.items():
        write_lines(root / split, *entries)
    if where == "above":
        moved = [caption(f"{split}/{e['file_name']}", e["text"]) for split, entries in lines.items() for e in entries]
        write_lines(root, *moved)
        for split in lines:
            (root / split / "metadata.jsonl").unlink()
    images = load(root)
    assert pairs(images.train) == {0: "zero", 1: "one"}
    assert pairs(images.validation) == {2: "two"}
    assert "class folders" not in images.summary


def test_another_key_may_hold_the_captions(root):
    write_pictures(root, "0.png")
    write_lines(root, {"file_name": "0.png", "text": "no", "long": "yes"})
    assert pairs(load(root, "long").train, "long") == {0: "yes"}


def test_pictures_that_cannot_be_used_take_their_captions_with_them(root, caplog):
    write_pictures(root, "0.png", "1.png", "2.png")
    (root / "1.png").write_bytes(b"")
    write_lines(root, *(caption(f"{index}.png", f"number {index}") for index in range(3)))
    assert pairs(load(root).train) == {0: "number 0", 2: "number 2"}
    assert "1 of 3 pictures cannot be used" in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"`train_data_dir` must hold a metadata.jsonl, with a line .* for each picture, got none in '.*images'"),
        ([caption("0.png", "x")], r"text for each picture, but 1 of 2 have none \(a/1.png: no caption\)"),
        ([caption("0.png", "x"), {"file_name": "a/1.png"}], r"1 of 2 have none \(a/1.png: no caption\)"),
        ([caption("0.png", None), caption("a/1.png", "x")], r"1 of 2 have none \(0.png: no caption\)"),
        ([caption("0.png", " \n"), caption("a/1.png", "x")], r"1 of 2 have none \(0.png: an empty caption\)"),
        ([caption("0.png", 5), caption("a/1.png", ["x"])], r"2 of 2 .* \(0.png: 5 is no text, a/1.png: \['x'\] is no"),
        ([caption("0.png", "x"), caption("a/1.png", "\ud800")], r"a/1.png: '\\\\?ud800' is not Unicode"),
        ([caption("0.png", "x"), caption("1.png", "x")], r"Line 2 of '.*metadata.jsonl' names '1.png', which is not"),
        ([caption("0.png", "x"), caption("./0.png", "y")], r"Line 2 of .* names './0.png' a second time"),
        (["{"], r"Line 1 of '.*metadata.jsonl' must be an object with the \"file_name\" of a picture, got b'{'"),
        (["", "[]"], "Line 2 of .* must be an object"),
        ([{"text": "x"}], "Line 1 of .* must be an object"),
        ([{"file_name": 3, "text": "x"}], "Line 1 of .* must be an object"),
        ([{"file_name": "", "text": "x"}], "Line 1 of .* must be an object"),
    ],
)
def test_what_is_no_caption_is_named(root, lines, message):
    write_pictures(root, "0.png", "a/1.png")
    if lines:
        write_lines(root, *lines)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_bytes_that_are_no_text_are_named(root):
    write_pictures(root, "0.png")
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .*got b'.*xff"):
        load(root)


def test_a_split_without_captions_is_named(root):
    write_pictures(root, "train/0.png", "validation/0.png")
    write_lines(root / "train", caption("0.png", "zero"))
    with pytest.raises(ValueError, match=r"1 of 2 have none \(validation/0.png: no caption\)"):
        load(root)


def test_another_caption_is_another_run_but_no_other_picture(root):
    def read(*texts):
        write_lines(root, *(caption(f"{index}.png", text) for index, text in enumerate(texts)))
        split = load(root).train
        return images_fingerprint(split, "image", "text"), split._fingerprint

    write_pictures(root, "0.png", "1.png")
    first, again, other = read("one", "two"), read("one", "two"), read("two", "one")
    assert first == again
    assert first[0] != other[0]
    assert first[1] == other[1]  # the pyramids are those of the pictures


# Data sets


def save_data_set(folder: Path, captions, feature=None, validation=None) -> Path:
    feature = feature or datasets.Value("string")
    for name, texts in {"train": captions, "validation": validation}.items():
        if texts is None:
            continue
        pictures = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(texts))]
        features = datasets.Features({"image": datasets.Image(), "caption": feature})
        folder.mkdir(exist_ok=True)
        split = datasets.Dataset.from_dict({"image": pictures, "caption": texts}, features)
        split.to_parquet(folder / f"{name}-00000.parquet")
    return folder


def load_saved(folder: Path, column: str = "caption", **options) -> LabelledImages:
    return load_labelled_images(dataset_name=str(folder), caption_column=column, **options)


def test_captions_of_a_data_set_are_a_column(tmp_path):
    images = load_saved(save_data_set(tmp_path / "set", ["one", "two", "one"], validation=["three"]))
    assert pairs(images.train, "caption") == {0: "one", 1: "two", 2: "one"}
    assert pairs(images.validation, "caption") == {0: "three"}
    part = load_saved(tmp_path / "set", max_train_samples=2, seed=1).train
    assert pairs(part, "caption").items() < {0: "one", 1: "two", 2: "one"}.items()


def test_a_folder_with_captions_is_a_data_set_too(root):
    write_pictures(root, "0.png", "1.png")
    write_lines(root, caption("1.png", "one"), caption("0.png", "zero"))
    assert pairs(load_saved(root, "text").train) == {0: "zero", 1: "one"}


@pytest.mark.parametrize(
    ("captions", "feature", "validation", "message"),
    [
        (
            ["x", None, "y", ""],
            None,
            None,
            r"2 of 4 .* \(row 1 of the train split: no caption, row 3 of the train spl",
        ),
        (["x"], None, ["x", " "], r"1 of 2 have none \(row 1 of the validation split: an empty caption\)"),
        ([None, None], datasets.Value("string"), None, "2 of 2 have none"),
        ([1, 2], datasets.Value("int64"), None, "hold one text for each picture, got Value.*int64"),
        ([["x", "y"]], [datasets.Value("string")], None, "hold one text for each picture, got"),
        ([0], datasets.ClassLabel(names=["x"]), None, "hold one text for each picture, got ClassLabel"),
    ],
)
def test_columns_that_hold_no_captions_are_refused(tmp_path, captions, feature, validation, message):
    with pytest.raises(ValueError, match=f"`caption_column` must .*{message}"):
        load_saved(save_data_set(tmp_path / "set", captions, feature, validation))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("text", r"must be one of \['image', 'caption'\], the columns of the train split, got 'text'"),
        ("image", "must be another column than `image_column`, got 'image'"),
    ],
)
def test_a_column_that_cannot_be_is_refused(tmp_path, column, message):
    with pytest.raises(ValueError, match=f"`caption_column` {message}"):
        load_saved(save_data_set(tmp_path / "set", ["x"]), column)
