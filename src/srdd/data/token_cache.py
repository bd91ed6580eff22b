"""Token pyramids of a whole data set on disk, so that the transformer's epochs never run the tokenizer."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm

from srdd.data.images import LabelledImages, image_to_tensor
from srdd.models import MultiScaleVQModel
from srdd.scales import num_tokens_per_scale


class TokenDataset(torch.utils.data.Dataset):
    """
    Cached pyramids with their labels.

    Args:
        token_ids (`np.ndarray` of shape `(num_rows, num_tokens)`): Packed pyramids, any integer type.
        labels (`np.ndarray` of shape `(num_rows,)`): Class ids.
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


class ImageViews(torch.utils.data.Dataset):
    """
    The views of every image that are tokenised: the centre or random crops, then the same mirrored. View by view.

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

    def __getitem__(self, row: int) -> torch.Tensor:
        view, index = divmod(row, len(self.split))
        flip, crop = divmod(view, self.num_crops)
        rng = random.Random(f"{self.seed} {crop} {index}")
        image = self.split[index][self.image_column]
        pixels = image_to_tensor(image, self.resolution, random_crop=self.random_crops > 0, rng=rng)
        return pixels.flip(-1) if flip else pixels


def cache_key(vqvae: MultiScaleVQModel, views: ImageViews, scale_sizes: list[list[int]]) -> str:
    """A name that changes when the tokenizer, the data or the preprocessing change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vqvae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    config = {name: value for name, value in vqvae.config.items() if not name.startswith("_")}
    preprocessing = [views.resolution, views.random_crops, views.num_views, views.seed if views.random_crops else 0]
    digest.update(json.dumps([config, scale_sizes, preprocessing, views.split._fingerprint], sort_keys=True).encode())
    return digest.hexdigest()[:16]


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
) -> TokenDataset:
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

    Returns:
        [`TokenDataset`]
    """
    scale_sizes = scale_sizes or vqvae.config.scale_sizes
    resolution = scale_sizes[-1][0] * vqvae.spatial_compression_ratio
    views = ImageViews(split, images.image_column, resolution, random_crops, random_flip, seed)
    if images.label_column is None:
        labels = np.zeros(len(split), dtype=np.int64)
    else:
        labels = np.asarray(split.with_format(None)[images.label_column], dtype=np.int64)
    path = Path(cache_dir) / f"tokens-{cache_key(vqvae, views, scale_sizes)}.npy"
    is_main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
    wait()  # nobody may look for the file while another process already makes it
    if not path.exists():
        partial = path.with_suffix(".partial")
        dtype = np.uint16 if vqvae.config.codebook_size <= 2**16 else np.int32
        shape = (len(views), sum(num_tokens_per_scale(scale_sizes)))
        if is_main:
            with _clear_error(path, partial):
                path.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        wait()
        first_byte = np.load(partial, mmap_mode="r").offset
        # Batches are the same whatever the number of processes, and so are the tokens.
        batches = torch.arange(len(views)).split(batch_size)
        if accelerator is not None:
            batches = batches[accelerator.process_index :: accelerator.num_processes]
        loader = torch.utils.data.DataLoader(
            views,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=num_workers,
            generator=torch.Generator(),  # training draws the same numbers whether or not there is a cache already
        )
        for indices, pixels in zip(batches, tqdm(loader, desc="Tokenising", disable=not is_main)):
            token_ids = vqvae.tokenize(pixels.to(vqvae.device, vqvae.dtype), scale_sizes).cpu().numpy()
            # Written, not mapped: a full disk is then an error and not a crash.
            with _clear_error(path, partial), open(partial, "r+b") as file:
                file.seek(first_byte + int(indices[0]) * shape[1] * np.dtype(dtype).itemsize)
                file.write(token_ids.astype(dtype).tobytes())
        wait()
        if is_main:
            partial.replace(path)
        wait()
    return TokenDataset(np.load(path, mmap_mode="r"), np.tile(labels, views.num_views))


@contextmanager
def _clear_error(path: Path, partial: Path) -> Iterator[None]:
    """Where a cache cannot be written, remove what there is of it and say so."""
    try:
        yield
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"Could not write the token cache {str(path)!r} ({error}). Is the disk full?") from error
