import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from srdd.data.images import (
    AugmentedImages,
    LabelledImages,
    image_to_tensor,
    load_labelled_images,
    picture_grid,
    training_transform,
    validation_images,
)


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

QUADRANTS = [[RED, GREEN], [BLUE, WHITE]]


def blocks(colours, side: int = 8, mode: str = "RGB") -> Image.Image:
    """A picture of squares in these colours."""
    pixels = np.array(colours, dtype=np.uint8).repeat(side, axis=0).repeat(side, axis=1)
    return Image.fromarray(pixels, mode=mode) if mode != "RGB" else Image.fromarray(pixels)


def colour_at(pixels: torch.Tensor, row: int, column: int) -> tuple[int, ...]:
    return tuple(((pixels[:, row, column] + 1) * 127.5).round().int().tolist())


def corners(pixels: torch.Tensor) -> list[list[tuple[int, ...]]]:
    return [[colour_at(pixels, row, column) for column in (1, -2)] for row in (1, -2)]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image_table(labels, dtype="int64", **columns) -> datasets.Dataset:
    picture = blocks(QUADRANTS, side=4)
    features = {"image": datasets.Image(), "label": datasets.Value(dtype) if isinstance(dtype, str) else dtype}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(
        {"image": [picture] * len(labels), "label": labels, **columns}, features=datasets.Features(features)
    )


def save_parquet(tmp_path, **splits: datasets.Dataset) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_pixels_are_scaled_to_minus_one_and_one():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = image_to_tensor(Image.fromarray(np.stack([ramp] * 3, axis=-1)), 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[1].numpy(), ramp / 127.5 - 1, atol=1e-6)
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_rows_and_columns_stay_in_place():
    assert corners(image_to_tensor(blocks(QUADRANTS), 16)) == QUADRANTS


@pytest.mark.parametrize("resolution", [4, 10, 16, 24])
@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 40), (7, 100), (17, 33)])
def test_any_shape_becomes_a_square(size, resolution):
    assert image_to_tensor(Image.new("RGB", size, RED), resolution).shape == (3, resolution, resolution)


def test_the_centre_of_the_longer_side_is_kept():
    wide = image_to_tensor(blocks([[RED, GREEN, BLUE]]), 8)
    tall = image_to_tensor(blocks([[RED], [GREEN], [BLUE]]), 8)
    assert corners(wide) == corners(tall) == [[GREEN, GREEN], [GREEN, GREEN]]


def test_the_shorter_side_is_scaled():
    pixels = image_to_tensor(blocks([[WHITE, RED, RED, WHITE], [WHITE, RED, RED, WHITE]], side=16), 8)
    assert corners(pixels) == [[RED, RED], [RED, RED]]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_pictures_get_three_equal_channels(mode):
    picture = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)).convert(mode)
    assert corners(image_to_tensor(picture, 16)) == [[(0, 0, 0), WHITE], [WHITE, (0, 0, 0)]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_greys_keep_their_range(tmp_path, suffix):
    greys = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(greys).save(tmp_path / f"grey.{suffix}")
    with Image.open(tmp_path / f"grey.{suffix}") as picture:
        assert picture.mode.startswith("I")
        pixels = image_to_tensor(picture, 16)
    for channel in pixels:
        np.testing.assert_allclose(channel.numpy(), greys / 32767.5 - 1, atol=1 / 127)


def test_thirty_two_bit_greys_are_read_as_sixteen_bit():
    picture = Image.fromarray(np.array([[0, 65535], [32768, 65535]], dtype=np.int32))
    assert picture.mode == "I"
    assert image_to_tensor(picture, 2)[0].tolist() == [[-1, 1], [pytest.approx(0, abs=0.005), 1]]
    with pytest.raises(ValueError, match=r"mode I must have values in \[0, 65535\], got \[0, 70000\]"):
        image_to_tensor(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), 1)


