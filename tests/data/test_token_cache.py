"""The token cache: the right pyramids in the right rows, made once, and another file whenever they would differ."""

import errno
import os
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_models import SAMPLE_SIZE, tiny_vqvae
from training.launching import other_run

from srdd.data.file_locks import hold_lock
from srdd.data.images import LabelledImages, image_to_tensor, load_labelled_images
from srdd.data.token_cache import TokenDataset, cached_tokens


NUM_TOKENS = 1 + 4 + 16


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def save_pictures(root: Path, names=("pear", "apple", "quince"), images_per_class: int = 2) -> Path:
    """Noise of different sizes, so that crops and mirrorings make a difference."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            height, width = rng.integers(8, 20, size=2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def images(tmp_path) -> LabelledImages:
    return load_labelled_images(train_data_dir=str(save_pictures(tmp_path / "pictures")))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "tokens"


def make(images: LabelledImages, cache: Path, vqvae=None, **options) -> TokenDataset:
    return cached_tokens(vqvae or tiny_vqvae(), images, images.train, cache, **options)


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def one_by_one(images: LabelledImages, vqvae, flip=False, resolution=SAMPLE_SIZE, scale_sizes=None, crop=None, seed=0):
    """Pyramids of the training images without the cache, image by image."""
    rows = []
    for index, image in enumerate(images.train["image"]):
        rng = random.Random(f"{seed} {crop} {index}")
        pixels = image_to_tensor(image, resolution, random_crop=crop is not None, rng=rng)
        rows.append(vqvae.tokenize((pixels.flip(-1) if flip else pixels)[None], scale_sizes))
    return torch.cat(rows).numpy()


@torch.no_grad()
def test_rows_are_the_tokens_of_the_images_and_labels_theirs(images, cache):
    vqvae = tiny_vqvae()
    tokens = make(images, cache, vqvae)
    assert tokens.token_ids.shape == (6, NUM_TOKENS)
    assert len(tokens) == 6
    np.testing.assert_array_equal(tokens.token_ids, one_by_one(images, vqvae))
    assert len(np.unique(tokens.token_ids)) > 5
    item = tokens[3]
    assert item["token_ids"].dtype == item["conditions"]["class_labels"].dtype == torch.int64
    assert item["token_ids"].tolist() == tokens.token_ids[3].tolist()
    labels = [int(tokens[index]["conditions"]["class_labels"]) for index in range(6)]
    assert labels == images.train["label"][:]
    assert {images.id2label[int(label)] for label in tokens.labels} == {"apple", "pear", "quince"}


@torch.no_grad()
def test_a_batch_is_its_items(images, cache):
    tokens = make(images, cache)
    for item, index in zip(tokens.__getitems__([4, 0, 4]), [4, 0, 4], strict=True):
        pair = [(each["token_ids"], each["conditions"].pop("class_labels")) for each in (item, tokens[index])]
        assert item["conditions"] == {}
        for mine, alone in zip(*pair):
            assert torch.equal(mine, alone)
            assert mine.dtype == alone.dtype == torch.int64


def test_the_size_of_batches_changes_nothing(images, cache):
    vqvae = tiny_vqvae()
    whole = make(images, cache / "whole", vqvae).token_ids
    parts = make(images, cache / "parts", vqvae, batch_size=4).token_ids
    np.testing.assert_array_equal(whole, parts)
    assert files(cache / "whole")[0].name == files(cache / "parts")[0].name


@pytest.mark.parametrize(("side", "largest"), [(8, 6), (128, 4), (256, 1)])
def test_large_pictures_are_encoded_few_at_a_time(images, cache, monkeypatch, side, largest):
    monkeypatch.setattr("srdd.data.image_views.PIXELS_PER_FORWARD", 4 * 128**2)
    vqvae, seen = tiny_vqvae(), []
    vqvae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    make(images, cache, vqvae, schedules=[[[1, 1], [side // 2, side // 2]]])
    assert max(seen) == largest
    assert sum(seen) == 6


def test_workers_and_an_accelerator_change_nothing(images, cache):
    vqvae = tiny_vqvae()
    plain = make(images, cache / "plain", vqvae, batch_size=2).token_ids
    other = make(images, cache / "other", vqvae, batch_size=2, num_workers=2, accelerator=Accelerator()).token_ids
    np.testing.assert_array_equal(plain, other)


def test_the_file_is_mapped_and_small(images, cache):
    tokens = make(images, cache)
    assert isinstance(tokens.token_ids, np.memmap)
    assert tokens.token_ids.dtype == np.uint16
    assert Path(tokens.token_ids.filename) == files(cache)[0]
    assert files(cache)[0].stat().st_size == tokens.token_ids.offset + 6 * NUM_TOKENS * 2
    with pytest.raises(ValueError, match="read-only"):
        tokens.token_ids[0, 0] = 1


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_large_codebooks_get_larger_numbers(images, cache, codebook_size, dtype):
    vqvae = tiny_vqvae(codebook_size=codebook_size)
    with torch.no_grad():  # the last code is the nearest of the coarsest scale, if it alone lies where the images do
        latents = vqvae.encode(image_to_tensor(images.train[0]["image"], SAMPLE_SIZE)[None]).latents
        vqvae.quantize.codebook.weight[-1] = latents.mean(dim=(0, 2, 3))
    tokens = make(images, cache, vqvae)
    assert tokens.token_ids.dtype == dtype
    assert tokens[0]["token_ids"][0] == codebook_size - 1
    np.testing.assert_array_equal(tokens.token_ids, one_by_one(images, vqvae))


def test_a_second_call_maps_the_file_and_leaves_the_tokenizer_alone(images, cache):
    vqvae, runs = tiny_vqvae(), []
    vqvae.encoder.register_forward_hook(lambda *_: runs.append(1))
    first = make(images, cache, vqvae, random_flip=True)
    assert runs
    runs.clear()
    [path] = files(cache)
    before = path.stat().st_mtime_ns
    again = make(images, cache, vqvae, random_flip=True)
    assert not runs
    assert files(cache) == [path]
    assert path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    np.testing.assert_array_equal(first.labels, again.labels)


def test_a_half_written_file_is_never_read_but_written_anew(images, cache):
    expected = np.array(make(images, cache).token_ids)
    [path] = files(cache)
    whole = path.read_bytes()
    path.unlink()
    path.with_suffix(".partial").write_bytes(whole[:-7])
    tokens = make(images, cache)
    assert files(cache) == [path]
    np.testing.assert_array_equal(tokens.token_ids, expected)


def test_a_tokenizer_that_fails_leaves_no_cache_behind(images, cache):
    vqvae = tiny_vqvae()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = vqvae.decoder.register_forward_hook(fail)  # never called: tokens need no decoder
    handle_encoder = vqvae.encoder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(images, cache, vqvae)
    assert not list(cache.glob("*.npy"))
    handle_encoder.remove()
    np.testing.assert_array_equal(make(images, cache, vqvae).token_ids, one_by_one(images, vqvae))
    handle.remove()


def other_weights(vqvae):
    with torch.no_grad():
        vqvae.quantize.codebook.weight[0, 0] += 1e-3
    return vqvae


CHANGES = {
    "weights": {"vqvae": lambda: other_weights(tiny_vqvae())},
    "half the precision": {"vqvae": lambda: tiny_vqvae().to(torch.bfloat16)},
    "configuration": {"vqvae": lambda: tiny_vqvae(normalize_codes=True)},
    "scales": {"schedules": [[[1, 1], [4, 4]]]},
    "more scales": {"schedules": [[[1, 1], [2, 2], [4, 4]], [[1, 1], [4, 4]]]},
    "flips": {"random_flip": True},
    "crops": {"random_crops": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_tokenizer_or_preprocessing_is_another_file(images, cache, change):
    make(images, cache)
    options = dict(change)
    vqvae = options.pop("vqvae", tiny_vqvae)()
    make(images, cache, vqvae, **options)
    assert len(files(cache)) == 2


def test_another_resolution_is_another_file(images, cache):
    make(images, cache)
    # The same weights for images twice as large: the scales end at their grid.
    tokens = make(images, cache, schedules=[[[1, 1], [2, 2], [8, 8]]])
    assert len(files(cache)) == 2
    expected = one_by_one(images, tiny_vqvae(), resolution=16, scale_sizes=[1, 2, 8])
    np.testing.assert_array_equal(tokens.token_ids, expected)


@pytest.mark.parametrize(("crops", "num_files"), [(0, 1), (2, 3)])
def test_the_seed_matters_with_random_crops_only(images, cache, crops, num_files):
    for seed in (0, 1, 2, 0):
        make(images, cache, random_crops=crops, seed=seed)
    assert len(files(cache)) == num_files


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_other_images_are_another_file(tmp_path, images, cache, change):
    make(images, cache)
    folder = tmp_path / "pictures" / "pear"
    if change == "removed":
        (folder / "1.png").unlink()
    else:
        path = folder / ("2.png" if change == "added" else "1.png")
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
        os.utime(path, (2e9, 2e9))
    changed = load_labelled_images(train_data_dir=str(tmp_path / "pictures"))
    tokens = make(changed, cache)
    assert len(files(cache)) == 2
    assert len(tokens) == {"added": 7, "removed": 5, "changed": 6}[change]
    np.testing.assert_array_equal(tokens.token_ids, one_by_one(changed, tiny_vqvae()))


def test_a_part_of_the_data_is_another_file(tmp_path, images, cache):
    make(images, cache)
    folder = str(tmp_path / "pictures")
    for seed in (0, 1, 0):
        make(load_labelled_images(train_data_dir=folder, max_train_samples=4, seed=seed), cache)
    assert len(files(cache)) == 3


def test_the_same_data_loaded_anew_is_the_same_file(tmp_path, images, cache):
    make(images, cache)
    other_place = str(tmp_path / "another" / "datasets")
    again = load_labelled_images(train_data_dir=str(tmp_path / "pictures"), cache_dir=other_place)
    tokens = make(again, cache, seed=5, batch_size=3, schedules=[[[1, 1], [2, 2], [4, 4]]])
    assert len(files(cache)) == 1
    assert tokens.labels.tolist() == images.train["label"][:]


def test_the_place_of_the_tokenizer_does_not_matter(tmp_path, images, cache):
    make(images, cache)
    tiny_vqvae().save_pretrained(tmp_path / "saved")
    make(images, cache, type(tiny_vqvae()).from_pretrained(tmp_path / "saved"))
    assert len(files(cache)) == 1


@torch.no_grad()
def test_mirrored_images_follow_the_others(images, cache):
    vqvae = tiny_vqvae()
    tokens = make(images, cache, vqvae, random_flip=True)
    assert len(tokens) == 12
    np.testing.assert_array_equal(tokens.token_ids[:6], one_by_one(images, vqvae))
    np.testing.assert_array_equal(tokens.token_ids[6:], one_by_one(images, vqvae, flip=True))
    assert (tokens.token_ids[:6] != tokens.token_ids[6:]).any()
    assert tokens.labels.tolist() == images.train["label"][:] * 2


@torch.no_grad()
def test_random_crops_are_those_of_the_seed(images, cache):
    vqvae = tiny_vqvae()
    tokens = make(images, cache, vqvae, random_crops=3, random_flip=True, seed=7)
    crops = [(crop, flip) for flip in (False, True) for crop in range(3)]
    assert len(tokens) == len(crops) * 6
    for view, (crop, flip) in enumerate(crops):
        expected = one_by_one(images, vqvae, flip=flip, crop=crop, seed=7)
        np.testing.assert_array_equal(tokens.token_ids[view * 6 : view * 6 + 6], expected)
    assert (tokens.token_ids[:6] != tokens.token_ids[6:12]).any()
    assert tokens.labels.tolist() == images.train["label"][:] * 6


@torch.no_grad()
def test_fewer_scales_are_pyramids_of_their_own(images, cache):
    vqvae = tiny_vqvae()
    tokens = make(images, cache, vqvae, schedules=[[[1, 1], [4, 4]]])
    assert tokens.token_ids.shape == (6, 17)
    expected = one_by_one(images, vqvae, scale_sizes=[1, 4])
    np.testing.assert_array_equal(tokens.token_ids, expected)
    whole = one_by_one(images, vqvae)
    assert (expected[:, 1:] != whole[:, 5:]).any()


def test_images_without_labels_get_class_zero(tmp_path, cache):
    images = load_labelled_images(train_data_dir=str(save_pictures(tmp_path / "p")), label_column=None)
    assert make(images, cache, random_flip=True).labels.tolist() == [0] * 12


def test_unusable_images_have_no_row(tmp_path, cache):
    folder = save_pictures(tmp_path / "p")
    (folder / "pear" / "0.png").write_bytes(b"")
    images = load_labelled_images(train_data_dir=str(folder))
    tokens = make(images, cache)
    assert tokens.labels.tolist() == [0, 0, 1, 2, 2]
    np.testing.assert_array_equal(tokens.token_ids, one_by_one(images, tiny_vqvae()))


# Two runs, one folder


class Meanwhile:
    """A tokenizer's hook that lets another run make the same cache, once."""

    def __init__(self, images: LabelledImages, cache: Path):
        self.images, self.cache = images, cache
        self.other: TokenDataset | None = None
        self.files: list[str] = []

    def __call__(self, *_) -> None:
        if self.other is None:
            self.other = make(self.images, self.cache)
            self.files = sorted(path.suffix for path in files(self.cache))


