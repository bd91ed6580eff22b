"""Features of many images, collected by several processes in chunks that survive an interruption."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from srdd.evaluation.features import FeatureExtractor
from srdd.evaluation.image_sources import ImageSource


NUM_PICTURES = 64

# Where the images themselves are kept, among the folders of extractors.
IMAGES = "images"


@dataclass
class CollectedImages:
    """
    What is kept of images.

    Args:
        features (`dict[str, torch.Tensor]`): By name of the extractor, of shape `(num_images, num_features)`.
        logits (`dict[str, torch.Tensor]`): Of extractors that know classes, `(num_images, num_classes)`.
        image_hash (`str`): Twelve hexadecimal digits of SHA-256 over all pixels, in order.
        pictures (`torch.Tensor` of shape `(num_pictures, 3, height, width)`): The first images, uint8, 64 at most.
        image_files (`list[Path]`, *optional*): Where all of them are, if they were to be kept; none by default.
    """

    features: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    image_hash: str
    pictures: torch.Tensor
    image_files: list[Path] = field(default_factory=list)

    def images(self) -> Iterator[torch.Tensor]:
        """All images that were kept, in batches of shape `(batch, 3, height, width)`, uint8."""
        for path in self.image_files:
            yield load_file(path)["images"]

    def forget_images(self) -> None:
        """Remove the files of the images. Features stay."""
        for path in self.image_files:
            path.unlink(missing_ok=True)


@torch.no_grad()
def collect(
    source: ImageSource,
    extractors: Sequence[FeatureExtractor],
    folder: str | Path,
    accelerator: Accelerator,
    batch_size: int = 64,
    description: str = "Images",
    keep_images: bool = False,
) -> CollectedImages:
    """
    Read or draw images and keep their features in files, one for each extractor and batch. Batches that have their
    files are not made again, by whichever run they were left; processes share the others.

    Args:
        source ([`PipelineImages`], [`DataSetImages`], [`FolderImages`] or [`NpzImages`]): The images.
        extractors (`Sequence[FeatureExtractor]`): What looks at them, on the device of this process.
        folder (`str` or `Path`): Cache, which all processes see; sets of images that differ in any way do not meet.
        accelerator (`Accelerator`): The processes. All of them call this function and get all features.
        batch_size (`int`, defaults to 64): Images at once. Another value makes other files, and features that may
            differ in their last digits.
        description (`str`, defaults to `"Images"`): Of the progress bar.
        keep_images (`bool`, defaults to `False`): Keep the images as well as their features, not compressed.

    Returns:
        [`CollectedImages`]

    Raises:
        ValueError: If two extractors have the same name, as folders of one name give them.
    """
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        raise ValueError(f"`extractors` must have names of their own, got {names}; features go by them.")
    key = {**source.key, "torch": torch.__version__}
    root = Path(folder, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12])
    folders = {extractor.name: root / _folder_name(extractor) for extractor in extractors}
    if keep_images:
        folders[IMAGES] = root / IMAGES
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    batches = [range(start, min(start + batch_size, source.count)) for start in range(0, source.count, batch_size)]

    def path_of(name: str, batch: range) -> Path:
        return folders[name] / f"{batch.start:07d}-{batch.stop:07d}.safetensors"

    wanted = [(batch, {name for name in folders if not path_of(name, batch).exists()}) for batch in batches]
    wanted = [(batch, missing) for batch, missing in wanted if missing]
    accelerator.wait_for_everyone()  # all have looked before one writes
    mine = wanted[accelerator.process_index :: accelerator.num_processes]
    for batch, missing in tqdm(mine, desc=description, disable=not accelerator.is_local_main_process):
        images = source.read(batch)
        digests = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images]
        kept = {
            "digests": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
            "pictures": images[: max(0, NUM_PICTURES - batch.start)].contiguous(),
        }
        if IMAGES in missing:
            _save(path_of(IMAGES, batch), {"images": images.contiguous()})
        for extractor in [each for each in extractors if each.name in missing]:
            features, logits = extractor.features_and_logits(images.to(accelerator.device))
            tensors = {"features": features} if logits is None else {"features": features, "logits": logits}
            _save(
                path_of(extractor.name, batch), {name: value.float().cpu() for name, value in tensors.items()} | kept
            )
    accelerator.wait_for_everyone()

    stored = {each.name: [load_file(path_of(each.name, batch)) for batch in batches] for each in extractors}
    first = stored[extractors[0].name]
    digests = torch.cat([tensors["digests"] for tensors in first])
    return CollectedImages(
        features={name: torch.cat([tensors["features"] for tensors in stored[name]]) for name in stored},
        logits={
            extractor.name: torch.cat([tensors["logits"] for tensors in stored[extractor.name]])
            for extractor in extractors
            if extractor.has_logits
        },
        image_hash=hashlib.sha256(digests.numpy().data).hexdigest()[:12],
        pictures=torch.cat([tensors["pictures"] for tensors in first]),
        image_files=[path_of(IMAGES, batch) for batch in batches] if keep_images else [],
    )


def _folder_name(extractor: FeatureExtractor) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in extractor.name)
    return f"{name}-{extractor.weights_hash()}"


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial)
    partial.replace(path)