def test_transparency_is_laid_on_white():
    colours = [[(*RED, 255), (*RED, 0)], [(0, 0, 0, 128), (*BLUE, 255)]]
    pixels = image_to_tensor(blocks(colours, mode="RGBA"), 16)
    assert corners(pixels) == [[RED, WHITE], [(127, 127, 127), BLUE]]


def test_grey_with_transparency():
    pixels = image_to_tensor(blocks([[(0, 255), (0, 0)], [(200, 255), (200, 0)]], mode="LA"), 16)
    assert corners(pixels) == [[(0, 0, 0), WHITE], [(200, 200, 200), WHITE]]


def test_palette_with_a_transparent_colour(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8).repeat(8, 0).repeat(8, 1), mode="P")
    picture.putpalette([*RED, *GREEN, *BLUE])
    assert corners(image_to_tensor(picture, 16)) == [[RED, GREEN], [BLUE, GREEN]]
    picture.save(tmp_path / "palette.png", transparency=1)
    with Image.open(tmp_path / "palette.png") as saved:
        assert saved.mode == "P"
        assert corners(image_to_tensor(saved, 16)) == [[RED, WHITE], [BLUE, WHITE]]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn a quarter clockwise to see it upright.
    blocks(QUADRANTS).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        pixels = image_to_tensor(picture, 16)
    assert corners(pixels) == [[BLUE, RED], [WHITE, GREEN]]


def test_other_colour_spaces_become_rgb():
    assert corners(image_to_tensor(blocks(QUADRANTS).convert("CMYK"), 16)) == QUADRANTS


