"""Distances between real images stand beside those of drawn ones."""

import pytest
import torch
from PIL import Image
from training.launching import make_image_folder

from srdd.data.images import LabelledImages, load_labelled_images
from srdd.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from srdd.evaluation.feature_cache import CollectedImages
from srdd.evaluation.features import FeatureExtractor
from srdd.evaluation.image_sources import DataSetImages, FolderImages
from srdd.evaluation.real_images import other_real_images, real_against_real
from srdd.evaluation.report import compare, report_tables


class MeanColours(FeatureExtractor):
    """Features of an image that can be computed by hand."""

    name = "mean colours"


class PublishedMeanColours(MeanColours):
    is_published_inception = True


def features(count: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + mean


def collected(values: torch.Tensor) -> CollectedImages:
    return CollectedImages({"mean colours": values}, {}, "0" * 12, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> LabelledImages:
    root = tmp_path_factory.mktemp("data")
    make_image_folder(root / "images")
    images = load_labelled_images(train_data_dir=str(root / "images"), cache_dir=str(root / "datasets"))
    train, validation = images.train.select(range(16)), images.train.select(range(16, 24))
    return LabelledImages(train, validation, images.image_column, images.label_column, images.id2label)


def pixels(source) -> set[bytes]:
    return {image.numpy().tobytes() for image in source.read(range(source.count))}


def test_training_images_are_compared_with_validation_images(data):
    reference = DataSetImages(data, "validation", 100, 16)
    others = other_real_images(reference, 10)
    assert others.count == 10
    assert pixels(others) <= pixels(DataSetImages(data, "train", 100, 16))
    assert not pixels(others) & pixels(reference)
    # Features of training images are shared with an evaluation that has them for its reference.
    assert others.key == DataSetImages(data, "train", 3, 16).key
    assert other_real_images(reference, 100).count == 16  # all there are, more than half of the reference


def test_images_of_the_same_split_are_others_than_the_reference(data):
    alone = LabelledImages(data.train, None, data.image_column, data.label_column, data.id2label)
    reference = DataSetImages(alone, "train", 6, 16)
    others = other_real_images(reference, 10)
    assert others.count == 10
    assert not pixels(others) & pixels(reference)
    assert len(pixels(others) | pixels(reference)) == 16
    assert others.key != reference.key
    # Four are left, and a half of the reference is six; all are in the reference.
    assert other_real_images(DataSetImages(alone, "train", 12, 16), 10) is None
    assert other_real_images(DataSetImages(alone, "train", 12, 16), 4).count == 4
    assert other_real_images(DataSetImages(alone, "train", 16, 16), 4) is None


def test_pictures_of_a_folder_are_others_than_the_reference(tmp_path):
    for index in range(10):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    reference = FolderImages(tmp_path, 6)
    others = other_real_images(reference, 4)
    assert sorted(reference.names() + others.names()) == [str(index) for index in range(10)]
    assert others.read(range(4))[:, 0, 0, 0].tolist() == [int(name) for name in others.names()]
    assert other_real_images(FolderImages(tmp_path), 4) is None


def test_a_part_of_the_reference_stands_for_drawn_images():
    real, others = features(100), features(30, seed=1)
    assert real_against_real(real, others, 30) == (real, others)
    for count, expected in ((30, 30), (50, 50), (500, 50)):
        rest, held_out = real_against_real(real, None, count)
        assert (len(rest), len(held_out)) == (100 - expected, expected)
        assert torch.equal(torch.cat([rest, held_out]).sort(dim=0).values, real.sort(dim=0).values)
    assert torch.equal(real_against_real(real, None, 30)[1], real_against_real(real, None, 30)[1])


def test_every_distance_stands_beside_that_of_real_images():
    real, drawn, others = features(300), features(200, mean=0.5, seed=1), features(200, seed=2)
    metrics = compare(collected(real), collected(drawn), [MeanColours()], 0, others=collected(others))
    distance, kernel = metrics["FD (mean colours)"], metrics["KD (mean colours)"]
    sizes = {"count": 200, "reference_count": 300}
    assert distance["real"] == {"value": frechet_distance(real, others), **sizes}
    assert kernel["real"] == {"value": kernel_distance(real, others, 100, 100)[0], **sizes}
    assert distance["real"]["value"] < distance["value"] / 5
    assert kernel["real"]["value"] < kernel["value"] / 5
    assert all("real" not in metric for name, metric in metrics.items() if "D (" not in name)
    settings = {"samples": {"count": 200}, "reference": {"count": 300}}
    lines = report_tables({"metrics": metrics, "settings": settings}).splitlines()
    assert lines[0] == "| metric | value |  | between real images |"
    assert lines[2].endswith(f"|  | {distance['real']['value']:.4g} |")
    # Other numbers of images are said.
    metrics = compare(collected(real), collected(drawn), [MeanColours()], 0)
    assert metrics["FD (mean colours)"]["real"]["count"] == 150
    line = report_tables({"metrics": metrics, "settings": settings}).splitlines()[2]
    assert line.endswith(f" {metrics['FD (mean colours)']['real']['value']:.4g} (150 against 150) |")


def test_the_spread_of_a_kernel_distance_is_that_of_other_images():
    # With subsets of all images it would be 0.
    def of(seed):
        real, drawn = features(100, seed=seed), features(100, mean=0.3, seed=seed + 1000)
        return compare(collected(real), collected(drawn), [MeanColours()], 0)["KD (mean colours)"]

    metrics = [of(seed) for seed in range(24)]
    error = torch.tensor([metric["value"] for metric in metrics]).std().item()
    spread = torch.tensor([metric["std"] for metric in metrics]).mean().item()
    assert 0.6 < spread / error < 1.6


def test_numbers_that_flatter_are_said_to_do_so(caplog):
    real, blobs = features(2000), features(2000, seed=1) / 10
    metrics = compare(collected(real), collected(blobs), [MeanColours()], 0)
    assert metrics["precision (mean colours)"]["value"] > 0.99 > 0.1 > metrics["recall (mean colours)"]["value"]
    assert [record.getMessage()[:34] for record in caplog.records] == ["precision (mean colours) is 1.00: "]
    caplog.clear()
    compare(collected(real), collected(features(1998, mean=0.5)), [MeanColours()], 0)
    assert [record.getMessage()[:25] for record in caplog.records] == ["The ± of KD (mean colours"]
    assert "subsets of only 999 images" in caplog.text


def test_statistics_of_inception_are_for_inception_alone(caplog):
    published, real, drawn = features(1000, mean=1.0, seed=5), features(300), features(200, mean=1.0, seed=1)
    statistics = FeatureStatistics.from_features(published)
    options = {"num_bootstrap": 0, "inception_statistics": statistics}
    metrics = compare(collected(real), collected(drawn), [PublishedMeanColours()], **options)
    assert metrics["FD (mean colours)"]["value"] == frechet_distance(published, drawn) < 0.1
    assert "'mu' and 'sigma'" not in caplog.text
    caplog.clear()
    metrics = compare(collected(real), collected(drawn), [MeanColours()], **options)
    assert metrics["FD (mean colours)"]["value"] == frechet_distance(real, drawn) > 1
    record = caplog.records[0]
    assert (
        "'mu' and 'sigma' are of Inception, not of mean colours: FD (mean colours) compares with its 300 images"
        in (record.getMessage())
    )
