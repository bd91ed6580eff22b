"""Labelled image data sets, and pixels of their pictures."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL
import torch
from diffusers.utils import logging
from PIL import Image, ImageEnhance, ImageOps

from srdd.data.captions import check_caption_column, read_captions
from srdd.data.class_labels import as_class_labels, class_order, describe_classes, is_missing, shortened
from srdd.data.picture_folders import PictureFolder, PictureSplit, read_picture_folder
from srdd.pictures import to_rgb


logger = logging.get_logger(__name__)


@dataclass
class LabelledImages:
    """
    A data set ready for training.

    Args:
        train (`datasets.Dataset`): The training split; items are made by `set_transform`.
        validation (`datasets.Dataset`, *optional*): The validation split, if the data set has one.
        image_column (`str`): Column of the images.
        label_column (`str`, *optional*): Column of the integer labels; `None` for data without labels.
        id2label (`dict[int, str]`): Names of the classes, empty for data without labels.
        summary (`str`, defaults to `""`): How many pictures and classes there are, for people; may have several lines.
        caption_column (`str`, *optional*): Column of the captions, texts that are not empty; `None` for data without.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    image_column: str
    label_column: str | None
    id2label: dict[int, str]
    summary: str = ""
    caption_column: str | None = None


def load_labelled_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "auto",
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    seed: int | None = None,
    min_image_size: int = 8,
    strict: bool = False,
    num_proc: int | None = None,
    run_folders: Sequence[str | Path] = (),
    caption_column: str | None = None,
) -> LabelledImages:
    """
    Load images and labels from the Hub, a data set folder (parquet) or a folder with one subfolder per class; or
    images and captions, which stand in `metadata.jsonl` where there is a folder.

    Folders of pictures are read by the rule of [`~srdd.data.picture_folders.read_picture_folder`]. Every picture is
    opened once (the outcome is remembered): those that are corrupt, cut off or too small are left out with a warning
    that counts and names them, and so are classes of a folder that have no others.

    Args:
        dataset_name (`str`, *optional*): Hub id or local folder understood by `datasets.load_dataset`.
        train_data_dir (`str`, *optional*): Image folder, `root/class_name/picture.png`.
        dataset_config_name (`str`, *optional*): Configuration of the Hub data set.
        image_column (`str`, defaults to `"image"`): Column with the images.
        label_column (`str`, *optional*, defaults to `"auto"`): Column with class labels; `None` trains without them,
            `"auto"` is `"label"` where the data has it.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.
        max_train_samples (`int`, *optional*): Keep this many training images, drawn with `seed`.
        seed (`int`, *optional*): Seed of that draw.
        min_image_size (`int`, defaults to 8): Pictures whose shorter side has fewer pixels are left out.
        strict (`bool`, defaults to `False`): Raise instead of leaving pictures or class folders out.
        num_proc (`int`, *optional*): Processes that open the pictures.
        run_folders (`Sequence[str | Path]`, defaults to `()`): Folders that the run writes: no classes, where they lie
            in `train_data_dir`.
        caption_column (`str`, *optional*): Column with captions, or the key of them in `metadata.jsonl`: loads them
            instead of labels.

    Returns:
        [`LabelledImages`]

    Raises:
        ValueError: If not exactly one source is given, it cannot be read or is empty, there is no `train` split, a
            column does not exist, a picture has no label or several, or no caption, no picture can be used or, with
            `strict`, one cannot.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Give either `dataset_name` or `train_data_dir`, got {dataset_name!r} and {train_data_dir!r}."
        )
    if caption_column == image_column:
        raise ValueError(f"`caption_column` must be another column than `image_column`, got {caption_column!r}.")
    notes: list[str] = []
    if dataset_name is not None:
        splits = _load_data_set(dataset_name, dataset_config_name, cache_dir)
    else:
        folder = read_picture_folder(train_data_dir, "train_data_dir", run_folders, caption_column is not None)
        if strict and folder.empty_classes:
            raise ValueError(
                f"`train_data_dir` must hold pictures in all class folders, got none in"
                f" {shortened(folder.empty_classes, 3)}."
            )
        root = Path(train_data_dir).absolute()
        splits, notes = _folder_splits(folder, label_column, root, caption_column), folder.notes
    if "train" not in splits:
        raise ValueError(f"The data set must have a `train` split, got {sorted(splits)}.")
    train, validation = splits["train"], splits.get("validation")
    if image_column not in train.column_names:
        raise ValueError(f"`image_column` must be one of {train.column_names}, got {image_column!r}.")
    if caption_column is not None:
        label_column = None
        check_caption_column({"train": train} | ({"validation": validation} if validation else {}), caption_column)
    if label_column == "auto":
        label_column = "label" if "label" in train.column_names else None
    if label_column is not None and label_column not in train.column_names:
        raise ValueError(
            f"`label_column` must be one of {train.column_names}, or empty for data without labels, got"
            f" {label_column!r}."
        )
    labels_found = [] if label_column is None else train[label_column][:]
    check = {"min_image_size": min_image_size, "strict": strict, "num_proc": num_proc, "cache_dir": cache_dir}
    train = _usable(train, image_column, **check)
    validation = validation and _usable(validation, image_column, **check)
    id2label: dict[int, str] = {}
    ids_found: list[int] = []
    if label_column is not None:
        train, validation, ids_found = _with_class_ids(train, validation, label_column, labels_found)
        id2label = dict(enumerate(train.features[label_column].names))
    if max_train_samples is not None and max_train_samples < len(train):
        train = train.shuffle(seed=seed).select(range(max_train_samples))
        ids_found = []  # not all are meant to be used
    ids_used = [] if label_column is None else train[label_column][:]
    used = set(ids_used)
    unused = [name for index, name in id2label.items() if index not in used]
    if unused:
        logger.warning(
            f"{len(unused)} of {len(id2label)} classes have no picture to train on, but keep their id:"
            f" {shortened(unused, 3)}."
        )
    counts = f"{len(train)} pictures to train on, {0 if validation is None else len(validation)} to validate with"
    if caption_column is None:
        classes = describe_classes(id2label, ids_used, ids_found or ids_used)
    else:
        classes = f"captions of {caption_column!r}"
    summary = "\n".join([f"{dataset_name or train_data_dir}: {counts}; {classes}.", *notes])
    return LabelledImages(train, validation, image_column, label_column, id2label, summary, caption_column)


def _with_class_ids(
    train: datasets.Dataset, validation: datasets.Dataset | None, label_column: str, labels_found: list
) -> tuple[datasets.Dataset, datasets.Dataset | None, list[int]]:
    """Both splits with class ids, and the ids of all labels that were found, those of unusable pictures as well."""
    feature, labels_used = train.features[label_column], train[label_column][:]
    train, validation = as_class_labels(train, validation, label_column)
    ids = dict(zip(labels_used, train[label_column][:]))
    lost = {label for label in labels_found if label not in ids and not is_missing(label)}
    if lost and not isinstance(feature, datasets.ClassLabel):
        names = sorted(map(str, lost), key=class_order)
        logger.warning(f"Left out, classes without a picture that can be used ({len(names)}): {shortened(names, 3)}.")
    return train, validation, [ids[label] for label in labels_found if label in ids]


def _load_data_set(name: str, config_name: str | None, cache_dir: str | None) -> datasets.DatasetDict:
    """What `datasets` finds under a name."""
    try:
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "`dataset_name` must be a data set on the Hub or a folder that `datasets` reads, with a"
            f" `dataset_config_name` that it has; got {name!r} and {config_name!r} ({reason})."
        ) from error
    if any(split.info.builder_name == "imagefolder" for split in splits.values()):
        # Its rules take names for splits and leave classes out.
        if os.path.isdir(name) and not any(
            each.name.startswith("metadata.") for each in Path(name).rglob("metadata.*")
        ):
            raise ValueError(f"`dataset_name` must not be a folder of pictures: give {name!r} as `train_data_dir`.")
        logger.warning(
            f"{name} is a folder of pictures, in which `datasets` guesses splits and classes from names: compare the"
            " number of pictures. A local copy may be given as `train_data_dir`."
        )
    return splits


def _folder_splits(
    folder: PictureFolder, label_column: str | None, root: Path, caption_column: str | None
) -> dict[str, datasets.Dataset]:
    """The splits of a folder of pictures as data sets."""
    splits = {"train": folder.train} | ({"validation": folder.validation} if folder.validation else {})
    if caption_column is not None:
        paths = [path for split in splits.values() for path in split.paths]
        captions = dict(zip(paths, read_captions(root, paths, caption_column)))
        return {
            name: _as_data_set(split, {caption_column: [captions[path] for path in split.paths]})
            for name, split in splits.items()
        }
    without = [name for name, split in splits.items() if split.labels is None]
    if without and len(without) < len(splits) and label_column is not None:
        raise ValueError(
            "`train_data_dir` must have class folders in both splits or in none, got none in that of"
            f" {without[0]} ({len(splits[without[0]].paths)} pictures, such as {str(splits[without[0]].paths[0])!r}):"
            " sort them into class folders, take them elsewhere, or train without labels (`label_column` empty)."
        )
    return {name: _as_data_set(split, {} if without else {"label": split.labels}) for name, split in splits.items()}


def _as_data_set(split: PictureSplit, texts: dict[str, list[str]]) -> datasets.Dataset:
    """
    Pictures of a folder, known to `datasets` by what they are and where they lie, and texts of them. Another caption
    makes no other pictures: what is kept of these stays.
    """
    columns = {"image": [str(path) for path in split.paths], **texts}
    features = {"image": datasets.Image(), **dict.fromkeys(texts, datasets.Value("string"))}
    files = [(path, status.st_size, status.st_mtime_ns) for path in columns["image"] for status in [os.stat(path)]]
    digest = hashlib.sha256(json.dumps([files, texts.get("label")]).encode())
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.Dataset(data.data, info=data.info, fingerprint=digest.hexdigest()[:16])


def _usable(
    split: datasets.Dataset,
    image_column: str,
    min_image_size: int,
    strict: bool,
    num_proc: int | None,
    cache_dir: str | None,
) -> datasets.Dataset:
    """The split without the pictures that cannot be used, the others decoded where they are read."""
    feature = split.features[image_column]
    if not isinstance(feature, datasets.Image) or not feature.decode:  # paths, bytes
        split = split.cast_column(image_column, datasets.Image())
    undecoded = split.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    cache_file = None
    if not split.cache_files:  # a folder of pictures: `datasets` keeps results for files of its own only
        key = json.dumps([split._fingerprint, min_image_size, PIL.__version__, datasets.__version__])
        name = f"cache-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
        cache_file = str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "picture_folders", name))
    problems = undecoded.map(
        _problem,
        fn_kwargs={"min_image_size": min_image_size},
        input_columns=image_column,
        remove_columns=image_column,
        num_proc=num_proc,
        cache_file_name=cache_file,
        desc="Checking images",
    )["problem"][:]
    bad = [index for index, problem in enumerate(problems) if problem]
    if not bad:
        return split
    names = [(undecoded[index][image_column] or {}).get("path") or f"row {index}" for index in bad[:5]]
    named = [f"{name} ({problems[index]})" for name, index in zip(names, bad)]
    message = f"{len(bad)} of {len(split)} pictures cannot be used: {', '.join(named)}{', …' * (len(bad) > 5)}."
    if strict:
        raise ValueError(f"`image_column` must hold readable pictures, but {message}")
    if len(bad) == len(split):
        raise ValueError(f"`image_column` must hold at least one readable picture, but {message}")
    logger.warning(f"{message} They are left out.")
    return split.select([index for index, problem in enumerate(problems) if not problem])


def _problem(picture: dict | None, min_image_size: int) -> dict[str, str]:
    """Why a picture cannot be used, empty if it can."""
    if picture is None:
        return {"problem": "missing"}
    try:
        image = datasets.Image().decode_example(picture)
        if image.mode[0] in "FI":  # more than 8 bits: values may have no known range
            to_rgb(image)
    except ValueError as error:
        return {"problem": str(error)}
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        return {"problem": f"unreadable, {type(error).__name__}"}
    if min(image.size) < min_image_size:
        return {"problem": f"{image.width}x{image.height}, smaller than {min_image_size}"}
    return {"problem": ""}


def image_to_tensor(
    image: Image.Image,
    resolution: int,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: random.Random | None = None,
    min_crop: float = 1.0,
    random_colors: bool = False,
) -> torch.Tensor:
    """
    Scale the shorter side of a picture to `resolution`, crop a square and return pixels in [-1, 1].

    Args:
        image (`PIL.Image.Image`): The picture, read as [`~srdd.pictures.to_rgb`] does.
        resolution (`int`): Side of the square.
        random_crop (`bool`, defaults to `False`): Crop at random instead of in the centre.
        random_flip (`bool`, defaults to `False`): Mirror half of the pictures.
        rng (`random.Random`, *optional*): Draws crop, mirroring and colours; Python's shared generator by default.
        min_crop (`float`, defaults to 1.0): Below 1, the square is cut before scaling, with a side of at least this
            share of the picture's shorter one, but never of less than `resolution` pixels.
        random_colors (`bool`, defaults to `False`): Give most pictures other colours ([`with_random_colors`]).

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)`, float32.
    """
    rng = rng or random
    if min_crop < 1:
        image = random_part(to_rgb(image), resolution, min_crop, rng)
    image, _ = cut_square(image, resolution, random_crop, rng)
    if random_flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if random_colors:
        image = with_random_colors(image, rng)
    return square_to_tensor(image)


def random_part(image: Image.Image, resolution: int, min_crop: float, rng: random.Random) -> Image.Image:
    """A square of a picture, of at least `resolution` pixels a side if the picture has them."""
    shorter = min(image.size)
    side = max(min(resolution, shorter), round(shorter * rng.uniform(min_crop, 1)))
    left, top = (rng.randint(0, length - side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def cut_square(
    image: Image.Image, resolution: int, random_crop: bool, rng: random.Random
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """
    Scale the shorter side of a picture to `resolution` and crop a square.

    Args:
        image (`PIL.Image.Image`): The picture, read as [`~srdd.pictures.to_rgb`] does.
        resolution (`int`): Side of the square.
        random_crop (`bool`): Crop at random instead of in the centre.
        rng (`random.Random`): Draws the crop.

    Returns:
        `tuple[PIL.Image.Image, tuple[int, int, int, int]]`: The square; height and width of the scaled picture, and
        the square's distance from its top and left.
    """
    image = to_rgb(image)
    if min(image.size) != resolution:
        ratio = resolution / min(image.size)
        size = (max(resolution, round(image.width * ratio)), max(resolution, round(image.height * ratio)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    free_x, free_y = image.width - resolution, image.height - resolution
    left, top = (rng.randint(0, free_x), rng.randint(0, free_y)) if random_crop else (free_x // 2, free_y // 2)
    return image.crop((left, top, left + resolution, top + resolution)), (image.height, image.width, top, left)


def square_to_tensor(image: Image.Image) -> torch.Tensor:
    """Pixels of a picture with 8 bits of red, green and blue, float32 `(3, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def with_random_colors(image: Image.Image, rng: random.Random) -> Image.Image:
    """
    A picture in other colours: three of four are turned in hue, changed in saturation, brightness and contrast, and
    half of these have their colour channels in another order.
    """
    if rng.random() < 0.25:
        return image
    turn = rng.randrange(256)
    hue, saturation, value = image.convert("HSV").split()
    image = Image.merge("HSV", (hue.point(lambda hue: (hue + turn) % 256), saturation, value)).convert("RGB")
    for enhancer, low, high in (
        (ImageEnhance.Color, 0.3, 2.5),
        (ImageEnhance.Brightness, 0.7, 1.4),
        (ImageEnhance.Contrast, 0.6, 1.4),
    ):
        image = enhancer(image).enhance(rng.uniform(low, high))
    if rng.random() < 0.5:
        channels = list(image.split())
        rng.shuffle(channels)
        image = Image.merge("RGB", channels)
    return image


def training_transform(images: LabelledImages, resolution: int) -> Callable[[dict], dict]:
    """Transform for `datasets.Dataset.set_transform`: `"pixel_values"`, cropped in the centre, and `"labels"`."""

    def transform(batch: dict) -> dict:
        pixels = [image_to_tensor(image, resolution) for image in batch[images.image_column]]
        labels = batch[images.label_column] if images.label_column is not None else [0] * len(pixels)
        return {"pixel_values": pixels, "labels": labels}

    return transform


def validation_images(images: LabelledImages, count: int) -> datasets.Dataset:
    """At most `count` images, always the same: of the validation split, or of the training split without one."""
    split = images.validation if images.validation is not None else images.train
    return split.shuffle(seed=0).select(range(min(count, len(split))))


class AugmentedImages(torch.utils.data.Dataset):
    """
    Training images, cropped, mirrored and coloured at random, but always alike for one seed, epoch and image: a run
    that is resumed sees what an uninterrupted one does.

    Args:
        images ([`LabelledImages`]): Its training split is used.
        resolution (`int`): Side of the images.
        random_crop (`bool`): Crop at random instead of in the centre.
        random_flip (`bool`): Mirror half of the images.
        seed (`int`): Seed of the augmentation.
        min_crop (`float`, defaults to 1.0): As in [`image_to_tensor`].
        random_colors (`bool`, defaults to `False`): As in [`image_to_tensor`].
    """

    def __init__(
        self,
        images: LabelledImages,
        resolution: int,
        random_crop: bool,
        random_flip: bool,
        seed: int,
        min_crop: float = 1.0,
        random_colors: bool = False,
    ):
        self.images = images
        self.options = {
            "resolution": resolution,
            "random_crop": random_crop,
            "random_flip": random_flip,
            "min_crop": min_crop,
            "random_colors": random_colors,
        }
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and mirrorings from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images.train)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        image = self.images.train[index][self.images.image_column]
        return {"pixel_values": image_to_tensor(image, **self.options, rng=rng)}


def picture_grid(rows: list[torch.Tensor]) -> np.ndarray:
    """
    Lay equally long rows of pictures under each other.

    Args:
        rows (`list[torch.Tensor]`): Each of shape `(num_images, 3, height, width)`, pixels in [-1, 1].

    Returns:
        `np.ndarray` of shape `(len(rows) * height, num_images * width, 3)`, uint8.
    """
    strips = [torch.cat(list(row.float().clamp(-1, 1)), dim=-1) for row in rows]
    picture = torch.cat(strips, dim=-2).add(1).mul(127.5).round().to(torch.uint8)
    return picture.permute(1, 2, 0).cpu().numpy()