def test_random_crops_lie_anywhere_in_the_picture():
    random.seed(0)
    picture = blocks([[(20 * column, 0, 0) for column in range(13)]], side=1).resize((13, 1), Image.Resampling.NEAREST)
    lefts = [colour_at(image_to_tensor(picture, 1, random_crop=True), 0, 0)[0] // 20 for _ in range(400)]
    assert set(lefts) == set(range(13))
    assert {colour_at(image_to_tensor(picture, 1), 0, 0)[0] // 20 for _ in range(5)} == {6}


def test_random_flips_mirror_half_of_the_pictures():
    random.seed(0)
    drawn = [corners(image_to_tensor(blocks(QUADRANTS), 16, random_flip=True)) for _ in range(400)]
    flipped = drawn.count([row[::-1] for row in QUADRANTS])
    assert drawn.count(QUADRANTS) + flipped == 400
    assert abs(flipped - 200) < 4 * 10


def test_a_folder_with_one_subfolder_per_class(tmp_path):
    for name, colours in {"pear": [[GREEN]], "apple": [[RED]], "blue berry": [[BLUE]]}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(2):
            blocks(colours).save(tmp_path / "pictures" / name / f"{index}.png")
    images = load_labelled_images(train_data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"))
    assert images.id2label == {0: "apple", 1: "blue berry", 2: "pear"}
    assert images.validation is None
    images.train.set_transform(training_transform(images, resolution=4))
    expected = {0: RED, 1: BLUE, 2: GREEN}
    items = [images.train[index] for index in range(6)]
    assert sorted(item["labels"] for item in items) == [0, 0, 1, 1, 2, 2]
    for item in items:
        assert colour_at(item["pixel_values"], 0, 0) == expected[item["labels"]]


def test_splits_of_a_folder(tmp_path):
    for split in ("train", "validation"):
        for name in ("b", "a"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            blocks([[RED]]).save(tmp_path / "pictures" / split / name / "0.png")
    images = load_labelled_images(train_data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"))
    assert (len(images.train), len(images.validation)) == (2, 2)
    assert images.id2label == {0: "a", 1: "b"}


def test_class_labels_of_a_data_set_are_kept(tmp_path):
    feature = datasets.ClassLabel(names=["z", "y", "x"])
    folder = save_parquet(tmp_path, train=image_table([2, 0, 1], feature), validation=image_table([1, 2], feature))
    images = load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))
    assert images.id2label == {0: "z", 1: "y", 2: "x"}
    assert (images.train["label"][:], images.validation["label"][:]) == ([2, 0, 1], [1, 2])


@pytest.mark.parametrize(
    ("dtype", "train", "validation", "names", "train_ids", "validation_ids"),
    [
        ("string", ["b", "c", "a"], ["c", "a"], ["a", "b", "c"], [1, 2, 0], [2, 0]),
        ("int64", [0, 1, 2], [2, 0], ["0", "1", "2"], [0, 1, 2], [2, 0]),
        ("int32", [3, 1, 2], [2, 3], ["1", "2", "3"], [2, 0, 1], [1, 2]),
        ("int64", [10, 2, 0], [2, 10], ["0", "2", "10"], [2, 1, 0], [1, 2]),
        ("int64", list(range(12)), [11, 2], [str(i) for i in range(12)], list(range(12)), [11, 2]),
        ("float32", [10.0, 2.5, 1.0], [2.5], ["1", "2.5", "10"], [2, 1, 0], [1]),
        ("bool", [True, False], [True], ["false", "true"], [1, 0], [1]),
    ],
)
def test_plain_columns_become_class_labels_alike_in_both_splits(
    tmp_path, dtype, train, validation, names, train_ids, validation_ids
):
    folder = save_parquet(tmp_path, train=image_table(train, dtype), validation=image_table(validation, dtype))
    images = load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))
    assert images.id2label == dict(enumerate(names))
    assert images.train["label"][:] == train_ids
    assert images.validation["label"][:] == validation_ids


def test_labels_of_the_validation_split_alone_are_refused(tmp_path):
    folder = save_parquet(tmp_path, train=image_table([1, 2, 3]), validation=image_table([0, 3]))
    with pytest.raises(ValueError, match=r"`label_column` must hold .* as in `train`, \['1', '2', '3'\], got \['0'\]"):
        load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        ("string", ["b", None, "a"]),
        ("int64", [1, None, 0]),
        (datasets.ClassLabel(names=["x", "y"]), [1, None, 0]),
        (datasets.ClassLabel(names=["x", "y"]), [1, -1, 0]),  # how test sets without labels are published
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_pictures_without_a_label_are_refused(tmp_path, feature, labels, split):
    whole = [label for label in labels if label not in (None, -1)] + labels[2:]
    splits = {"train": whole, "validation": whole, split: labels}
    folder = save_parquet(tmp_path, **{name: image_table(column, feature) for name, column in splits.items()})
    with pytest.raises(ValueError, match="`label_column` must label every picture, but 1 of 6 have no label"):
        load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))
    assert load_labelled_images(folder, label_column=None, cache_dir=str(tmp_path / "cache")).id2label == {}


def test_several_labels_for_a_picture_are_refused(tmp_path):
    folder = save_parquet(tmp_path, train=image_table([[0, 1], [1]], datasets.Sequence(datasets.Value("int64"))))
    with pytest.raises(ValueError, match=r"`label_column` must hold one number or name for each picture, got "):
        load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))


def test_pictures_may_be_given_by_their_paths(tmp_path):
    blocks(QUADRANTS).save(tmp_path / "picture.png")
    for feature in (datasets.Value("string"), datasets.Image(decode=False)):
        features = datasets.Features({"image": feature, "label": datasets.Value("int64")})
        path = str(tmp_path / "picture.png")
        row = path if feature == datasets.Value("string") else {"path": path, "bytes": None}
        table = datasets.Dataset.from_dict({"image": [row], "label": [0]}, features=features)
        (tmp_path / feature.dtype).mkdir()
        images = load_labelled_images(
            save_parquet(tmp_path / feature.dtype, train=table), cache_dir=str(tmp_path / "cache")
        )
        [pixels] = training_transform(images, resolution=16)(images.train[:])["pixel_values"]
        assert corners(pixels) == QUADRANTS


