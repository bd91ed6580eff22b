"""Labelled image data sets for the training scripts."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps


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
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    image_column: str
    label_column: str | None
    id2label: dict[int, str]


def load_labelled_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    seed: int | None = None,
) -> LabelledImages:
    """
    Load images and labels from the Hub, a data set folder (parquet) or a folder with one subfolder per class.

    Args:
        dataset_name (`str`, *optional*): Hub id or local folder understood by `datasets.load_dataset`.
        train_data_dir (`str`, *optional*): Image folder, `root/class_name/picture.png`.
        dataset_config_name (`str`, *optional*): Configuration of the Hub data set.
        image_column (`str`, defaults to `"image"`): Column with the images.
        label_column (`str`, *optional*, defaults to `"label"`): Column with class labels; `None` trains without them.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.
        max_train_samples (`int`, *optional*): Keep this many training images, drawn with `seed`.
        seed (`int`, *optional*): Seed of that draw.

    Returns:
        [`LabelledImages`]

    Raises:
        ValueError: If not exactly one source is given, there is no `train` split, or a column does not exist.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Give either `dataset_name` or `train_data_dir`, got {dataset_name!r} and {train_data_dir!r}."
        )
    if dataset_name is not None:
        splits = datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    else:
        splits = datasets.load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
    if "train" not in splits:
        raise ValueError(f"The data set must have a `train` split, got {sorted(splits)}.")
    train, validation = splits["train"], splits.get("validation")
    if image_column not in train.column_names:
        raise ValueError(f"`image_column` must be one of {train.column_names}, got {image_column!r}.")
    if label_column is not None and label_column not in train.column_names:
        raise ValueError(
            f"`label_column` must be one of {train.column_names}, or empty for data without labels, got"
            f" {label_column!r}."
        )
    id2label: dict[int, str] = {}
    if label_column is not None:
        if not isinstance(train.features[label_column], datasets.ClassLabel):
            train = train.class_encode_column(label_column)
            if validation is not None:
                validation = validation.cast_column(label_column, train.features[label_column])
        id2label = dict(enumerate(train.features[label_column].names))
    if max_train_samples is not None and max_train_samples < len(train):
        train = train.shuffle(seed=seed).select(range(max_train_samples))
    return LabelledImages(train, validation, image_column, label_column, id2label)


def image_to_tensor(image: Image.Image, resolution: int, random_crop: bool = False, random_flip: bool = False):
    """
    Scale the shorter side of a picture to `resolution`, crop a square and return pixels in [-1, 1].

    Args:
        image (`PIL.Image.Image`): Any mode; an EXIF rotation is applied, transparency is laid on white.
        resolution (`int`): Side of the square.
        random_crop (`bool`, defaults to `False`): Crop at random instead of in the centre.
        random_flip (`bool`, defaults to `False`): Mirror half of the pictures.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)`, float32.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if min(image.size) != resolution:
        ratio = resolution / min(image.size)
        size = (max(resolution, round(image.width * ratio)), max(resolution, round(image.height * ratio)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    free_x, free_y = image.width - resolution, image.height - resolution
    left, top = (random.randint(0, free_x), random.randint(0, free_y)) if random_crop else (free_x // 2, free_y // 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    if random_flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def training_transform(
    images: LabelledImages, resolution: int, random_crop: bool = False, random_flip: bool = False
) -> Callable[[dict], dict]:
    """Transform for `datasets.Dataset.set_transform`: batches with `"pixel_values"` and, if there are, `"labels"`."""

    def transform(batch: dict) -> dict:
        pixels = [image_to_tensor(image, resolution, random_crop, random_flip) for image in batch[images.image_column]]
        labels = batch[images.label_column] if images.label_column is not None else [0] * len(pixels)
        return {"pixel_values": pixels, "labels": labels}

    return transform
