"""Many images in one file, as OpenAI's evaluator has them."""

import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from srdd.evaluation.distances import FeatureStatistics, frechet_distance
from srdd.evaluation.image_sources import open_pictures
from srdd.evaluation.npz_images import NpzImages, save_npz


def noise(count: int, side: int = 4) -> torch.Tensor:
    """uint8 images `(count, 3, side, side)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def as_array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_images_are_written_as_numpy_and_the_evaluator_read_them(tmp_path):
    images = noise(7)
    save_npz(tmp_path / "new" / "samples.npz", images.split(3), 7)
    with np.load(tmp_path / "new" / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].flags.c_contiguous
        np.testing.assert_array_equal(file["arr_0"], as_array(images))
    # The evaluator reads the header by itself, and the pixels without the rest of the file.
    with zipfile.ZipFile(tmp_path / "new" / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert archive.testzip() is None
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((7, 4, 4, 3), False, np.dtype(np.uint8))
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED
    # Sizes have eight bytes, in the first header as well: 50,000 images of 256 pixels do not fit four.
    first_header = (tmp_path / "new" / "samples.npz").read_bytes()[:30]
    assert (first_header[18:22], int.from_bytes(first_header[28:30], "little")) == (b"\xff" * 4, 20)


def peak_bytes(call) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressed", [False, True])
def test_few_images_are_in_memory_at_a_time(tmp_path, compressed):
    path, batch = tmp_path / "many.npz", noise(4, 128)  # 192 KiB
    assert peak_bytes(lambda: save_npz(path, (batch for _ in range(64)), 256)) < 3 * batch.numel()
    if compressed:
        with np.load(path) as file:
            np.savez_compressed(path, arr_0=file["arr_0"])
    source = NpzImages(path)

    def read_all():
        for start in range(0, 256, 4):
            assert torch.equal(source.read(range(start, start + 4)), batch)

    assert peak_bytes(read_all) < 16 * batch.numel()  # of 64; zipfile has buffers of 1 MiB


@pytest.mark.parametrize("broken", ["stopped", "few", "many", "other size", "floats"])
def test_what_is_stopped_leaves_what_was_there(tmp_path, broken):
    def batches():
        yield noise(2)
        if broken == "stopped":
            raise KeyboardInterrupt("stopped")
        if broken != "few":
            yield {"many": noise(3), "other size": noise(2, 5), "floats": noise(2).float()}[broken]

    for before in ([], ["samples.npz"]):
        with pytest.raises((KeyboardInterrupt, ValueError), match="`batches` must hold|stopped"):
            save_npz(tmp_path / "samples.npz", batches(), 4)
        assert [path.name for path in tmp_path.iterdir()] == before
        save_npz(tmp_path / "samples.npz", [noise(4)], 4)
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], as_array(noise(4)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_order(tmp_path, save):
    images = noise(9)
    save(tmp_path / "a.npz", arr_0=as_array(images))
    source = open_pictures(tmp_path / "a.npz", resolution=4)
    assert (source.count, source.resolution) == (9, 4)
    for indices in (range(5, 9), range(0, 2), range(8, 9), range(9)):
        assert torch.equal(source.read(indices), images[indices.start : indices.stop])
    assert source.read(range(1)).dtype == torch.uint8


def test_a_choice_is_always_the_same_and_leaves_the_others(tmp_path):
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 4, 4)
    save_npz(tmp_path / "a.npz", [images], 9)

    def numbers(source) -> list[int]:
        return source.read(range(source.count))[:, 0, 0, 0].tolist()

    some = NpzImages(tmp_path / "a.npz", count=4)
    assert numbers(some) == numbers(NpzImages(tmp_path / "a.npz", count=4)) == sorted(numbers(some))
    others = some.others(100)
    assert sorted(numbers(some) + numbers(others)) == list(range(9))
    assert numbers(some.others(3)) == sorted(set(numbers(some.others(3))) & set(numbers(others)))
    assert some.others(3).count == 3
    keys = [str(source.key) for source in (some, others, some.others(3), NpzImages(tmp_path / "a.npz"))]
    assert len(set(keys)) == 4
    assert NpzImages(tmp_path / "a.npz").others(3) is None


def test_other_files_are_refused(tmp_path):
    def read(name: str, **options):
        source = open_pictures(tmp_path / name, argument="reference_dir", **options)
        source.read(range(source.count))

    def check(match: str, name: str = "a.npz", **options):
        with pytest.raises(ValueError, match=match):
            read(name, **options)

    check(r"`reference_dir` must be an npz that can be read, got '.*gone.npz' \(FileNotFoundError", "gone.npz")
    (tmp_path / "a.npz").write_text("text")
    check(r"`reference_dir` must be an npz that can be read, got '.*a.npz' \(BadZipFile")
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    check(r"must hold images, the array 'arr_0', got \['mu.npy', 'sigma.npy'\] in .* Statistics alone .* one network")
    for array in (
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 5, 3), np.uint8),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)),
        np.array([None]),
    ):
        np.savez(tmp_path / "a.npz", arr_0=array)
        check(r"`reference_dir` must hold square images, 'arr_0' of shape \(num_images, side, side, 3\) and uint8")
    save_npz(tmp_path / "a.npz", [noise(2)], 2)
    check("`reference_dir` must hold pictures of 8x8 pixels, got 4x4 in .*a.npz", resolution=8)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:100])
    check("`reference_dir` must be an npz that can be read")
    np.savez_compressed(tmp_path / "a.npz", arr_0=as_array(noise(50)))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[500:600] = b"\xff" * 100
    (tmp_path / "a.npz").write_bytes(content)
    check("`reference_dir` must be an npz that can be read")
    check("`reference_dir` must be a folder with pictures", "gone")


def test_statistics_come_with_the_images(tmp_path):
    features = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = {"mu": features.mean(dim=0).numpy(), "sigma": features.T.cov().numpy()}
    np.savez(tmp_path / "with.npz", arr_0=as_array(noise(3)), **moments)
    np.savez(tmp_path / "without.npz", arr_0=as_array(noise(3)), mu=moments["mu"])
    statistics = NpzImages(tmp_path / "with.npz").inception_statistics
    assert frechet_distance(statistics, FeatureStatistics.from_features(features)) < 1e-9
    assert NpzImages(tmp_path / "without.npz").inception_statistics is None
    np.savez(tmp_path / "wrong.npz", arr_0=as_array(noise(3)), mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"must be an npz that can be read, .* `covariance` must have shape \(3, 3\)"):
        NpzImages(tmp_path / "wrong.npz").inception_statistics  # noqa: B018
