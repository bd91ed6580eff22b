"""Many images in one `.npz`, as OpenAI's evaluator (guided-diffusion) reads and publishes them."""

import copy
import math
import random
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srdd.evaluation.distances import FeatureStatistics


# The array of the images in an archive, and how its header begins.
MEMBER = "arr_0.npy"
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

READ_ERRORS = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def save_npz(path: str | Path, batches: Iterable[torch.Tensor], count: int) -> None:
    """
    Write images to an `.npz`, not compressed, batch by batch. What is stopped half-way leaves no file of that name, or
    the one that was there.

    Args:
        path (`str` or `Path`): The file. It gets the array `arr_0`, uint8 of shape `(count, height, width, 3)`.
        batches (`Iterable[torch.Tensor]`): uint8 images of shape `(batch, 3, height, width)`, one batch at least.
        count (`int`): Number of all images.

    Raises:
        ValueError: If the batches do not hold `count` images of one size.
    """
    path, shape, written = Path(path), None, 0
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(partial, "w") as archive, archive.open(MEMBER, "w", force_zip64=True) as member:
            for batch in batches:
                pixels = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
                if shape is None:
                    shape = pixels.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                if pixels.shape[1:] != shape or pixels.dtype != np.uint8:
                    raise ValueError(
                        f"`batches` must hold uint8 images of {shape}, got {pixels.dtype} of {pixels.shape[1:]}."
                    )
                member.write(pixels.data)
                written += len(pixels)
        if written != count:
            raise ValueError(f"`batches` must hold {count} images, got {written}.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class ChosenPictures:
    """Some of the pictures that lie somewhere, by name or by number, and the rest of them."""

    def _choose(self, pictures: list, count: int | None) -> None:
        """Take at most `count` of them, a choice that is always the same, in their order."""
        count = len(pictures) if count is None else min(count, len(pictures))
        kept = set(random.Random(0).sample(range(len(pictures)), count))
        self.chosen = [picture for index, picture in enumerate(pictures) if index in kept]
        self._rest = [picture for index, picture in enumerate(pictures) if index not in kept]
        self.count = count

    def others(self, count: int) -> "ChosenPictures | None":
        """Pictures that are not among these, at most `count`; `None` if there are no more."""
        if not self._rest:
            return None
        others = copy.copy(self)
        others._choose(self._rest, count)
        return others


class NpzImages(ChosenPictures):
    """
    Square pictures in an `.npz`: its array `arr_0`, uint8 of shape `(num_images, side, side, 3)`. They are read one by
    one; where the file is compressed, one after the other is quickest.

    Args:
        path (`str` or `Path`): The file.
        count (`int`, *optional*): At most so many pictures, a choice that is always the same; all by default.
        resolution (`int`, *optional*): Side that they must have; any by default.
        argument (`str`, defaults to `"path"`): What errors call the file.

    Raises:
        ValueError: If the file cannot be read, here or later, or holds something else.
    """

    def __init__(
        self, path: str | Path, count: int | None = None, resolution: int | None = None, argument: str = "path"
    ):
        self.path, self.argument = Path(path), argument
        try:
            archive = zipfile.ZipFile(path)
            self._names = archive.namelist()
            if MEMBER in self._names:
                self._pixels = archive.open(MEMBER)
                shape, fortran_order, dtype = READ_HEADER[np.lib.format.read_magic(self._pixels)](self._pixels)
        except READ_ERRORS as error:
            raise self._unreadable(error) from error
        if MEMBER not in self._names:
            raise ValueError(
                f"`{argument}` must hold images, the array 'arr_0', got {sorted(self._names)} in {str(path)!r}."
                " Statistics alone ('mu', 'sigma') are of one network and tell of no other distance."
            )
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(
                f"`{argument}` must hold square images, 'arr_0' of shape (num_images, side, side, 3) and uint8 in C"
                f" order, got {dtype} of {shape} in {str(path)!r}."
            )
        if resolution not in (None, shape[1]):
            raise ValueError(
                f"`{argument}` must hold pictures of {resolution}x{resolution} pixels, got {shape[1]}x{shape[2]} in"
                f" {path}."
            )
        self._first_byte, self._shape = self._pixels.tell(), shape[1:]
        self.resolution = shape[1]
        self._choose(list(range(shape[0])), count)

    @property
    def key(self) -> dict[str, Any]:
        """What the pixels depend on."""
        stat = self.path.stat()
        return {"npz": [str(self.path), stat.st_size, stat.st_mtime_ns], "indices": self.chosen}

    @property
    def inception_statistics(self) -> FeatureStatistics | None:
        """
        Mean and covariance of Inception's features, `mu` and `sigma`, where the file has them: of the images, or of a
        set that they were drawn from, as its authors know.

        Raises:
            ValueError: If they cannot be read or do not fit each other.
        """
        if not {"mu.npy", "sigma.npy"} <= set(self._names):
            return None
        try:
            with np.load(self.path) as file:
                mean, covariance = (torch.from_numpy(file[name]) for name in ("mu", "sigma"))
            return FeatureStatistics.from_moments(mean, covariance)
        except (*READ_ERRORS, TypeError) as error:
            raise self._unreadable(error) from error

    def read(self, indices: range) -> torch.Tensor:
        """uint8 images of shape `(len(indices), 3, resolution, resolution)`."""
        return torch.stack([self._read(self.chosen[index]) for index in indices])

    def _read(self, index: int) -> torch.Tensor:
        num_bytes = math.prod(self._shape)
        try:
            self._pixels.seek(self._first_byte + index * num_bytes)
            pixels = torch.frombuffer(bytearray(self._pixels.read(num_bytes)), dtype=torch.uint8)
            return pixels.view(self._shape).permute(2, 0, 1)
        except (*READ_ERRORS, RuntimeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(
            f"`{self.argument}` must be an npz that can be read, got {str(self.path)!r} ({type(error).__name__}:"
            f" {error})."
        )
