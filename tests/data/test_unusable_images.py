"""Data sets with pictures that cannot be used: those are left out, counted and named, and nothing else changes."""

import io
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from srdd.data.images import image_to_tensor, load_labelled_images, training_transform


RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(picture: Image.Image, file_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


def noise(width: int = 16, height: int = 16) -> Image.Image:
    """A picture that does not compress, so that half a file is half a picture."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Files by what the warning says about them.
BAD_FILES = {
    "corrupt.png": (b"this is no picture", "unreadable, UnidentifiedImageError"),
    "empty.png": (b"", "unreadable, UnidentifiedImageError"),
    "cut_off.png": (encoded(noise())[:400], "unreadable, OSError"),
    "cut_off.jpg": (encoded(noise(64, 64), "jpeg")[:1500], "unreadable, OSError"),
    "tiny.png": (encoded(Image.new("RGB", (1, 1), RED)), "1x1, smaller than 8"),
    "narrow.png": (encoded(Image.new("RGB", (7, 300), RED)), "7x300, smaller than 8"),
    "floats.tiff": (encoded(Image.new("F", (16, 16), 0.5), "tiff"), "mode F has no fixed range of values"),
}


def save_folder(root: Path, bad: dict[str, bytes] | None = None, images_per_class: int = 3) -> str:
    """Red and blue pictures in two classes, in sizes of their own, with bad files among the blue ones."""
    for name, colour in (("red", RED), ("blue", BLUE)):
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            Image.new("RGB", (16 + index, 16), colour).save(root / name / f"n{index}.png")
    for name, content in (bad or {}).items():
        (root / "blue" / name).write_bytes(content)
    return str(root)


def save_parquet(folder: Path, **splits: list[tuple[bytes | None, str]]) -> str:
    """Splits of `(file or None, label)`; the rows of a parquet file have no names."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for name, rows in splits.items():
        table = datasets.Dataset.from_dict(
            {
                "image": [content and {"bytes": content, "path": None} for content, _ in rows],
                "label": [label for _, label in rows],
            },
            features=features,
        )
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def colours_and_labels(images) -> list[tuple[str, str]]:
    """What the pictures show and what their labels say."""
    batch = training_transform(images, resolution=8)(images.train[:])
    shown = ["red" if pixels[0].mean() > pixels[2].mean() else "blue" for pixels in batch["pixel_values"]]
    return list(zip(shown, (images.id2label[label] for label in batch["labels"])))


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "srdd.data.images"]


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_left_out_and_named_with_the_reason(tmp_path, caplog, name):
    content, reason = BAD_FILES[name]
    folder = save_folder(tmp_path / "pictures", {name: content})
    images = load_labelled_images(train_data_dir=folder)
    assert colours_and_labels(images) == [("blue", "blue")] * 3 + [("red", "red")] * 3
    path = tmp_path / "pictures" / "blue" / name
    assert warnings_of(caplog) == [f"1 of 7 pictures cannot be used: {path} ({reason}). They are left out."]


def test_many_bad_files_give_one_warning_that_counts_all_and_names_five(tmp_path, caplog):
    folder = save_folder(tmp_path / "pictures", {name: content for name, (content, _) in BAD_FILES.items()})
    images = load_labelled_images(train_data_dir=folder)
    assert colours_and_labels(images) == [("blue", "blue")] * 3 + [("red", "red")] * 3
    [message] = warnings_of(caplog)
    assert message.startswith("7 of 13 pictures cannot be used: ")
    assert sum(name in message for name in BAD_FILES) == 5
    assert message.endswith(", …. They are left out.")


def test_good_pictures_give_no_warning(tmp_path, caplog):
    load_labelled_images(train_data_dir=save_folder(tmp_path / "pictures"))
    assert warnings_of(caplog) == []