def test_data_without_labels(tmp_path):
    folder = save_parquet(tmp_path, train=image_table([5, 6]))
    images = load_labelled_images(folder, label_column=None, cache_dir=str(tmp_path / "cache"))
    assert images.id2label == {}
    batch = training_transform(images, resolution=4)(images.train[:])
    assert [pixels.shape for pixels in batch["pixel_values"]] == [(3, 4, 4)] * 2
    assert batch["labels"] == [0, 0]


def test_columns_may_have_other_names(tmp_path):
    folder = save_parquet(tmp_path, train=image_table([5, 6], kind=["x", "y"]).rename_column("image", "picture"))
    images = load_labelled_images(
        folder, image_column="picture", label_column="kind", cache_dir=str(tmp_path / "cache")
    )
    assert images.id2label == {0: "x", 1: "y"}
    assert training_transform(images, resolution=4)(images.train[:])["labels"] == [0, 1]


def test_a_seed_draws_the_same_part_of_the_data(tmp_path):
    folder = save_parquet(tmp_path, train=image_table(list(range(20))))

    def part(seed):
        images = load_labelled_images(folder, cache_dir=str(tmp_path / "cache"), max_train_samples=6, seed=seed)
        assert len(images.id2label) == 20
        return images.train["label"][:]

    assert len(set(part(0))) == 6
    assert part(0) == part(0)
    assert part(0) != part(1)
    images = load_labelled_images(folder, cache_dir=str(tmp_path / "cache"), max_train_samples=50)
    assert images.train["label"][:] == list(range(20))


@pytest.mark.parametrize("sources", [{}, {"dataset_name": "a", "train_data_dir": "b"}])
def test_exactly_one_source(sources):
    with pytest.raises(ValueError, match="Give either `dataset_name` or `train_data_dir`, got"):
        load_labelled_images(**sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_column": "photo"}, r"`image_column` must be one of \['image', 'label'\], got 'photo'"),
        ({"label_column": "class"}, r"`label_column` must be one of \['image', 'label'\], .*got 'class'"),
    ],
)
def test_columns_that_do_not_exist_are_refused(tmp_path, arguments, message):
    folder = save_parquet(tmp_path, train=image_table([0, 1]))
    with pytest.raises(ValueError, match=message):
        load_labelled_images(folder, cache_dir=str(tmp_path / "cache"), **arguments)


