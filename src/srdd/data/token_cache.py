"""Token pyramids of a whole data set on disk, so that the transformer's epochs never run the tokenizer."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm

from srdd.data.array_cache import cached_array, damaged
from srdd.data.images import LabelledImages, cut_square, square_to_tensor
from srdd.data.loader_workers import leave_signals_to_main_process
from srdd.data.text_cache import EncodedTexts
from srdd.models import MultiScaleVQModel
from srdd.models.saved_weights import check_finite_weights, weights_hash
from srdd.scales import num_tokens_per_scale


# Part of every name: files of formats that cannot be relied on, as those that two runs could write at once, are left.
CACHE_FORMAT = 2


class SideBySide:
    """
    Arrays with as many rows, read as one with longer rows. Nothing is read of mapped ones before it is asked for.

    Args:
        arrays (`Sequence[np.ndarray]`): Of the shapes `(num_rows, num_tokens)`, where the last may differ.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays

    def __getitem__(self, rows: int | list[int]) -> np.ndarray:
        return np.concatenate([array[rows] for array in self.arrays], axis=-1)


class TokenDataset(torch.utils.data.Dataset):
    """
    Cached pyramids with their labels. An item has `"token_ids"` and what the transformer is told, `"conditions"`.

    Args:
        token_ids (`np.ndarray` or [`SideBySide`] of shape `(num_rows, num_tokens)`): Packed pyramids, any integer
            type.
        labels (`np.ndarray` of shape `(num_rows,)`): Class ids.
    """

    def __init__(self, token_ids: np.ndarray | SideBySide, labels: np.ndarray):
        self.token_ids = token_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {
            "token_ids": torch.from_numpy(self.token_ids[index].astype(np.int64)),
            "conditions": {"class_labels": torch.tensor(int(self.labels[index]))},
        }

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The items of a batch, in half of the time: without workers a device may wait for them."""
        token_ids = torch.from_numpy(self.token_ids[indices].astype(np.int64))
        labels = torch.from_numpy(self.labels[indices].astype(np.int64))
        return [{"token_ids": ids, "conditions": {"class_labels": label}} for ids, label in zip(token_ids, labels)]


class CaptionedTokens(torch.utils.data.Dataset):
    """
    Cached pyramids with their captions. An item has `"token_ids"` and what the transformer is told, `"conditions"`:
    a text, and size and crop of the picture.

    Args:
        token_ids (`np.ndarray` or [`SideBySide`] of shape `(num_rows, num_tokens)`): Packed pyramids, any integer
            type.
        places (`np.ndarray` of shape `(num_rows, 4)`): Height and width of the scaled picture that each is of a part
            of, and where that lies from top and left.
        resolution (`int`): The shorter side of scaled pictures.
        texts ([`EncodedTexts`]): The captions, of several views of them one after the other.
    """

    def __init__(self, token_ids: np.ndarray | SideBySide, places: np.ndarray, resolution: int, texts: EncodedTexts):
        self.token_ids = token_ids
        self.places = places
        self.resolution = resolution
        self.texts = texts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        # The transformer is told of pictures whose shorter side is 512, whatever its own size.
        place = torch.from_numpy(self.places[index].astype(np.float32)) * (512 / self.resolution)
        text = self.texts[index % len(self.texts)]
        return {
            "token_ids": torch.from_numpy(self.token_ids[index].astype(np.int64)),
            "conditions": {**text, "original_size": place[:2], "crop_coords": place[2:]},
        }


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


def cache_key(vqvae: MultiScaleVQModel, views: ImageViews, scale_sizes: list[list[int]], *more: str) -> str:
    """A name that changes when the tokenizer, the data, the preprocessing or what else there is change."""
    config = {name: value for name, value in vqvae.config.items() if not name.startswith("_")}
    preprocessing = [views.resolution, views.random_crops, views.num_views, views.seed if views.random_crops else 0]
    tokenizer = [weights_hash(vqvae), config]
    parts = [CACHE_FORMAT, tokenizer, scale_sizes, preprocessing, views.split._fingerprint, *more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def cached_tokens(
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    split: Dataset,
    cache_dir: str | Path,
    scale_sizes: list[list[int]] | None = None,
    random_crops: int = 0,
    random_flip: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    texts: EncodedTexts | None = None,
) -> TokenDataset | CaptionedTokens:
    """
    Tokenise a split once; later calls map the file. The cache holds another file for another tokenizer, other data or
    other preprocessing. With several processes each tokenises a share; all must call this.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer, on the device to use.
        images ([`LabelledImages`]): Where the split comes from.
        split (`datasets.Dataset`): The images.
        cache_dir (`str` or `Path`): Folder of the cache files, shared by all processes.
        scale_sizes (`list[list[int]]`, *optional*): Scales of the pyramid; the tokenizer's own by default.
        random_crops (`int`, defaults to 0): Random crops per image instead of one in the centre.
        random_flip (`bool`, defaults to `False`): Also tokenise the mirrored images; an epoch then has twice as many.
        seed (`int`, defaults to 0): Seed of the random crops.
        batch_size (`int`, defaults to 64): Images per forward.
        num_workers (`int`, defaults to 0): Processes that read images.
        accelerator (`Accelerator`, *optional*): The processes to share the work among.
        texts ([`EncodedTexts`], *optional*): The captions of the images, instead of labels.

    Returns:
        [`TokenDataset`], or [`CaptionedTokens`] with `texts`.

    Raises:
        ValueError: If the tokenizer has weights, or gives latents, that are not finite; if the folder cannot be
            written, or the file in it is damaged.
        OSError: If there is no room for the file.
    """
    check_finite_weights(vqvae, "vqvae", vqvae.config.get("_name_or_path"))
    scale_sizes = scale_sizes or vqvae.config.scale_sizes
    resolution = scale_sizes[-1][0] * vqvae.spatial_compression_ratio
    views = ImageViews(split, images.image_column, resolution, random_crops, random_flip, seed)
    if images.label_column is None:
        labels = np.zeros(len(split), dtype=np.int64)
    else:
        labels = np.asarray(split.with_format(None)[images.label_column], dtype=np.int64)
    shape = (len(views), sum(num_tokens_per_scale(scale_sizes)))
    dtype = np.dtype(np.uint16 if vqvae.config.codebook_size <= 2**16 else np.int32)
    parts = () if texts is None else ("places",)
    if texts is not None:
        dtype, shape = np.dtype([("token_ids", dtype, shape[1:]), ("places", np.int32, 4)]), shape[:1]
    path = Path(cache_dir) / f"tokens-{cache_key(vqvae, views, scale_sizes, *parts)}.npy"
    make = partial(_tokenise, vqvae, views, scale_sizes, batch_size, num_workers, accelerator, dtype)
    pyramids = cached_array(path, shape, dtype, make, "token cache", accelerator)
    token_ids = pyramids if texts is None else pyramids["token_ids"]
    # All ids are looked at here: on a GPU no step does.
    low, high, codebook_size = int(token_ids.min()), int(token_ids.max()), vqvae.config.codebook_size
    if low < 0 or high >= codebook_size:
        raise damaged(path, "token cache", f": its ids must lie in [0, {codebook_size - 1}], got [{low}, {high}]")
    if texts is not None:
        return CaptionedTokens(token_ids, pyramids["places"], resolution, texts)
    return TokenDataset(token_ids, np.tile(labels, views.num_views))


def _tokenise(
    vqvae: MultiScaleVQModel,
    views: ImageViews,
    scale_sizes: list[list[int]],
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator | None,
    dtype: np.dtype,
) -> Iterator[tuple[int, np.ndarray]]:
    """This process's share of the views: the first row of each batch, and its tokens, or all that `dtype` has."""
    # Batches are the same whatever the number of processes, and so are the tokens.
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
    for indices, (pixels, places) in zip(batches, tqdm(loader, desc="Tokenising", disable=not is_main)):
        latents = vqvae.encode(pixels.to(vqvae.device, vqvae.dtype)).latents
        if list(latents.shape[-2:]) != list(scale_sizes[-1]):
            raise ValueError(
                f"`scale_sizes` must end at the latent grid, {tuple(latents.shape[-2:])}, got {scale_sizes}."
            )
        finite = latents.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            row = int(indices[int(finite.logical_not().nonzero()[0])])
            raise ValueError(
                f"`vqvae` must give finite latents, got NaN or infinity for {views.describe(row)} from the tokenizer"
                f" {vqvae.config.get('_name_or_path') or type(vqvae).__name__!r}: the weights of one or the values of"
                " the other are broken, or too large for its dtype."
            )
        rows = token_ids = vqvae.quantize_latents(latents, scale_sizes).cpu().numpy()
        if dtype.names is not None:
            rows = np.empty(len(token_ids), dtype)
            rows["token_ids"], rows["places"] = token_ids, places
        yield int(indices[0]), rows
