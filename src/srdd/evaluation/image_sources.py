"""Where images to be measured come from: a pipeline, a data set, a folder, an `.npz`. All give uint8 by index."""

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from PIL import Image

from srdd.data.images import LabelledImages, image_to_tensor
from srdd.data.picture_folders import FolderReader
from srdd.evaluation.latent_diffusion import DrawingPipeline
from srdd.evaluation.npz_images import ChosenPictures, NpzImages
from srdd.models.saved_weights import weights_hash


# Random numbers of two seeds of an evaluation have nothing in common below so many images.
SEED_STRIDE = 1_000_000


class PipelineImages:
    """
    Images that a pipeline draws, of all classes alike: image i has the class `i % num_classes` and a generator of its
    own, seeded with `1_000_000 * seed + i`, so that it depends neither on its batch nor on the process that draws it.

    Args:
        pipe ([`SRDDPipeline`] or [`~srdd.evaluation.latent_diffusion.LatentDiffusionPipeline`]): Draws them.
        count (`int`): Number of images.
        guidance_scale (`float`, *optional*): The pipeline's own by default.
        seed (`int`, defaults to 0): Seed of the images.

    Raises:
        ValueError: If the pipeline draws images that are not square.
    """

    def __init__(self, pipe: DrawingPipeline, count: int, guidance_scale: float | None = None, seed: int = 0):
        height, width = pipe.sample_size
        if height != width:
            raise ValueError(f"`pipe` must draw square images, got {height}x{width}.")
        self.pipe, self.count, self.resolution, self.seed = pipe, count, height, seed
        self.num_classes = pipe.num_classes
        self.guidance_scale = pipe.default_guidance_scale if guidance_scale is None else guidance_scale
        if self.num_classes == 0:
            self.guidance_scale = 1.0

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the pixels depend on."""
        return {
            **pipeline_key(self.pipe),
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "device": self.pipe.device.type,
        }

    def read(self, indices: range) -> torch.Tensor:
        """uint8 images of shape `(len(indices), 3, height, width)`."""
        return self.draw(indices, "pt").mul(255).round().to(torch.uint8).cpu()

    def draw(self, indices: range, output_type: str) -> torch.Tensor:
        """Images, or latent states, by index, as the pipeline gives them under an `output_type`."""
        return self.pipe(
            [index % self.num_classes for index in indices] if self.num_classes else None,
            guidance_scale=self.guidance_scale,
            num_images_per_prompt=1 if self.num_classes else len(indices),
            generator=[torch.Generator().manual_seed(SEED_STRIDE * self.seed + index) for index in indices],
            output_type=output_type,
        ).images


class DataSetImages:
    """
    Images of a data set, the first `count` in an order that is random but always the same.

    Args:
        images ([`LabelledImages`]): The data set.
        split (`str`): `"train"` or `"validation"`.
        count (`int`): At most so many images.
        resolution (`int`): Side that images are scaled and cropped to, as in training.

    Raises:
        ValueError: If the data set has no such split.
    """

    def __init__(self, images: LabelledImages, split: str, count: int, resolution: int):
        data = {"train": images.train, "validation": images.validation}.get(split)
        if data is None:
            raise ValueError(f"`split` must be one the data set has, got {split!r}.")
        self.count, self.resolution = min(count, len(data)), resolution
        self.data, self.column = data.shuffle(seed=0), images.image_column
        self._other_split = {"train": images.validation, "validation": images.train}[split]

    @property
    def key(self) -> dict[str, Any]:
        """What the pixels depend on."""
        return {"data": self.data._fingerprint, "resolution": self.resolution, "column": self.column}

    def others(self, count: int) -> "DataSetImages | None":
        """
        Images of the data set that are not among these, at most `count`: of the rest of the split, or of the other
        one if that has more; `None` if there are none.
        """
        rest = len(self.data) - self.count
        if self._other_split is not None and len(self._other_split) > rest:
            data = self._other_split.shuffle(seed=0)
        elif rest > 0:
            data = self.data.select(range(self.count, len(self.data)))
        else:
            return None
        others = copy.copy(self)
        others.data, others.count = data, min(count, len(data))
        return others

    def read(self, indices: range) -> torch.Tensor:
        """uint8 images of shape `(len(indices), 3, resolution, resolution)`."""
        images = self.data[indices.start : indices.stop][self.column]
        return torch.stack([_to_bytes(image, self.resolution) for image in images])


class FolderImages(ChosenPictures):
    """
    Square pictures of one size in a folder and its subfolders, by name. What is a picture is decided as in training
    ([`~srdd.data.picture_folders.FolderReader`]); what is left out is warned of.

    Args:
        folder (`str` or `Path`): The folder.
        count (`int`, *optional*): At most so many pictures, a choice that is always the same; all by default.
        resolution (`int`, *optional*): Side that they must have; that of the first one by default.
        argument (`str`, defaults to `"folder"`): What errors call the folder.

    Raises:
        ValueError: If there are no pictures, or one cannot be read or does not have the side, here or when it is read.
    """

    def __init__(
        self,
        folder: str | Path,
        count: int | None = None,
        resolution: int | None = None,
        argument: str = "folder",
    ):
        self.folder, self.argument = Path(folder), argument
        reader = FolderReader(folder, argument)
        paths = sorted(reader.pictures_below(reader.root), key=lambda path: path.with_suffix("").parts)
        if not paths:
            raise reader.no_pictures()
        reader.report()
        self._choose(paths, count)
        self.resolution = resolution
        self.resolution = self._read(self.chosen[0]).shape[-1]

    @property
    def key(self) -> dict[str, Any]:
        """What the pixels depend on."""
        return {"files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.chosen]}

    def names(self) -> list[str]:
        """Names of the pictures, without their ending."""
        root = self.folder.absolute()
        return [path.relative_to(root).with_suffix("").as_posix() for path in self.chosen]

    def read(self, indices: range) -> torch.Tensor:
        """uint8 images of shape `(len(indices), 3, resolution, resolution)`."""
        return torch.stack([self._read(self.chosen[index]) for index in indices])

    def _read(self, path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                size = image.size
                resolution = self.resolution or image.height
                pixels = _to_bytes(image, resolution) if size == (resolution, resolution) else None
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise ValueError(
                f"`{self.argument}` must hold readable pictures, got {str(path)!r} ({type(error).__name__}: {error})."
            ) from error
        if pixels is None:
            raise ValueError(
                f"`{self.argument}` must hold pictures of {resolution}x{resolution} pixels, got {size[0]}x{size[1]} in"
                f" {path}."
            )
        return pixels


RealImages = DataSetImages | FolderImages | NpzImages
ImageSource = PipelineImages | RealImages


def open_pictures(
    path: str | Path, count: int | None = None, resolution: int | None = None, argument: str = "path"
) -> FolderImages | NpzImages:
    """
    Pictures that lie somewhere: in an `.npz` by the ending of the name, else in a folder.

    Args:
        path (`str` or `Path`): File or folder.
        count (`int`, *optional*): As in [`FolderImages`].
        resolution (`int`, *optional*): As in [`FolderImages`].
        argument (`str`, defaults to `"path"`): What errors call it.

    Raises:
        ValueError: As [`FolderImages`] and [`NpzImages`] do.
    """
    kind = NpzImages if Path(path).suffix == ".npz" else FolderImages
    return kind(path, count, resolution, argument)


def pipeline_key(pipe: DrawingPipeline) -> dict[str, Any]:
    """What a pipeline is, in JSON values: its weights and configs, not where they came from."""
    components = pipe.components
    models = [model for model in components.values() if isinstance(model, torch.nn.Module)]
    return {
        "weights": weights_hash(*models),
        "configs": [_public(model.config) for model in models],
        "scheduler": _public(pipe.scheduler.config),
        **{name: value for name, value in _public(pipe.config).items() if name not in components},
    }


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it came from; that of a quantization as a dict."""
    return {
        name: value.to_dict() if isinstance(value, QuantizationConfigMixin) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def _to_bytes(image: Image.Image, resolution: int) -> torch.Tensor:
    return image_to_tensor(image, resolution).add(1).mul(127.5).round().to(torch.uint8)