def test_missing_and_bad_pictures_of_a_parquet_file_are_named_by_row(tmp_path, caplog):
    good = {"red": encoded(Image.new("RGB", (16, 16), RED)), "blue": encoded(Image.new("RGB", (16, 16), BLUE))}
    rows = [(good["red"], "red"), (None, "red"), (good["blue"], "blue"), (b"nothing", "blue"), (good["red"], "red")]
    images = load_labelled_images(save_parquet(tmp_path / "data", train=rows))
    assert colours_and_labels(images) == [("red", "red"), ("blue", "blue"), ("red", "red")]
    assert warnings_of(caplog) == [
        "2 of 5 pictures cannot be used: row 1 (missing), row 3 (unreadable, UnidentifiedImageError). They are left"
        " out."
    ]


def test_a_class_whose_pictures_are_all_bad_is_left_out_and_named(tmp_path, caplog):
    save_folder(tmp_path / "pictures")
    (tmp_path / "pictures" / "green").mkdir()
    (tmp_path / "pictures" / "green" / "0.png").write_bytes(b"")
    images = load_labelled_images(train_data_dir=str(tmp_path / "pictures"))
    assert images.id2label == {0: "blue", 1: "red"}
    assert colours_and_labels(images) == [("blue", "blue")] * 3 + [("red", "red")] * 3
    assert warnings_of(caplog)[1:] == ["Left out, classes without a picture that can be used (1): green."]


def test_the_validation_split_is_cleaned_too(tmp_path, caplog):
    good = encoded(Image.new("RGB", (16, 16), RED))
    folder = save_parquet(
        tmp_path / "data",
        train=[(good, "a"), (good, "b")],
        validation=[(b"nothing", "a"), (good, "b"), (None, "b")],
    )
    images = load_labelled_images(folder)
    assert (len(images.train), len(images.validation)) == (2, 1)
    assert images.validation["label"][:] == [1]
    [message] = warnings_of(caplog)
    assert message.startswith("2 of 3 pictures cannot be used: row 0 (unreadable")


def test_strict_data_names_the_files(tmp_path, caplog):
    folder = save_folder(tmp_path / "pictures", {name: BAD_FILES[name][0] for name in ("corrupt.png", "tiny.png")})
    with pytest.raises(
        ValueError, match=r"`image_column` must hold readable pictures, but 2 of 8 .*corrupt\.png.*tiny\.png \(1x1"
    ):
        load_labelled_images(train_data_dir=folder, strict=True)
    assert warnings_of(caplog) == []


def test_strict_data_without_bad_pictures_is_fine(tmp_path):
    assert len(load_labelled_images(train_data_dir=save_folder(tmp_path / "pictures"), strict=True).train) == 6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_a_single_good_picture_is_refused(tmp_path, split):
    good = [(encoded(Image.new("RGB", (16, 16), RED)), "a")]
    splits = {"train": good, "validation": good, split: [(b"nothing", "a"), (None, "a")]}
    folder = save_parquet(tmp_path / "data", **splits)
    with pytest.raises(ValueError, match=r"must hold at least one readable picture, but 2 of 2 pictures .*row 0 \(un"):
        load_labelled_images(folder)


def test_the_smallest_size_is_a_choice(tmp_path):
    folder = save_folder(tmp_path / "pictures")
    assert len(load_labelled_images(train_data_dir=folder, min_image_size=16).train) == 6
    Image.new("RGB", (20, 17), RED).save(tmp_path / "pictures" / "red" / "larger.png")
    images = load_labelled_images(train_data_dir=folder, min_image_size=17)
    assert len(images.train) == 1
    tiny = {"tiny.png": BAD_FILES["tiny.png"][0]}
    assert len(load_labelled_images(train_data_dir=save_folder(tmp_path / "2", tiny), min_image_size=1).train) == 7


def test_several_processes_find_the_same(tmp_path, caplog):
    bad = {name: content for name, (content, _) in BAD_FILES.items()}
    folder = save_folder(tmp_path / "pictures", bad)
    one = load_labelled_images(train_data_dir=folder, cache_dir=str(tmp_path / "one"))
    two = load_labelled_images(train_data_dir=folder, cache_dir=str(tmp_path / "two"), num_proc=2)
    assert one.train["label"][:] == two.train["label"][:]
    assert len(set(warnings_of(caplog))) == 1


