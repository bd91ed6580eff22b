"""Token pyramids of a whole data set on disk, so that the transformer's epochs never run the tokenizer."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from srdd.data.array_cache import cached_array, damaged
from srdd.data.image_views import ImageViews, cache_key, encoded_views, labels_of_views
from srdd.data.images import LabelledImages
from srdd.data.text_cache import EncodedTexts
from srdd.models import MultiScaleVQModel
from srdd.models.saved_weights import check_finite_weights
from srdd.scales import num_tokens_per_scale


class TokenDataset(torch.utils.data.Dataset):
    """
    Cached pyramids with their labels. An item has `"token_ids"` and what the transformer is told, `"conditions"`.

    Args:
        token_ids (`np.ndarray` of shape `(num_rows, num_tokens)`): Packed pyramids, any integer type.
        labels (`np.ndarray` of shape `(num_rows,)`): Class ids.
    """

    def __init__(self, token_ids: np.ndarray, labels: np.ndarray):
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
        token_ids (`np.ndarray` of shape `(num_rows, num_tokens)`): Packed pyramids, any integer type.
        places (`np.ndarray` of shape `(num_rows, 4)`): Height and width of the scaled picture that each is of a part
            of, and where that lies from top and left.
        resolution (`int`): The shorter side of scaled pictures.
        texts ([`EncodedTexts`]): The captions, of several views of them one after the other.
    """

    def __init__(self, token_ids: np.ndarray, places: np.ndarray, resolution: int, texts: EncodedTexts):
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


@torch.no_grad()
def cached_tokens(
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    split: Dataset,
    cache_dir: str | Path,
    schedules: Sequence[list[list[int]]] | None = None,
    random_crops: int = 0,
    random_flip: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
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
        schedules (`Sequence[list[list[int]]]`, *optional*): Scales of every pyramid of an image, which lie one after
            the other. By default one, of the tokenizer's own.
        random_crops (`int`, defaults to 0): Random crops per image instead of one in the centre.
        random_flip (`bool`, defaults to `False`): Also tokenise the mirrored images; an epoch then has twice as many.
        seed (`int`, defaults to 0): Seed of the random crops.
        batch_size (`int`, *optional*): Images per forward; by default 64 of 64 pixels, 4 of 256.
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
    schedules = schedules or [vqvae.config.scale_sizes]
    resolution = schedules[0][-1][0] * vqvae.spatial_compression_ratio
    views = ImageViews(split, images.image_column, resolution, random_crops, random_flip, seed)
    shape = (len(views), sum(sum(num_tokens_per_scale(scale_sizes)) for scale_sizes in schedules))
    dtype = np.dtype(np.uint16 if vqvae.config.codebook_size <= 2**16 else np.int32)
    parts = () if texts is None else ("places",)
    if texts is not None:
        dtype, shape = np.dtype([("token_ids", dtype, shape[1:]), ("places", np.int32, 4)]), shape[:1]
    key = cache_key(vqvae, views, schedules[0] if len(schedules) == 1 else schedules, *parts)
    path = Path(cache_dir) / f"tokens-{key}.npy"
    make = partial(_tokenise, vqvae, views, schedules, batch_size, num_workers, accelerator, dtype)
    pyramids = cached_array(path, shape, dtype, make, "token cache", accelerator)
    token_ids = pyramids if texts is None else pyramids["token_ids"]
    # All ids are looked at here: on a GPU no step does.
    low, high, codebook_size = int(token_ids.min()), int(token_ids.max()), vqvae.config.codebook_size
    if low < 0 or high >= codebook_size:
        raise damaged(path, "token cache", f": its ids must lie in [0, {codebook_size - 1}], got [{low}, {high}]")
    if texts is not None:
        return CaptionedTokens(token_ids, pyramids["places"], resolution, texts)
    return TokenDataset(token_ids, labels_of_views(images, split, views.num_views))


def _tokenise(
    vqvae: MultiScaleVQModel,
    views: ImageViews,
    schedules: Sequence[list[list[int]]],
    batch_size: int | None,
    num_workers: int,
    accelerator: Accelerator | None,
    dtype: np.dtype,
) -> Iterator[tuple[int, np.ndarray]]:
    """This process's share of the views: the first row of each batch, and its tokens, or all that `dtype` has."""
    encoded = encoded_views(
        vqvae, lambda pixels: vqvae.encode(pixels).latents, views, "vqvae", batch_size, num_workers, accelerator,
        "Tokenising",
    )  # fmt: skip
    for first_row, latents, places in encoded:
        for scale_sizes in schedules:
            if list(latents.shape[-2:]) != list(scale_sizes[-1]):
                raise ValueError(
                    f"`schedules` must end at the latent grid, {tuple(latents.shape[-2:])}, got {scale_sizes}."
                )
        pyramids = [vqvae.quantize_latents(latents, scale_sizes) for scale_sizes in schedules]
        rows = token_ids = torch.cat(pyramids, dim=1).cpu().numpy()
        if dtype.names is not None:
            rows = np.empty(len(token_ids), dtype)
            rows["token_ids"], rows["places"] = token_ids, places
        yield first_row, rows
