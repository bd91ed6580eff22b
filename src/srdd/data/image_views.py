"""The views of a data set's images that models are run on once, before training: made, encoded and named."""

import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import ModelMixin
from tqdm.auto import tqdm

from srdd.data.images import LabelledImages, cut_square, square_to_tensor
from srdd.models.saved_weights import weights_hash


# Part of every name: files of formats that cannot be relied on, as those that two runs could write at once, are left.
CACHE_FORMAT = 2

# Of the views that are encoded together: 64 of 64 pixels, 4 of 256, where as many took 20 GB with VAR's tokenizer.
PIXELS_PER_FORWARD = 64 * 64**2


class ImageViews(torch.utils.data.Dataset):
    """
    The views of every image that are tokenised: the centre or random crops, then the same mirrored. View by view. An
    item has the pixels, and height and width of the scaled picture and the view's distance from its top and left.

    Args:
        split (`datasets.Dataset`): The images.
        image_column (`str`): Their column.
        resolution (`int`): Side of the views.
        random_crops (`int`): Random crops per image; 0 is one crop in the centre.
        random_flip (`bool`): Mirrored views, too.
        seed (`int`): Seed of the crops.
    """

    def __init__(
        self, split: Dataset, image_column: str, resolution: int, random_crops: int, random_flip: bool, seed: int
    ):
        self.split = split.select_columns(image_column)
        self.image_column = image_column
        self.resolution = resolution
        self.random_crops = random_crops
        self.num_crops = max(1, random_crops)
        self.num_views = self.num_crops * (2 if random_flip else 1)
        self.seed = seed

    def __len__(self) -> int:
        return self.num_views * len(self.split)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        view, index = divmod(row, len(self.split))
        flip, crop = divmod(view, self.num_crops)
        rng = random.Random(f"{self.seed} {crop} {index}")
        image = self.split[index][self.image_column]
        square, (height, width, top, left) = cut_square(image, self.resolution, self.random_crops > 0, rng)
        pixels = square_to_tensor(square)
        if flip:
            pixels, left = pixels.flip(-1), width - self.resolution - left
        return pixels, torch.tensor([height, width, top, left])

    def describe(self, row: int) -> str:
        """The image that a row is a view of, by its place and, if it has one, its name."""
        index = row % len(self.split)
        undecoded = self.split.select([index]).cast_column(self.image_column, datasets.Image(decode=False))
        name = (undecoded[0][self.image_column] or {}).get("path")
        return f"image {index}" + (f" ({name})" if name else "")


def leave_signals_to_main_process(worker_id: int) -> None:
    """
    A `worker_init_fn`: Ctrl-C and SIGTERM often reach all processes of a run, and the main one decides what follows.
    Workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def cache_key(model: ModelMixin, views: ImageViews, result: Any, *more: str) -> str:
    """A name that changes when the model, what it makes, the data, the preprocessing or what else there is change."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    preprocessing = [views.resolution, views.random_crops, views.num_views, views.seed if views.random_crops else 0]
    parts = [CACHE_FORMAT, [weights_hash(model), config], result, preprocessing, views.split._fingerprint, *more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def labels_of_views(images: LabelledImages, split: Dataset, num_views: int) -> np.ndarray:
    """Class ids of all views of a split, int64 and view by view; 0 for data without labels."""
    if images.label_column is None:
        labels = np.zeros(len(split), dtype=np.int64)
    else:
        labels = np.asarray(split.with_format(None)[images.label_column], dtype=np.int64)
    return np.tile(labels, num_views)


def encoded_views(
    model: ModelMixin,
    encode: Callable[[torch.Tensor], torch.Tensor],
    views: ImageViews,
    argument: str,
    batch_size: int | None,
    num_workers: int,
    accelerator: Accelerator | None,
    description: str,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    This process's share of the views, encoded.

    Args:
        model (`ModelMixin`): What encodes them, on the device to use.
        encode (`Callable`): Latents of pixels, with the model.
        views ([`ImageViews`]): The views.
        argument (`str`): What errors call the model.
        batch_size (`int`, *optional*): Views per forward; by default those that have [`PIXELS_PER_FORWARD`].
        num_workers (`int`): Processes that read images.
        accelerator (`Accelerator`, *optional*): The processes to share the work among.
        description (`str`): Of the progress bar.

    Returns:
        `Iterator`: Of each batch the first row, its latents and the places of its views.

    Raises:
        ValueError: If latents are not finite; names the image.
    """
    # Batches are the same whatever the number of processes, and so are the latents.
    batch_size = batch_size or max(1, PIXELS_PER_FORWARD // views.resolution**2)
    batches = torch.arange(len(views)).split(batch_size)
    if accelerator is not None:
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    loader = torch.utils.data.DataLoader(
        views,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_main_process,
        generator=torch.Generator(),  # training draws the same numbers whether or not there is a cache already
    )
    is_main = accelerator is None or accelerator.is_main_process
    for indices, (pixels, places) in zip(batches, tqdm(loader, desc=description, disable=not is_main)):
        latents = encode(pixels.to(model.device, model.dtype))
        finite = latents.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            row = int(indices[int(finite.logical_not().nonzero()[0])])
            raise ValueError(
                f"`{argument}` must give finite latents, got NaN or infinity for {views.describe(row)} from the model"
                f" {model.config.get('_name_or_path') or type(model).__name__!r}: the weights of one or the values of"
                " the other are broken, or too large for its dtype."
            )
        yield int(indices[0]), latents, places
