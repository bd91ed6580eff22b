"""
Folders of pictures, read by one rule in training and evaluation: which files are pictures, which folders are classes,
and which are splits. What is left out is counted and named.
"""

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from diffusers.utils import logging
from PIL import Image

from srdd.data.captions import METADATA_FILE
from srdd.data.class_labels import class_order, shortened


logger = logging.get_logger(__name__)

# What systems and programs put beside pictures, besides names that start with a dot.
SYSTEM_NAMES = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip

# Files that make a folder one of a run, besides folders named `checkpoint-` and a number.
RUN_FILES = {"train_log.jsonl", "model_index.json", "evaluation.json", "ablations.json"}

# Formats that Pillow recognises but does not read by itself.
FORMATS_WITHOUT_READER = {"BUFR", "GRIB", "HDF5", "MPEG"}

# Names of splits in lower case. The first of a folder that is there becomes the validation split.
TRAIN_NAME, VALIDATION_NAMES = "train", ("validation", "val", "valid", "dev", "test")

# Class folders of such names may have been meant as splits.
SPLIT_LIKE_NAMES = {TRAIN_NAME, *VALIDATION_NAMES, "training", "testing", "eval", "evaluation", "holdout"}

# Why something is left out.
HIDDEN = "hidden or made by the system"
NO_PICTURE = "no pictures by the ending of their names"
NOT_OPENED = "cannot be opened: broken links, or no permission"
NOT_UNICODE = "names that are not UTF-8"
OF_A_RUN = "folders that a training or an evaluation writes"
READ_ALREADY = "links to folders that are read already"
WITHOUT_PICTURES = "folders without pictures, which are no classes"
BESIDE = "pictures beside class folders or splits, which belong to none"
OTHER_SPLIT = "other splits"


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Endings of the names of files that this Pillow reads, in lower case and with their dot."""
    formats = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - FORMATS_WITHOUT_READER  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in formats.items() if name in readable)


def is_hidden(name: str) -> bool:
    """Whether a name hides a file or folder, by one dot in front of it, or is one that systems give."""
    return (name.startswith(".") and not name.startswith("..")) or name.lower() in SYSTEM_NAMES


class FolderReader:
    """
    Finds the pictures of a folder, whatever its files and folders are called, and remembers what it leaves out.

    Links are followed, but no folder is read twice through them. Files and folders that are hidden, and folders that
    runs of this package have written, are left out.

    Args:
        folder (`str` or `Path`): The folder.
        argument (`str`): What errors call it.
        run_folders (`Sequence[str | Path]`, defaults to `()`): Folders that the run at hand writes, if they exist.
        with_captions (`bool`, defaults to `False`): Whether pictures have captions instead of classes.

    Raises:
        ValueError: If `folder` is no folder, may not be read, or is one that the run writes.
    """

    def __init__(
        self,
        folder: str | Path,
        argument: str,
        run_folders: Sequence[str | Path] = (),
        with_captions: bool = False,
    ):
        self.argument, self.shown = argument, str(folder)
        self.root = Path(folder).absolute()
        problem = _problem_of(self.root) if self.shown else "an empty name"
        if problem:
            raise ValueError(f"`{argument}` must be a folder with pictures, got {self.shown!r} ({problem}).")
        if not _is_unicode(str(self.root)):
            raise ValueError(f"`{argument}` must be a folder whose name is UTF-8, got {self.shown!r}.")
        self.run_folders = {_identity(each) for each in run_folders if os.path.isdir(each)}
        if _identity(self.root) in self.run_folders:
            raise ValueError(
                f"`{argument}` must be a folder that the run does not write to, got {self.shown!r}; give the output a"
                " folder of its own."
            )
        self.with_captions = with_captions
        self.left_out: dict[str, list[str]] = {}

    def leave_out(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is left out, and why."""
        self.left_out.setdefault(reason, []).append(path.relative_to(self.root).as_posix())

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """
        The pictures and the folders that lie directly in a folder, by name.

        Raises:
            ValueError: If the folder may not be read.
        """
        return self._sorted_out(folder, self._scan(folder))

    def pictures_below(self, folder: Path) -> list[Path]:
        """
        All pictures in a folder and its subfolders, by name.

        Raises:
            ValueError: If one of them may not be read.
        """
        # A link to one of these leads back to where it lies.
        enclosing = [*folder.resolve().parents] + ([self.root, folder.parent] if folder != self.root else [])
        visited = {_identity(each) for each in enclosing}
        pictures, waiting, linked = [], [folder], []
        while waiting or linked:
            current = waiting.pop() if waiting else linked.pop(0)
            with self._permission(current):
                identity = _identity(current)
            if identity in visited:
                self.leave_out(current, READ_ALREADY)
                continue
            visited.add(identity)
            entries = self._scan(current)
            if current != self.root and (identity in self.run_folders or any(map(_is_of_a_run, entries))):
                self.leave_out(current, OF_A_RUN)
                continue
            inside, folders = self._sorted_out(current, entries)
            pictures += inside
            waiting += [each for each in reversed(folders) if not os.path.islink(each)]
            linked += [each for each in folders if os.path.islink(each)]
        return sorted(pictures)

    def report(self) -> None:
        """Warn of everything that was left out, once for each reason."""
        for reason, names in self.left_out.items():
            logger.warning(f"Left out of {self.shown}, {reason} ({len(names)}): {shortened(names, 3)}.")

    def no_pictures(self, about: str = "") -> ValueError:
        """The error for a folder without a single picture, with what it has instead."""
        others = [f"{len(names)} {reason}: {shortened(names, 3)}" for reason, names in self.left_out.items()]
        return ValueError(
            f"`{self.argument}` must hold pictures (.png, .jpg, .webp and others that Pillow reads), got none in"
            f" {self.shown!r}{about} ({'; '.join(others) or 'it is empty'})."
        )

    @contextmanager
    def _permission(self, folder: Path) -> Iterator[None]:
        """Say which folder it was that could not be read."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"`{self.argument}` must be a folder that may be read with all its subfolders, got {self.shown!r}, of"
                f" which {str(folder)!r} may not ({error.strerror})."
            ) from error

    def _scan(self, folder: Path) -> list[os.DirEntry]:
        """What lies in a folder, by name."""
        with self._permission(folder), os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def _sorted_out(self, folder: Path, entries: list[os.DirEntry]) -> tuple[list[Path], list[Path]]:
        """The pictures and the folders among the entries of a folder."""
        pictures, folders = [], []
        for entry in entries:
            path, kind = folder / entry.name, _kind(entry)
            if is_hidden(entry.name):
                self.leave_out(path, HIDDEN)
            elif not _is_unicode(entry.name):
                self.leave_out(path, NOT_UNICODE)
            elif kind == "folder":
                folders.append(path)
            elif kind == "file" and self.with_captions and entry.name == METADATA_FILE:
                continue
            elif kind == "file" and path.suffix.lower() not in picture_suffixes():
                self.leave_out(path, NO_PICTURE)
            elif kind != "file" or not os.access(path, os.R_OK):
                self.leave_out(path, NOT_OPENED)
            else:
                pictures.append(path)
        return pictures, folders


@dataclass
class PictureSplit:
    """
    Pictures of a split.

    Args:
        paths (`list[Path]`): Their files, absolute.
        labels (`list[str]`, *optional*): The class of each; `None` without class folders.
    """

    paths: list[Path]
    labels: list[str] | None


@dataclass
class PictureFolder:
    """
    What a folder of pictures holds.

    Args:
        train (`PictureSplit`): The training split, with at least one picture.
        validation (`PictureSplit`, *optional*): The validation split, if there is one.
        empty_classes (`list[str]`): Folders among the classes that have no pictures, and are left out.
        notes (`list[str]`): Sentences on how the folder was understood.
    """

    train: PictureSplit
    validation: PictureSplit | None
    empty_classes: list[str]
    notes: list[str]


def read_picture_folder(
    folder: str | Path,
    argument: str = "folder",
    run_folders: Sequence[str | Path] = (),
    with_captions: bool = False,
) -> PictureFolder:
    """
    Find pictures, classes and splits of a folder by a rule that no name can bend:

    - Its subfolders are the classes; pictures in folders of a class folder belong to that class. Without subfolders
      that hold pictures there are no classes.
    - Where it has a subfolder `train` and no others with pictures but `validation`, `val`, `valid`, `dev` or `test`,
      these are splits, each with class folders or without. The first of those named is the validation split.
    - Names of files mean nothing but for their endings.

    With captions, folders other than splits mean nothing: all pictures in them are read.

    What is left out is warned of.

    Args:
        folder (`str` or `Path`): The folder.
        argument (`str`, defaults to `"folder"`): What errors call it.
        run_folders (`Sequence[str | Path]`, defaults to `()`): Folders that the run at hand writes, if they exist.
        with_captions (`bool`, defaults to `False`): Whether pictures have captions instead of classes. They are read
            elsewhere ([`~srdd.data.captions.read_captions`]).

    Returns:
        [`PictureFolder`]

    Raises:
        ValueError: If it is no folder, may not be read, is one that the run writes, or has no pictures to train on.
    """
    reader = FolderReader(folder, argument, run_folders, with_captions)
    loose_pictures, folders = reader.entries(reader.root)
    splits = _split_folders(folders)
    pictures = {each: reader.pictures_below(each) for each in folders if each not in splits.values()}
    is_split = bool(splits) and not any(pictures.values())
    notes, empty_classes, validation = [], [], None
    if is_split:
        for path in loose_pictures:
            reader.leave_out(path, BESIDE)
        for path in pictures:
            _leave_out_empty(reader, path)
        train = _read_split(reader, *reader.entries(splits.pop(TRAIN_NAME)), empty_classes, notes)
        for name in [name for name in VALIDATION_NAMES if name in splits]:
            path = splits[name]
            if validation is not None:
                reader.leave_out(path, OTHER_SPLIT)
                continue
            split = _read_split(reader, *reader.entries(path), [], notes)
            if split.paths:
                validation = split
                notes.append(f"Validation pictures are those of {path.name!r}.")
            else:
                reader.leave_out(path, WITHOUT_PICTURES)
        if train.labels is None and train.paths and not with_captions:
            notes.append(
                "There are no class folders in 'train', so pictures have no classes. For classes sort them into"
                " 'train/NAME' (and likewise in the other splits)."
            )
    else:
        pictures |= {each: reader.pictures_below(each) for each in splits.values()}
        train = _sorted_by_class(reader, loose_pictures, pictures, empty_classes, notes)
        split_like = [name for name in dict.fromkeys(train.labels or ()) if name.lower() in SPLIT_LIKE_NAMES]
        if split_like:
            notes.append(
                f"{shortened([repr(name) for name in split_like], 3)}: read as classes like the others. Splits are"
                " folders 'train' and 'validation' without other folders beside them."
            )
    if not train.paths:
        raise reader.no_pictures(", 'train'" if is_split else "")
    reader.report()
    return PictureFolder(train, validation, empty_classes, notes)


def _split_folders(folders: list[Path]) -> dict[str, Path]:
    """Folders named as splits by the names of these, if one of them is `train` and no two are the same."""
    named = [each for each in folders if each.name.lower() in (TRAIN_NAME, *VALIDATION_NAMES)]
    splits = {each.name.lower(): each for each in named}
    return splits if TRAIN_NAME in splits and len(splits) == len(named) else {}


def _read_split(
    reader: FolderReader, loose_pictures: list[Path], folders: list[Path], empty_classes: list[str], notes: list[str]
) -> PictureSplit:
    """A split, with classes if it has class folders."""
    pictures = {each: reader.pictures_below(each) for each in folders}
    return _sorted_by_class(reader, loose_pictures, pictures, empty_classes, notes)


def _sorted_by_class(
    reader: FolderReader,
    loose_pictures: list[Path],
    pictures: dict[Path, list[Path]],
    empty_classes: list[str],
    notes: list[str],
) -> PictureSplit:
    """Pictures by the order of their classes, if any of the folders that may be classes holds one."""
    if reader.with_captions:
        return PictureSplit(sorted([*loose_pictures, *chain(*pictures.values())]), None)
    for folder in [folder for folder, paths in pictures.items() if not paths]:
        if _leave_out_empty(reader, folder):
            empty_classes.append(folder.name)
    classes = sorted([folder for folder, paths in pictures.items() if paths], key=lambda each: class_order(each.name))
    if not classes:
        return PictureSplit(loose_pictures, None)
    for path in loose_pictures:
        reader.leave_out(path, BESIDE)
    paths = [(folder, path) for folder in classes for path in pictures[folder]]
    deeper = [path.relative_to(reader.root).as_posix() for folder, path in paths if path.parent != folder]
    if deeper:
        notes.append(
            f"Pictures in folders of class folders, which belong to those classes ({len(deeper)}):"
            f" {shortened(deeper, 3)}."
        )
    if len(classes) == 1 and len(deeper) == len(paths):
        notes.append(
            f"{classes[0].name!r} is the only class. If its folders are meant as classes, they must lie where it lies."
        )
    return PictureSplit([path for _, path in paths], [folder.name for folder, _ in paths])


def _leave_out_empty(reader: FolderReader, folder: Path) -> bool:
    """Leave out a folder without pictures, unless it is left out for another reason. Returns whether it was done."""
    name = folder.relative_to(reader.root).as_posix()
    if any(name in reader.left_out.get(reason, ()) for reason in (READ_ALREADY, OF_A_RUN)):
        return False
    reader.leave_out(folder, WITHOUT_PICTURES)
    return True


def _kind(entry: os.DirEntry) -> str | None:
    """`"folder"`, `"file"`, or `None` for links to nothing and what is neither."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:  # a link to itself
        return None


def _is_of_a_run(entry: os.DirEntry) -> bool:
    """Whether something is in the folders that runs write, and in no others."""
    name, _, number = entry.name.rpartition("-")
    return entry.name in RUN_FILES or (name == "checkpoint" and number.isdecimal() and _kind(entry) == "folder")


def _identity(path: str | Path) -> tuple[int, int]:
    """What tells whether two paths lead to the same file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _problem_of(folder: Path) -> str | None:
    """Why a path is no folder, if it is none."""
    try:
        return None if stat.S_ISDIR(os.stat(folder).st_mode) else "a file"
    except OSError as error:
        return error.strerror


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
