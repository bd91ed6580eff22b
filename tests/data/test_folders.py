"""Folders of pictures: no name bends the rule, nothing is left out in silence, and errors are sentences."""

import logging
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image, features

from srdd.data import picture_folders
from srdd.data.class_labels import class_order, describe_classes
from srdd.data.images import LabelledImages, load_labelled_images, training_transform
from srdd.data.picture_folders import FolderReader, picture_suffixes, read_picture_folder
from srdd.training.settings import DataSettings, TransformerSettings
from srdd.training.training_data import load_images


TWO = [f"{name}/{index}.png" for name in ("bus", "car") for index in range(2)]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "images"


def write(root: Path, *names: str) -> Path:
    """Files of these names: pictures by their ending, and texts; names that end with a slash are folders."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif path.suffix.lower() in picture_suffixes():
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        else:
            path.write_text("file_name,note\n0.png,x\n")
    return root


def classes(root: Path, **options) -> dict[str, int]:
    """How many training pictures every class has, in the order of the classes."""
    return dict(Counter(read_picture_folder(root, **options).train.labels))


def warnings_of(caplog, module: str = "picture_folders") -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == f"srdd.data.{module}")


# Names of folders beside `bus` and `car` that are classes like these.
CLASS_NAMES = [
    "train", "test", "val", "validation", "dev", "toy_train", "crash test", "test-drive", "training", "eval",
    "train-0", "Train", "TEST", "__other__", "_", "all", "default", "data", "metadata", "None", "nan", "null", "[ ]",
    "[a-z]", "*", "?", "**", "a*b", "$HOME", "${HOME}", "%TEMP%", "..up", "~", "~root", "a b", " a ", "é", "犬",
    "🐶", "it's", 'quo"te', "a,b", "a;b", "#1", "a#b", "hf:", "http:", "s3::x", "zip:", "x::y", "checkpoint-charlie",
    "checkpoint", "logs", "a.png", "b.jpg", "x.zip", "-", "-1", "0", "0.5", "1e5", "True", "{}", "{x}", "a\\b",
    "tab\there",
]  # fmt: skip


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_any_name_is_just_a_class(root, caplog, name):
    write(root, *TWO, *[f"{name}/{index}.png" for index in range(3)])
    assert classes(root) == {each: {name: 3}.get(each, 2) for each in sorted(["bus", "car", name], key=class_order)}
    assert warnings_of(caplog) == ""


@pytest.mark.parametrize("name", ["train", "[ ]", "$HOME", "..up", "x::y", "犬", "a b", "a*b"])
def test_pictures_of_classes_with_odd_names_are_read(root, name):
    write(root, *TWO, *[f"{name}/{index}.png" for index in range(3)])
    images = load_labelled_images(train_data_dir=str(root))
    assert sorted(images.id2label.values()) == sorted(["bus", "car", name])
    batch = training_transform(images, 8)(images.train[:])
    reds = [round((pixels[0, 0, 0].item() + 1) * 127.5) for pixels in batch["pixel_values"]]
    names = [images.id2label[label] for label in batch["labels"]]
    assert sorted(zip(reds, names)) == [*enumerate(["bus", "bus", "car", "car", name, name, name])]


@pytest.mark.parametrize(
    "name", ["my [ ] images", "images*", "$HOME", "a::b", "toy_train", "train", "test", ".hidden", "犬"]
)
def test_the_folder_itself_may_have_any_name(tmp_path, name):
    write(tmp_path / name, *TWO)
    images = load_labelled_images(train_data_dir=str(tmp_path / name))
    assert (len(images.train), images.validation) == (4, None)
    assert images.train[0]["image"].size == (8, 8)


def test_the_folder_may_be_given_by_a_relative_path(root, monkeypatch):
    write(root, *TWO)
    monkeypatch.chdir(root / "bus")
    assert classes(Path("..")) == {"bus": 2, "car": 2}
    images = load_labelled_images(train_data_dir="..")
    monkeypatch.chdir("/")
    assert images.train[0]["image"].size == (8, 8)


FILE_NAMES = [
    "train.png",
    "test.png",
    "val.0.png",
    "train-00000-of-00001.png",
    "[0].png",
    "*.png",
    "a b.png",
    "é.png",
    "a.b.c.png",
]


def test_names_of_files_mean_nothing(root, caplog):
    write(root, *TWO, *[f"bus/{name}" for name in FILE_NAMES])
    images = load_labelled_images(train_data_dir=str(root))
    assert images.id2label == {0: "bus", 1: "car"}
    assert Counter(images.train["label"][:]) == {0: 2 + len(FILE_NAMES), 1: 2}
    assert warnings_of(caplog) == ""


def test_files_that_are_no_pictures_are_counted_and_named(root, caplog):
    others = ["bus/metadata.csv", "car/metadata.csv", "metadata.jsonl", "README.md", "car/0.txt", "bus/clip.mpg"]
    write(root, *TWO, *others)
    assert classes(root) == {"bus": 2, "car": 2}
    assert warnings_of(caplog) == (
        f"Left out of {root}, no pictures by the ending of their names (6): README.md, metadata.jsonl,"
        " bus/clip.mpg, …."
    )


def test_pictures_beside_class_folders_are_left_out_and_named(root, caplog):
    write(root, *TWO, "cover.png")
    assert classes(root) == {"bus": 2, "car": 2}
    assert warnings_of(caplog).endswith(
        "pictures beside class folders or splits, which belong to none (1): cover.png."
    )


def test_pictures_may_lie_deeper_in_a_class_folder(root, caplog):
    write(root, *TWO, "car/red/9.png", "car/red/train/8.png", "bus/test/7.png")
    folder = read_picture_folder(root)
    assert Counter(folder.train.labels) == {"bus": 3, "car": 4}
    assert folder.notes == [
        "Pictures in folders of class folders, which belong to those classes (3): bus/test/7.png, car/red/9.png,"
        " car/red/train/8.png."
    ]
    assert warnings_of(caplog) == ""


def test_a_folder_around_the_classes_is_one_class_and_is_said_to_be(root):
    write(root, *[f"images/{name}" for name in TWO])
    folder = read_picture_folder(root)
    assert Counter(folder.train.labels) == {"images": 4}
    assert folder.notes[-1].startswith(
        "'images' is the only class. If its folders are meant as classes, they must lie"
    )


@pytest.mark.parametrize(
    "suffix",
    "png PNG jpg JPG Jpeg jpe jfif webp bmp gif tif TIFF ppm tga ico jp2 apng avif".split(),
)
def test_every_format_that_pillow_reads(root, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    write(root, *TWO)
    Image.new("RGB", (16, 16)).save(root / "car" / f"picture.{suffix}")
    images = load_labelled_images(train_data_dir=str(root))
    assert Counter(images.train["label"][:]) == {0: 2, 1: 3}


def test_what_pillow_cannot_read_is_no_picture():
    assert {".png", ".jpg", ".webp", ".mpo", ".gif"} <= picture_suffixes()
    assert not {".pdf", ".mpg", ".h5", ".csv", ".txt", ""} & picture_suffixes()


HIDDEN = [
    ".DS_Store", "._cover.png", "bus/._0.png", "bus/Thumbs.db", "car/.ipynb_checkpoints/0-checkpoint.png",
    ".git/a.png", "__MACOSX/bus/._0.png", "bus/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "desktop.ini", "lost+found/",
    ".thumbnails/0.png",
]  # fmt: skip


def test_hidden_files_and_folders_are_left_out(root, caplog):
    write(root, *TWO, *HIDDEN)
    assert classes(root) == {"bus": 2, "car": 2}
    assert f"hidden or made by the system ({len(HIDDEN)}): .DS_Store, ._cover.png, .git, …." in warnings_of(caplog)


def test_splits(root, caplog):
    write(root, *[f"train/{name}" for name in TWO], "val/car/0.png", "LICENSE", ".cache/x.png", "annotations/0.xml")
    images = load_labelled_images(train_data_dir=str(root))
    assert images.id2label == {0: "bus", 1: "car"}
    assert images.train["label"][:] == [0, 0, 1, 1]
    assert images.validation["label"][:] == [1]
    assert "Validation pictures are those of 'val'." in images.summary
    assert "folders without pictures, which are no classes (1): annotations." in warnings_of(caplog)


@pytest.mark.parametrize(
    ("names", "validation", "left_out"),
    [
        ([], None, []),
        (["val"], "val", []),
        (["validation"], "validation", []),
        (["valid"], "valid", []),
        (["dev"], "dev", []),
        (["test"], "test", []),
        (["test", "val"], "val", ["test"]),
        (["test", "dev", "validation"], "validation", ["dev", "test"]),
    ],
)
def test_names_of_splits(root, caplog, names, validation, left_out):
    write(root, *[f"{split}/{name}" for split in ("train", *names) for name in TWO])
    folder = read_picture_folder(root)
    assert Counter(folder.train.labels) == {"bus": 2, "car": 2}
    parents = None if folder.validation is None else {path.parents[1].name for path in folder.validation.paths}
    assert parents == (validation and {validation})
    assert (f"other splits ({len(left_out)}): {', '.join(left_out)}." in warnings_of(caplog)) == bool(left_out)


def test_splits_may_be_written_with_capitals(root):
    write(root, *[f"{split}/{name}" for split in ("Train", "Test") for name in TWO])
    assert classes(root) == {"bus": 2, "car": 2}


def test_other_splits_without_train_are_classes(root):
    write(root, *[f"{split}/{name}" for split in ("val", "test") for name in TWO])
    folder = read_picture_folder(root)
    assert Counter(folder.train.labels) == {"test": 4, "val": 4}
    assert folder.notes[-1].startswith(
        "'test', 'val': read as classes like the others. Splits are folders 'train' and"
    )


def test_flat_splits_have_no_classes_and_name_the_way_out(root):
    write(root, "train/0.png", "train/1.png", "val/2.png")
    images = load_labelled_images(train_data_dir=str(root))
    assert (len(images.train), len(images.validation), images.id2label) == (2, 1, {})
    assert images.label_column is None
    assert "no classes" in images.summary
    assert "For classes sort them into 'train/NAME' (and likewise in the other splits)." in images.summary


@pytest.mark.parametrize("flat", ["train", "val"])
def test_classes_in_one_split_alone_are_refused(root, flat):
    other = {"train": "val", "val": "train"}[flat]
    write(root, *[f"{other}/{name}" for name in TWO], *[f"{flat}/{index}.png" for index in range(3)])
    with pytest.raises(
        ValueError, match=r"`train_data_dir` must have class folders in both splits .* \(3 pictures, such"
    ):
        load_labelled_images(train_data_dir=str(root))
    images = load_labelled_images(train_data_dir=str(root), label_column=None)
    assert {len(images.train), len(images.validation)} == {3, 4}


def test_pictures_beside_the_class_folders_of_a_split(root, caplog):
    write(root, *[f"train/{name}" for name in TWO], "train/cover.png", "cover.png")
    assert classes(root) == {"bus": 2, "car": 2}
    assert "which belong to none (2): cover.png, train/cover.png." in warnings_of(caplog)


def test_a_split_without_pictures_is_none(root, caplog):
    write(root, *[f"train/{name}" for name in TWO], "val/bus/", "test/car/0.png")
    folder = read_picture_folder(root)
    assert folder.validation.labels == ["car"]
    assert "no classes (2): val/bus, val." in warnings_of(caplog)


def test_classes_of_the_validation_split_alone_are_refused(root):
    write(root, *[f"train/{name}" for name in TWO], "val/tram/0.png")
    with pytest.raises(
        ValueError, match=r"same labels in the validation split as in `train`, \['bus', 'car'\], got \['tram'\]"
    ):
        load_labelled_images(train_data_dir=str(root))


def test_folders_without_pictures_are_no_classes(root, caplog):
    write(root, *TWO, "empty/", "docs/readme.txt", "deep/er/")
    images = load_labelled_images(train_data_dir=str(root))
    assert images.id2label == {0: "bus", 1: "car"}
    assert "which are no classes (3): deep, docs, empty." in warnings_of(caplog)
    with pytest.raises(
        ValueError, match="`train_data_dir` must hold pictures in all class folders, got none in deep, docs,"
    ):
        load_labelled_images(train_data_dir=str(root), strict=True)


def test_pictures_beside_empty_folders_have_no_classes(root):
    write(root, "0.png", "1.png", "notes/readme.txt", ".git/x")
    folder = read_picture_folder(root)
    assert (len(folder.train.paths), folder.train.labels) == (2, None)


def test_numbers_keep_their_order(root):
    write(root, *[f"{name}/0.png" for name in ("10", "2", "-1", "007", "b", "B", "1.5", "10a", "9 lives")])
    assert list(classes(root)) == ["-1", "1.5", "2", "007", "10", "10a", "9 lives", "B", "b"]
    images = load_labelled_images(train_data_dir=str(root))
    assert list(images.id2label.values()) == ["-1", "1.5", "2", "007", "10", "10a", "9 lives", "B", "b"]
    assert images.train["label"][:] == list(range(9))


def test_links_are_followed(tmp_path, root):
    write(tmp_path / "elsewhere", "0.png", "1.png", "inner/2.png")
    write(root, *TWO)
    (root / "tram").symlink_to(tmp_path / "elsewhere")
    (root / "bus" / "more").symlink_to(tmp_path / "elsewhere" / "inner")
    (root / "car" / "linked.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "link").symlink_to(root)
    assert classes(root) == classes(tmp_path / "link") == {"bus": 3, "car": 3, "tram": 3}


def test_a_split_may_be_a_link(tmp_path, root):
    write(tmp_path / "elsewhere", *TWO)
    write(root, "val/bus/0.png")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "bus" / "up").symlink_to("..")
    assert classes(root) == {"bus": 2, "car": 2}


@pytest.mark.parametrize("target", [".", "..", "../..", "../bus", "../../images/bus", "/"])
def test_loops_of_links_end(root, caplog, target):
    write(root, *TWO)
    (root / "bus" / "loop").symlink_to(target)
    (root / "self").symlink_to(root)
    (root / "around").symlink_to("around")
    assert classes(root) == {"bus": 2, "car": 2}
    assert "links to folders that are read already" in warnings_of(caplog)
    assert "broken links, or no permission (1): around." in warnings_of(caplog)


def test_many_links_to_each_other_are_read_once(root):
    names = [f"{index:02d}" for index in range(12)]
    write(root, *[f"all/{name}/0.png" for name in names])
    for name in names:
        for other in names:
            (root / "all" / name / f"to {other}").symlink_to(root / "all" / other)
    assert classes(root) == {"all": 12}


def test_broken_links_are_named(root, caplog):
    write(root, *TWO)
    (root / "bus" / "gone.png").symlink_to("nowhere.png")
    (root / "tram").symlink_to("nowhere")
    assert classes(root) == {"bus": 2, "car": 2}
    assert "cannot be opened: broken links, or no permission (2): tram, bus/gone.png." in warnings_of(caplog)


def test_what_is_no_file_is_not_opened(root, caplog):
    write(root, *TWO)
    os.mkfifo(root / "bus" / "pipe.png")
    assert classes(root) == {"bus": 2, "car": 2}
    assert "bus/pipe.png" in warnings_of(caplog)


def test_names_that_are_not_utf_8_are_left_out(root, caplog):
    write(root, *TWO)
    try:
        os.mkdir(os.fsencode(root) + b"/\xff")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    shutil.copy(root / "bus" / "0.png", os.fsencode(root) + b"/\xff/0.png")
    assert classes(root) == {"bus": 2, "car": 2}
    assert "names that are not UTF-8 (1): \\udcff." in warnings_of(caplog)


@pytest.mark.parametrize("marker", ["train_log.jsonl", "model_index.json", "checkpoint-12/", "evaluation.json"])
@pytest.mark.parametrize("place", ["run", "runs/run"])
def test_a_folder_of_a_run_is_no_class(root, caplog, marker, place):
    write(root, *TWO, f"{place}/samples-000500.png", f"{place}/{marker}")
    assert classes(root) == {"bus": 2, "car": 2}
    assert f"folders that a training or an evaluation writes (1): {place}." in warnings_of(caplog)


def test_a_folder_that_this_run_writes_is_no_class(root, caplog):
    write(root, *TWO, "out/reconstruction-000500.png")
    assert classes(root) == {"bus": 2, "car": 2, "out": 1}
    assert classes(root, run_folders=[root / "out", root / "not yet", root.parent]) == {"bus": 2, "car": 2}
    assert "folders that a training or an evaluation writes (1): out." in warnings_of(caplog)
    with pytest.raises(ValueError, match="`folder` must be a folder that the run does not write to, got .*images"):
        classes(root, run_folders=[root])


def test_training_knows_the_folders_it_writes(root, capsys):
    write(root, *TWO, "out/sample.png", "tokens/0.png")
    settings = TransformerSettings(
        train_data_dir=str(root), output_dir=str(root / "out"), token_cache_dir=str(root / "tokens"),
        cache_dir=str(root.parent / "datasets"),
    )  # fmt: skip
    assert load_images(settings, "auto").id2label == {0: "bus", 1: "car"}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{root}: 4 pictures to train on, 0 to validate with; 2 classes: bus (2), car (2)." in captured.err


def test_the_summary_compares_what_was_found_with_what_is_used(root, caplog):
    write(root, *TWO, "tram/0.png", "car/7.png")
    for name in ("tram/0.png", "car/7.png"):
        (root / name).write_bytes(b"no picture")
    images = load_labelled_images(train_data_dir=str(root))
    assert images.summary == f"{root}: 4 pictures to train on, 0 to validate with; 2 classes: bus (2), car (2 of 3)."
    assert "classes without a picture that can be used (1): tram." in warnings_of(caplog, "images")


def test_many_classes_are_summarised():
    names = {index: f"class {index}" for index in range(1000)}
    labels = [index for index in names for _ in range(1 + index % 7)]
    text = describe_classes(names, labels, labels)
    assert text.startswith("1000 classes of 1 to 7 pictures: class 0 (1), class 1 (2),")
    assert text.endswith("…, class 997 (4), class 998 (5), class 999 (6)")
    assert len(text) < 300


def test_a_part_of_the_data_names_classes_without_pictures(root, caplog):
    write(root, *[f"{index}/0.png" for index in range(6)])
    images = load_labelled_images(train_data_dir=str(root), max_train_samples=2, seed=0)
    assert len(images.id2label) == 6
    assert "4 of 6 classes have no picture to train on, but keep their id: " in warnings_of(caplog, "images")


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ([], "nowhere", r"`train_data_dir` must be a folder with pictures, got '.*nowhere' \(No such file.*\)\."),
        ([], "*", r"must be a folder with pictures, got '.*\*' \(No such file or directory\)\."),
        (["0.png"], "0.png", r"must be a folder with pictures, got '.*0\.png' \(a file\)\."),
        (["empty/"], "empty", r"`train_data_dir` must hold pictures \(\.png, .*got none .*empty' \(it is empty\)\."),
        (["a.zip", "b.pq"], "", r"got none in '.*' \(2 no pictures by the ending of their names: a.zip, b.pq\)\."),
        ([".a/0.png"], "", r"got none in .* \(1 hidden or made by the system: \.a\)\."),
        (["bus/", "car/x.txt"], "", r"got none in .*2 folders without pictures, which are no classes: bus, car\)\."),
        (["train/", "val/bus/0.png"], "", r"got none in '.*', 'train' \("),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(root, names, given, message):
    write(root, *names, ".keep/")
    shutil.rmtree(root / ".keep")
    with pytest.raises(ValueError, match=message) as error:
        load_labelled_images(train_data_dir=str(root / given))
    assert "\n" not in str(error.value)


def test_an_empty_name_is_no_folder():
    with pytest.raises(ValueError, match=r"`train_data_dir` must be a folder with pictures, got '' \(an empty name\)"):
        load_labelled_images(train_data_dir="")


@pytest.fixture
def forbid():
    """Takes permissions of files and folders away, until the test is over."""
    paths = []

    def forbid(path: Path, mode: int = 0) -> None:
        paths.append(path)
        path.chmod(mode)
        if os.access(path, os.X_OK if path.is_dir() and mode == 0o400 else os.R_OK):
            pytest.skip("this user may do all")

    yield forbid
    for path in paths:
        path.chmod(0o700)


@pytest.mark.parametrize(("name", "mode"), [("", 0), ("", 0o400), ("car", 0), ("car", 0o400), ("car/deep", 0)])
def test_folders_without_permission(root, forbid, name, mode):
    write(root, *TWO, "car/deep/0.png")
    forbid(root / name, mode)
    with pytest.raises(ValueError, match=r"`train_data_dir` must be a folder that may be read .*Permission denied"):
        load_labelled_images(train_data_dir=str(root))


def test_a_folder_behind_one_without_permission(root, forbid):
    write(root, *TWO)
    forbid(root)
    with pytest.raises(ValueError, match=r"`train_data_dir` must be a folder with .*bus' \(Permission denied\)"):
        load_labelled_images(train_data_dir=str(root / "bus"))


def test_files_without_permission_are_named(root, forbid, caplog):
    write(root, *TWO)
    forbid(root / "car" / "0.png")
    assert classes(root) == {"bus": 2, "car": 1}
    assert "no permission (1): car/0.png." in warnings_of(caplog)


def test_a_folder_of_pictures_is_no_name_of_a_data_set(root):
    write(root, *TWO, "toy_train/0.png")
    with pytest.raises(
        ValueError, match="`dataset_name` must not be a folder of pictures: give '.*' as `train_data_dir`"
    ):
        load_labelled_images(str(root))


def test_a_folder_of_pictures_with_metadata_is_read_with_a_warning(root, caplog):
    write(root, "0.png", "metadata.csv")
    assert len(load_labelled_images(str(root)).train) == 1
    assert "`datasets` guesses splits and classes from names" in warnings_of(caplog, "images")


@pytest.mark.parametrize("given", ["empty", "file.txt", "broken"])
def test_data_sets_that_cannot_be_read(tmp_path, given):
    write(tmp_path, "empty/", "file.txt", "broken/")
    (tmp_path / "broken" / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`dataset_name` must be a data set on the Hub or a folder .*; got ") as error:
        load_labelled_images(str(tmp_path / given))
    assert "\n" not in str(error.value)


def label_table(folder: Path, labels: list, dtype="float64", names: list[str] | None = None) -> str:
    feature = datasets.ClassLabel(names=names) if names else datasets.Value(dtype)
    columns = datasets.Features({"image": datasets.Image(), "label": feature})
    picture = Image.new("RGB", (8, 8))
    table = datasets.Dataset.from_dict({"image": [picture] * len(labels), "label": labels}, features=columns)
    folder.mkdir()
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("dtype", "labels"),
    [
        ("float64", [1.0, float("nan"), 0.0, float("nan")]),
        ("float32", [float("inf"), 1.0, 2.0, None]),
        ("string", ["a", None, "b", ""]),
        ("string", ["a", "b", " ", None]),
        ("int64", [1, None, None, 2]),
        ("bool", [True, None, None, False]),
    ],
)
def test_missing_labels_are_no_class(tmp_path, dtype, labels):
    with pytest.raises(
        ValueError, match=r"`label_column` must label every picture, but 2 of 4 have no label \(row \d, row \d\)\."
    ):
        load_labelled_images(label_table(tmp_path / "data", labels, dtype))


@pytest.mark.parametrize(
    ("dtype", "labels", "names"),
    [
        ("float64", [10.0, 2.0, 0.0], ["0", "2", "10"]),
        ("float64", [1.5, -2.0, 0.25], ["-2", "0.25", "1.5"]),
        ("string", ["10", "2", "b", "1"], ["1", "2", "10", "b"]),
        ("string", ["nan", "None"], ["None", "nan"]),
    ],
)
def test_labels_of_a_column_are_ordered_as_those_of_folders(tmp_path, dtype, labels, names):
    images = load_labelled_images(label_table(tmp_path / "data", labels, dtype))
    assert list(images.id2label.values()) == names
    assert f"{len(names)} classes: " in images.summary


def test_declared_classes_without_pictures_keep_their_id_and_are_named(tmp_path, caplog):
    images = load_labelled_images(label_table(tmp_path / "data", [0, 2, 2], names=["x", "y", "z"]))
    assert images.id2label == {0: "x", 1: "y", 2: "z"}
    assert "1 of 3 classes have no picture to train on, but keep their id: y." in warnings_of(caplog, "images")
    assert images.summary.endswith("3 classes: x (1), y (0), z (2).")


def test_a_random_tree_loses_no_picture(root):
    """Every picture is in its class or left out by name, whatever the folders are called."""
    rng = random.Random(0)
    names = ["train", "val", "a b", "[0]", "x.png", "犬", "10", "2", ".hidden", "__MACOSX", "Test"]
    for number in range(6):
        folder = root / str(number)
        written = ["/".join(rng.sample(names, rng.randint(1, 3))) + f"/{index}.png" for index in range(12)]
        write(folder, *written)
        reader = FolderReader(folder, "folder")
        below = {path.relative_to(folder).as_posix() for path in reader.pictures_below(reader.root)}
        hidden = {name for name in written if {".hidden", "__MACOSX"} & set(name.split("/"))}
        assert below == set(written) - hidden
        try:
            loaded = read_picture_folder(folder)
        except ValueError:
            continue
        splits = [split for split in (loaded.train, loaded.validation) if split is not None]
        paths = [path.relative_to(folder).as_posix() for split in splits for path in split.paths]
        assert len(set(paths)) == len(paths)
        assert set(paths) <= below


def test_the_data_set_knows_its_files(root):
    def fingerprint(**options) -> str:
        return load_labelled_images(train_data_dir=str(root), **options).train._fingerprint

    write(root, *TWO)
    first = fingerprint()
    assert fingerprint() == first == fingerprint(cache_dir=str(root.parent / "elsewhere"))
    (root / "bus").rename(root / "tram")
    assert fingerprint() != first


def test_the_check_of_pictures_is_remembered_but_not_beyond_its_options(root):
    write(root, *TWO)
    Image.new("RGB", (20, 20)).save(root / "car" / "large.png")
    assert len(load_labelled_images(train_data_dir=str(root)).train) == 5
    assert len(load_labelled_images(train_data_dir=str(root), min_image_size=9, label_column=None).train) == 1
    assert len(load_labelled_images(train_data_dir=str(root)).train) == 5


def test_old_fields_of_a_data_set_are_enough():
    images = LabelledImages(None, None, "image", None, {})
    assert images.summary == ""
    assert DataSettings().train_data_dir is None


def test_left_out_is_shown_by_default():
    assert logging.getLogger(picture_folders.__name__).isEnabledFor(logging.WARNING)
