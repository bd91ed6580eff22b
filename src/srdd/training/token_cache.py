"""Token pyramids of a whole data set on disk, so that the transformer's epochs never run the tokenizer."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from srdd.models import MultiScaleVQModel
from srdd.training.data import LabelledImages, training_transform


class TokenDataset(torch.utils.data.Dataset):
    """
    Cached pyramids with their labels.

    Args:
        token_ids (`np.ndarray` of shape `(num_images, num_tokens)`): Packed pyramids.
        labels (`np.ndarray` of shape `(num_images,)`): Class ids.
    """

    def __init__(self, token_ids: np.ndarray, labels: np.ndarray):
        self.token_ids = token_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "token_ids": torch.from_numpy(self.token_ids[index].astype(np.int64)),
            "labels": torch.tensor(int(self.labels[index])),
        }


def cache_key(vqvae: MultiScaleVQModel, split: Dataset, resolution: int, scale_sizes: list[list[int]]) -> str:
    """A name that changes when the tokenizer's weights, the data or the preprocessing change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vqvae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(repr((vqvae.config.patch_size, scale_sizes, resolution, split._fingerprint)).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def cached_tokens(
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    split: Dataset,
    resolution: int,
    cache_dir: str | Path,
    random_flip: bool = False,
    batch_size: int = 64,
) -> TokenDataset:
    """
    Tokenise a split once; later calls map the file.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer, on the device to use.
        images ([`LabelledImages`]): Where the split comes from.
        split (`datasets.Dataset`): The images, cropped in the centre.
        resolution (`int`): Side of the images.
        cache_dir (`str` or `Path`): Folder of the cache files.
        random_flip (`bool`, defaults to `False`): Also tokenise the mirrored images; an epoch then has twice as many.
        batch_size (`int`, defaults to 64): Images per forward.

    Returns:
        [`TokenDataset`]
    """
    scale_sizes = vqvae.config.scale_sizes
    path = Path(cache_dir) / f"tokens-{cache_key(vqvae, split, resolution, scale_sizes)}{'-flip' * random_flip}.npy"
    split = split.with_transform(training_transform(images, resolution))
    if images.label_column is None:
        labels = np.zeros(len(split), dtype=np.int64)
    else:
        labels = np.asarray(split.with_format(None)[images.label_column], dtype=np.int64)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        packed: list[list[np.ndarray]] = [[], []]
        for batch in tqdm(DataLoader(split, batch_size=batch_size), desc="Tokenising"):
            pixels = batch["pixel_values"].to(vqvae.device, vqvae.dtype)
            packed[0].append(vqvae.tokenize(pixels).cpu().numpy().astype(np.int32))
            if random_flip:
                packed[1].append(vqvae.tokenize(pixels.flip(-1)).cpu().numpy().astype(np.int32))
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.save(file, np.concatenate(packed[0] + packed[1]))
        partial.replace(path)
    token_ids = np.load(path, mmap_mode="r")
    return TokenDataset(token_ids, np.tile(labels, len(token_ids) // len(labels)))
