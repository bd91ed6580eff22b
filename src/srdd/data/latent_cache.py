"""Latents of a whole data set on disk, so that the epochs of a diffusion model never run the autoencoder."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKL

from srdd.data.array_cache import cached_array
from srdd.data.image_views import ImageViews, cache_key, encoded_views, labels_of_views
from srdd.data.images import LabelledImages
from srdd.models.saved_weights import check_finite_weights


class LatentDataset(torch.utils.data.Dataset):
    """
    Cached latents with their labels. An item has `"moments"`, means and logarithms of variances as
    `AutoencoderKL.encode` gives them in `latent_dist.parameters`, float32, and `"class_labels"`.

    Args:
        moments (`np.ndarray` of shape `(num_rows, 2 * latent_channels, height, width)`): Any float type.
        labels (`np.ndarray` of shape `(num_rows,)`): Class ids.
    """

    def __init__(self, moments: np.ndarray, labels: np.ndarray):
        self.moments = moments
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "moments": torch.from_numpy(self.moments[index].astype(np.float32)),
            "class_labels": torch.tensor(int(self.labels[index])),
        }


@torch.no_grad()
def cached_latents(
    vae: AutoencoderKL,
    images: LabelledImages,
    split: Dataset,
    cache_dir: str | Path,
    resolution: int,
    random_crops: int = 0,
    random_flip: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
) -> LatentDataset:
    """
    Encode a split once, in half precision; later calls map the file. The cache holds another file for another
    autoencoder, other data or other preprocessing. With several processes each encodes a share; all must call this.

    Args:
        vae (`AutoencoderKL`): The autoencoder, on the device to use.
        images ([`LabelledImages`]): Where the split comes from.
        split (`datasets.Dataset`): The images.
        cache_dir (`str` or `Path`): Folder of the cache files, shared by all processes.
        resolution (`int`): Side of the images, a multiple of what the autoencoder divides it by.
        random_crops (`int`, defaults to 0): Random crops per image instead of one in the centre.
        random_flip (`bool`, defaults to `False`): Also encode the mirrored images; an epoch then has twice as many.
        seed (`int`, defaults to 0): Seed of the random crops.
        batch_size (`int`, *optional*): Images per forward; by default 64 of 64 pixels, 4 of 256.
        num_workers (`int`, defaults to 0): Processes that read images.
        accelerator (`Accelerator`, *optional*): The processes to share the work among.

    Returns:
        [`LatentDataset`]

    Raises:
        ValueError: If the autoencoder has weights, or gives latents, that are not finite; if the folder cannot be
            written, or the file in it is damaged.
        OSError: If there is no room for the file.
    """
    check_finite_weights(vae, "vae", vae.config.get("_name_or_path"))
    views = ImageViews(split, images.image_column, resolution, random_crops, random_flip, seed)
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    shape, dtype = (len(views), 2 * vae.config.latent_channels, side, side), np.dtype(np.float16)
    path = Path(cache_dir) / f"latents-{cache_key(vae, views, 'moments')}.npy"
    make = partial(_encode, vae, views, batch_size, num_workers, accelerator)
    moments = cached_array(path, shape, dtype, make, "latent cache", accelerator)
    return LatentDataset(moments, labels_of_views(images, split, views.num_views))


def _encode(
    vae: AutoencoderKL, views: ImageViews, batch_size: int | None, num_workers: int, accelerator: Accelerator | None
) -> Iterator[tuple[int, np.ndarray]]:
    """This process's share of the views: the first row of each batch, and its moments."""

    def moments(pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent_dist.parameters.half()

    encoded = encoded_views(vae, moments, views, "vae", batch_size, num_workers, accelerator, "Encoding")
    return ((first_row, latents.cpu().numpy()) for first_row, latents, _ in encoded)