def test_two_runs_that_make_the_same_cache_at_once_both_end_with_the_right_one(images, cache):
    vqvae, meanwhile = tiny_vqvae(), Meanwhile(images, cache)
    vqvae.encoder.register_forward_hook(meanwhile)
    tokens = make(images, cache, vqvae, batch_size=2)
    assert meanwhile.files == [".lock", ".npy", ".partial"]  # the other has left this one's alone
    expected = one_by_one(images, tiny_vqvae())
    np.testing.assert_array_equal(tokens.token_ids, expected)
    np.testing.assert_array_equal(meanwhile.other.token_ids, expected)
    assert [path.suffix for path in files(cache)] == [".npy"]


def test_a_run_that_fails_leaves_the_cache_of_another_alone(images, cache):
    vqvae, meanwhile = tiny_vqvae(), Meanwhile(images, cache)

    def fail(*_):
        meanwhile()
        raise RuntimeError("out of memory")

    vqvae.encoder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(images, cache, vqvae, batch_size=2)
    assert [path.suffix for path in files(cache)] == [".npy"]
    np.testing.assert_array_equal(make(images, cache).token_ids, one_by_one(images, tiny_vqvae()))


@pytest.mark.parametrize("killed", [True, False])
def test_what_killed_runs_left_is_removed_and_what_running_ones_write_is_not(images, cache, killed):
    expected = np.array(make(images, cache).token_ids)
    [path] = files(cache)
    path.unlink()
    left = [path.with_name(f"{path.stem}-0123.{ending}") for ending in ("lock", "partial")]
    left[1].write_bytes(b"half")
    with other_run(hold_lock, left[0]) as (process, connection):
        assert connection.recv() == "held"
        if killed:
            process.kill()
            process.join()
        np.testing.assert_array_equal(make(images, cache).token_ids, expected)
        assert files(cache) == sorted([*([] if killed else left), path])