def test_a_data_set_without_train_split_is_refused(tmp_path):
    folder = save_parquet(tmp_path, test=image_table([0, 1]))
    with pytest.raises(ValueError, match=r"must have a `train` split, got \['test'\]"):
        load_labelled_images(folder, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def pictures() -> LabelledImages:
    """Noise of different sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 24, size=(24, 2))
    noise = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    features = datasets.Features({"image": datasets.Image()})
    return LabelledImages(datasets.Dataset.from_dict({"image": noise}, features=features), None, "image", None, {})


def augment(pictures: LabelledImages, random_crop: bool, random_flip: bool, seed: int = 0, epoch: int = 0, **options):
    augmented = AugmentedImages(pictures, 16, random_crop, random_flip, seed, **options)
    augmented.set_epoch(epoch)
    assert len(augmented) == 24
    return torch.stack([augmented[index]["pixel_values"] for index in range(24)])


def test_augmentation_depends_on_seed_epoch_and_image_alone(pictures):
    first = augment(pictures, True, True)
    assert torch.equal(first, augment(pictures, True, True))
    for other in (augment(pictures, True, True, epoch=1), augment(pictures, True, True, seed=1)):
        assert (first != other).flatten(1).any(dim=1).float().mean() > 0.5


def test_crops_of_a_smaller_part_show_it_larger():
    # A gradient: the range of its values is the share of the picture that a crop shows.
    gradient = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3)))
    rng = random.Random(0)
    crops = [image_to_tensor(gradient, 8, random_crop=True, rng=rng, min_crop=0.5) for _ in range(40)]
    shares = torch.tensor([(crop.amax() - crop.amin()) * 127.5 / 175 for crop in crops])  # of 8 pixels, 7 steps
    assert 0.45 < shares.min() < 0.6
    assert 0.9 < shares.max() < 1.05
    enlarged = image_to_tensor(gradient.resize((10, 10)), 8, random_crop=True, rng=rng, min_crop=0.1)
    assert enlarged.shape == (3, 8, 8)
    whole = image_to_tensor(gradient.resize((8, 8)), 8, rng=rng, min_crop=0.1)  # none has fewer pixels than asked for
    assert torch.equal(whole, image_to_tensor(gradient.resize((8, 8)), 8))


def test_other_colours_keep_shapes(pictures):
    coloured, plain = augment(pictures, False, False, random_colors=True), augment(pictures, False, False)
    changed = (coloured != plain).flatten(1).any(dim=1)
    assert 10 <= changed.sum() < 24
    assert torch.equal(coloured, augment(pictures, False, False, random_colors=True))
    assert coloured.abs().max() <= 1
    square = Image.new("RGB", (16, 16), (200, 40, 40))
    square.paste((20, 20, 20), (4, 4, 12, 12))
    pixels = [image_to_tensor(square, 16, rng=random.Random(seed), random_colors=True) for seed in range(60)]
    assert len({tuple(each[:, 0, 0].tolist()) for each in pixels}) > 30
    for each in pixels:
        assert (each[:, :4] == each[:, :1, :1]).all()
        assert (each[:, 4:12, 4:12] == each[:, 4:5, 4:5]).all()
        assert (each[:, 0, 0] > each[:, 8, 8]).any()


def test_images_are_cropped_in_the_centre_if_asked_to(pictures):
    centred = torch.stack([image_to_tensor(image, 16) for image in pictures.train["image"]])
    assert torch.equal(augment(pictures, False, False), centred)
    mirrored = 0
    for pixels, original in zip(augment(pictures, False, True), centred):
        mirrored += torch.equal(pixels, original.flip(-1))
        assert torch.equal(pixels, original) or torch.equal(pixels, original.flip(-1))
    assert 4 <= mirrored <= 20


def some_images(num_train: int, num_validation: int | None) -> LabelledImages:
    def split(start, length):
        return datasets.Dataset.from_dict({"image": list(range(start, start + length))})

    validation = None if num_validation is None else split(100, num_validation)
    return LabelledImages(split(0, num_train), validation, "image", None, {})


def test_validation_images_are_always_the_same_and_held_out_if_possible():
    held_out = validation_images(some_images(20, 10), 4)["image"][:]
    assert len(held_out) == 4
    assert min(held_out) >= 100
    assert held_out == validation_images(some_images(30, 10), 4)["image"][:]
    assert max(validation_images(some_images(20, None), 4)["image"][:]) < 20
    assert len(validation_images(some_images(20, 3), 4)) == 3


def test_a_picture_grid_has_rows_under_each_other():
    rows = [torch.full((3, 3, 2, 4), value) for value in (-1.0, 0.0)]
    rows[0][1, 0] = 1.0  # the red of the second picture in the first row
    rows[1][2] = 7.0  # clipped
    picture = picture_grid(rows)
    assert picture.shape == (4, 12, 3)
    assert picture.dtype == np.uint8
    expected = np.zeros((4, 12, 3), dtype=np.uint8)
    expected[:2, 4:8, 0] = 255
    expected[2:] = 128
    expected[2:, 8:] = 255
    np.testing.assert_array_equal(picture, expected)


def test_a_picture_grid_shows_pixels_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    row = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    np.testing.assert_array_equal(picture_grid([row]), np.concatenate(pixels, axis=1))