def test_the_draw_of_a_part_is_among_usable_pictures(tmp_path):
    folder = save_folder(tmp_path / "pictures", {name: content for name, (content, _) in BAD_FILES.items()})
    images = load_labelled_images(train_data_dir=folder, max_train_samples=6, seed=0)
    assert len(images.train) == 6
    assert sorted(colours_and_labels(images)) == [("blue", "blue")] * 3 + [("red", "red")] * 3


def test_pictures_of_all_usable_kinds_pass(tmp_path, caplog):
    root = tmp_path / "pictures"
    root.mkdir()
    greys = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(greys).save(root / "sixteen_bit.png")
    Image.fromarray(greys).save(root / "sixteen_bit.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(8, 24).save(root / "turned.jpg", exif=exif)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        noise().convert(mode).save(root / f"mode_{mode}.png")
    noise().convert("CMYK").save(root / "cmyk.jpg")
    for mode in ("LAB", "I"):
        Image.new(mode, (16, 16)).save(root / f"mode_{mode}.tiff")
    Image.new("YCbCr", (16, 16)).save(root / "mode_YCbCr.tiff", compression="jpeg")
    noise().save(root / "still.gif")
    images = load_labelled_images(train_data_dir=str(root))
    assert warnings_of(caplog) == []
    assert len(images.train) == 14
    for image in images.train["image"]:
        pixels = image_to_tensor(image, 8)
        assert pixels.shape == (3, 8, 8)
        assert pixels.isfinite().all()
        assert pixels.abs().max() <= 1


def test_an_exif_rotation_is_applied_once(tmp_path):
    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn a quarter clockwise to see it upright.
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "pictures" / "turned.png", exif=exif)
    images = load_labelled_images(train_data_dir=str(tmp_path / "pictures"))
    [seen] = training_transform(images, resolution=16)(images.train[:])["pixel_values"]
    expected = torch.full((16, 16), -1.0)
    expected[:8, 8:] = 1
    assert torch.equal(seen, expected.expand(3, 16, 16))


def test_a_flat_folder_has_no_classes(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        noise().save(tmp_path / "pictures" / f"{index}.png")
    images = load_labelled_images(train_data_dir=str(tmp_path / "pictures"))
    assert images.label_column is None
    assert images.id2label == {}
    assert len(images.train) == 3
    with pytest.raises(ValueError, match=r"`label_column` must be one of \['image'\], or empty .* got 'label'"):
        load_labelled_images(train_data_dir=str(tmp_path / "pictures"), label_column="label")


def test_labels_are_found_by_themselves_only_in_the_column_label(tmp_path):
    rows = [(encoded(noise()), "x"), (encoded(noise()), "y")]
    folder = save_parquet(tmp_path / "data", train=rows)
    assert load_labelled_images(folder).id2label == {0: "x", 1: "y"}
    table = datasets.load_dataset(folder, split="train").rename_column("label", "kind")
    (tmp_path / "kinds").mkdir()
    table.to_parquet(tmp_path / "kinds" / "train-00000-of-00001.parquet")
    images = load_labelled_images(str(tmp_path / "kinds"))
    assert images.label_column is None
    assert images.id2label == {}


def test_the_check_remembers_its_outcome(tmp_path, caplog):
    folder = save_folder(tmp_path / "pictures", {"corrupt.png": BAD_FILES["corrupt.png"][0]})
    first = load_labelled_images(train_data_dir=folder)
    files = sorted(path for path in (tmp_path / "cache").rglob("cache-*.arrow"))
    times = [path.stat().st_mtime_ns for path in files]
    assert files
    second = load_labelled_images(train_data_dir=folder)
    assert sorted((tmp_path / "cache").rglob("cache-*.arrow")) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    assert first.train._fingerprint == second.train._fingerprint
    assert len(warnings_of(caplog)) == 2


def test_warnings_are_shown_by_default():
    assert logging.getLogger("srdd.data.images").isEnabledFor(logging.WARNING)