def test_what_a_run_left_that_was_killed_with_a_whole_file_is_removed(images, cache):
    expected = np.array(make(images, cache).token_ids)
    [path] = files(cache)
    path.with_name(f"{path.stem}-0123.lock").touch()
    others = path.with_name("tokens-of-another-0123.lock")
    others.touch()
    np.testing.assert_array_equal(make(images, cache).token_ids, expected)
    assert files(cache) == sorted([others, path])


def test_where_there_are_no_locks_a_cache_is_made_with_a_warning(images, cache, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    tokens = make(images, cache)
    np.testing.assert_array_equal(tokens.token_ids, one_by_one(images, tiny_vqvae()))
    assert "The file system has no locks for" in caplog.text


@pytest.mark.parametrize("damage", ["cut off", "empty", "another shape"])
def test_a_damaged_cache_is_named(images, cache, damage):
    make(images, cache)
    [path] = files(cache)
    if damage == "another shape":
        np.save(path, np.zeros((6, 3), dtype=np.uint16))
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "cut off" else 0)
    with pytest.raises(ValueError, match=rf"The token cache '.*{path.name}' is damaged.* Delete it"):
        make(images, cache)


@pytest.mark.parametrize("folder", ["file", "file/tokens"])
def test_a_folder_that_cannot_be_written_is_named(images, tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"`cache_dir` must be a folder that can be written, got '.*{folder}'"):
        make(images, tmp_path / folder)


def test_ids_of_no_code_are_found_when_a_cache_is_read(images, cache):
    make(images, cache)
    [path] = files(cache)
    token_ids = np.load(path)
    token_ids[2, 3] = 32
    np.save(path, token_ids)
    with pytest.raises(ValueError, match=r"is damaged: its ids must lie in \[0, 31\], got \[\d+, 32\]\. Delete it"):
        make(images, cache)


# What is not finite


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["quantize.codebook.weight", "encoder.conv_in.weight"])
def test_a_tokenizer_that_is_not_finite_makes_no_tokens(images, cache, name, value):
    vqvae = tiny_vqvae()
    vqvae.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"finite weights, got NaN or infinity in 1 of \d+ tensors: {name}"):
        make(images, cache, vqvae)
    assert not cache.exists()


def test_images_whose_latents_are_not_finite_are_named(images, cache):
    vqvae = tiny_vqvae()

    def overflow(_, inputs, output):
        output[-1] = float("inf")

    vqvae.encoder.register_forward_hook(overflow)
    with pytest.raises(
        ValueError, match=r"must give finite latents, got NaN or infinity for image 3 \(.*pear.1\.png\) from the model"
    ):
        make(images, cache, vqvae, batch_size=4)
    assert files(cache) == []
