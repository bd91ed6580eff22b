import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from srdd.evaluation.distances import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall_density_coverage,
)
from srdd.evaluation.features import EfficientNetLite0Features


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_features(count: int, width: int = 24, seed: int = 0, shift: float = 0.0, spread: float = 1.0):
    """Correlated features, float32, whose variances span two orders of magnitude."""
    mixing = torch.randn(width, width, generator=seeded(100)) * torch.logspace(0, -1, width)
    return torch.randn(count, width, generator=seeded(seed)) @ mixing * spread + shift


def formula(first: torch.Tensor, second: torch.Tensor) -> float:
    """The definition, with scipy's root of the product of covariances."""
    first, second = first.double().numpy(), second.double().numpy()
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    mean = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return mean + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root)


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (0.3, 1.0), (0.0, 1.7), (2.0, 0.2)])
def test_frechet_distance_is_the_formula(shift, spread):
    real, samples = make_features(300), make_features(200, seed=1, shift=shift, spread=spread)
    expected = formula(real, samples)
    for arguments in ((real, samples), (samples, real), (FeatureStatistics.from_features(real), samples)):
        assert frechet_distance(*arguments) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "other"), [(10, 60), (60, 10), (10, 12)])
def test_few_images_are_no_trouble(count, other):
    real, samples = make_features(count), make_features(other, seed=1, shift=0.5)
    # The sum of the singular values of A B^T is the trace of the root of A^T A B^T B.
    rows = [(each.double() - each.double().mean(dim=0)) / (len(each) - 1) ** 0.5 for each in (real, samples)]
    spread = sum(each.square().sum() for each in rows) - 2 * torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    expected = (real.double().mean(dim=0) - samples.double().mean(dim=0)).square().sum() + spread
    assert frechet_distance(real, samples) == pytest.approx(expected.item(), rel=1e-6)
    moments = FeatureStatistics.from_moments(real.double().mean(dim=0), real.double().T.cov())
    assert frechet_distance(moments, samples) == pytest.approx(expected.item(), rel=1e-6)


def test_published_moments_of_singular_covariances_lose_no_digits():
    # Rounding leaves eigenvalues of 1e-13 in empty directions. Their roots would not be small.
    real, samples = make_features(10, width=120) * 30, make_features(200, width=120, seed=1)
    moments = FeatureStatistics.from_moments(real.double().mean(dim=0), real.double().T.cov())
    assert len(moments.factor) == 9
    assert frechet_distance(moments, samples) == pytest.approx(frechet_distance(real, samples), rel=1e-9)


def degenerate(features: torch.Tensor) -> list[torch.Tensor]:
    constant = features.clone()
    constant[:, 5:] = 3.7
    return [features, features[:2], constant, torch.zeros_like(features), features[:1].repeat(40, 1), features * 1e4]


@pytest.mark.parametrize("count", [12, 80])
def test_equal_sets_have_no_distance(count):
    for features in degenerate(make_features(count)):
        assert frechet_distance(features, features.clone()) == 0
        assert frechet_distance(FeatureStatistics.from_features(features), features) == 0
        moments = features.double().mean(dim=0), features.double().T.cov()
        assert frechet_distance(FeatureStatistics.from_moments(*moments), features) < 1e-20
        mixed = features[torch.randperm(len(features), generator=seeded(0))]
        scale = features.double().square().sum(dim=1).mean().item()
        assert 0 <= frechet_distance(features, mixed) <= 1e-20 * scale


def test_distances_are_never_negative_nor_undefined():
    sets = degenerate(make_features(30)) + degenerate(make_features(30) + 1e-7)
    for first in sets:
        for second in sets:
            assert 0 <= frechet_distance(first, second) < math.inf


def make_pictures(count: int, seed: int) -> torch.Tensor:
    """Pictures with structure at several scales, in [0, 1]."""
    parts = [
        F.interpolate(torch.randn(count, 3, side, side, generator=seeded(seed + side)), size=(32, 32), mode="bicubic")
        for side in (3, 8, 24)
    ]
    return torch.stack(parts).mul(torch.tensor([0.3, 0.15, 0.08]).view(3, 1, 1, 1, 1)).sum(dim=0).add(0.5).clamp(0, 1)


def blurred(images: torch.Tensor, width: int) -> torch.Tensor:
    return F.avg_pool2d(images, width, stride=1, padding=width // 2, count_include_pad=False)


def test_worse_pictures_are_farther_away():
    extractor = EfficientNetLite0Features()

    def features_of(images: torch.Tensor) -> torch.Tensor:
        return extractor(images.mul(255).round().to(torch.uint8))

    real, others = make_pictures(40, seed=0), make_pictures(40, seed=1000)
    noise = torch.rand(others.shape, generator=seeded(0))
    real = features_of(real)
    statistics = FeatureStatistics.from_features(real)
    sets = [others, *(blurred(others, width) for width in (3, 5, 9)), noise]
    features = [features_of(images) for images in sets]
    distances = [frechet_distance(statistics, each) for each in features]
    assert distances == sorted(set(distances))
    assert distances[-1] > 2 * distances[0]
    kernel = [kernel_distance(real, each, num_subsets=1)[0] for each in features]
    assert kernel == sorted(set(kernel))
    coverage = [precision_recall_density_coverage(real, each)["coverage"] for each in features]
    assert coverage[0] > 0.9
    assert coverage[-1] == 0


def test_factor_is_one_of_the_covariance():
    for count in (10, 40):
        factor = FeatureStatistics.from_features(make_features(count)).factor
        assert len(factor) <= 24
        torch.testing.assert_close(factor.T @ factor, make_features(count).double().T.cov())


def test_features_of_other_numbers_are_not_compared():
    with pytest.raises(ValueError, match="as many features as `reference`, 24, got 8"):
        frechet_distance(make_features(40), make_features(40, width=8))
    with pytest.raises(ValueError, match=r"`covariance` must have shape \(24, 24\), got \(8, 8\)"):
        FeatureStatistics.from_moments(torch.zeros(24), torch.eye(8))
    with pytest.raises(ValueError, match="as many features as `reference`, 24, got 8"):
        kernel_distance(make_features(40), make_features(40, width=8))


def test_features_that_are_no_numbers_are_refused():
    bad = make_features(10)
    bad[3, 2], bad[7] = math.nan, math.inf
    for function in (frechet_distance, kernel_distance, precision_recall_density_coverage):
        with pytest.raises(ValueError, match="must be finite, got NaN or infinite features for 2 of 10 images"):
            function(make_features(10), bad)
    with pytest.raises(ValueError, match=r"`features` must have shape \(2 or more, num_features\), got \(1, 24\)"):
        frechet_distance(make_features(10), make_features(1))


class Identity(torch.nn.Module):
    num_features = 24

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.filterwarnings("ignore:Metric `")
def test_kernel_distance_is_that_of_torchmetrics():
    real, samples = make_features(60), make_features(50, seed=1, shift=0.5)
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=50)
    metric.update(real[:50].double(), real=True)
    metric.update(samples.double(), real=False)
    mean, std = kernel_distance(real[:50], samples, num_subsets=3)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-5)
    assert std == pytest.approx(0, abs=1e-9)  # there is only one subset of all


def test_kernel_distance_follows_its_seed_and_has_no_bias():
    real, samples = make_features(400), make_features(400, seed=1)
    mean, std = kernel_distance(real, samples, num_subsets=20, subset_size=50)
    assert kernel_distance(real, samples, num_subsets=20, subset_size=50) == (mean, std)
    assert kernel_distance(real, samples, num_subsets=20, subset_size=50, seed=1) != (mean, std)
    assert abs(mean) < std
    farther = kernel_distance(real, make_features(400, seed=1, shift=1.0), num_subsets=20, subset_size=50)[0]
    assert farther > 5 * std


def test_inception_score_of_known_distributions():
    certain = torch.eye(8).repeat(5, 1) * 1000
    assert inception_score(certain, num_splits=1) == (pytest.approx(8), 0)
    assert inception_score(torch.zeros(30, 8)) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(certain[:1].repeat(30, 1))[0] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Metric `", "ignore:std")
def test_inception_score_is_that_of_torchmetrics():
    logits = torch.randn(40, 12, generator=seeded(0)) * 3
    metric = InceptionScore(feature=Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits, num_splits=1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-5)
    mean, std = inception_score(logits, num_splits=4)
    assert std > 0
    assert inception_score(logits, num_splits=4) == (mean, std)
    with pytest.raises(ValueError, match=r"`num_splits` must lie in \[1, 40\], the number of images, got 41"):
        inception_score(logits, num_splits=41)


def overlap(real: torch.Tensor, samples: torch.Tensor, k: int) -> dict[str, float]:
    """The definitions, ball by ball."""

    def radii(points):
        return [sorted(torch.dist(a, b).item() for b in points)[k] for a in points]

    real_radii, sample_radii = radii(real), radii(samples)
    inside = [[torch.dist(a, b).item() <= radius for b in samples] for a, radius in zip(real, real_radii)]
    inside_samples = [[torch.dist(a, b).item() <= radius for b, radius in zip(samples, sample_radii)] for a in real]
    columns = list(zip(*inside))
    return {
        "precision": sum(any(column) for column in columns) / len(samples),
        "recall": sum(any(row) for row in inside_samples) / len(real),
        "density": sum(sum(column) for column in columns) / (k * len(samples)),
        "coverage": sum(any(row) for row in inside) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_overlap_is_as_defined(k):
    real, samples = make_features(40, width=3), make_features(30, width=3, seed=1, shift=0.5, spread=0.7)
    overlaps = precision_recall_density_coverage(real, samples, k)
    assert overlaps == pytest.approx(overlap(real.double(), samples.double(), k))
    assert len({round(value, 6) for value in overlaps.values()}) > 2


def test_overlap_of_equal_and_of_distant_sets():
    features = make_features(50)
    mixed = features[torch.randperm(50, generator=seeded(0))]
    assert precision_recall_density_coverage(features, mixed, 5) == {
        "precision": 1.0,
        "recall": 1.0,
        "density": pytest.approx(6 / 5),  # an image that is in both sets counts itself
        "coverage": 1.0,
    }
    apart = precision_recall_density_coverage(features, features + 100, 5)
    assert apart == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_too_few_drawings_cover_little_though_they_are_precise():
    real = make_features(200, width=4)
    overlaps = precision_recall_density_coverage(real, real[:10] + 1e-3, 5)
    assert overlaps["precision"] == 1
    assert overlaps["coverage"] < 0.5


def test_overlap_does_not_depend_on_chunks(monkeypatch):
    real, samples = make_features(50), make_features(40, seed=1)
    whole = precision_recall_density_coverage(real, samples)
    monkeypatch.setattr("srdd.evaluation.distances.CHUNK", 7)
    assert precision_recall_density_coverage(real, samples) == whole


def test_copies_are_not_lost_to_rounding():
    # The ball of an image with k copies has no radius, and yet the image is in it.
    features = make_features(23, width=300).repeat(3, 1) + 5
    overlaps = precision_recall_density_coverage(features, features[torch.randperm(69, generator=seeded(0))], 2)
    assert overlaps == {"precision": 1.0, "recall": 1.0, "density": 1.5, "coverage": 1.0}


def test_neighbours_must_exist():
    with pytest.raises(ValueError, match=r"`k` must lie in \[1, 5\] for sets of 6 images or more, got 6"):
        precision_recall_density_coverage(make_features(20), make_features(6), 6)


def test_interval_of_a_mean_is_that_of_theory():
    values = torch.randn(400, 1, generator=seeded(0)).double()
    low, high = bootstrap_interval(lambda replicate: replicate.mean().item(), values, num_replicates=1000)
    half = 1.96 * values.std().item() / 400**0.5
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_interval_of_the_frechet_distance_covers_other_images_of_the_model():
    # Draws with replacement make sets that are farther away: their quantiles do not even hold the value itself, and
    # with few images they are twice as far apart as values of other images.
    statistics = FeatureStatistics.from_features(make_features(2000, width=64))
    sets = [make_features(60, width=64, seed=seed, spread=1.2) for seed in range(1, 41)]
    values = [frechet_distance(statistics, each) for each in sets]
    expected, covered, widths = sum(values) / len(values), 0, []
    for value, samples in zip(values[:20], sets):
        low, high = bootstrap_interval(lambda replicate: frechet_distance(statistics, replicate), samples, 50)
        assert low < value < high
        covered += low <= expected <= high
        widths.append(high - low)
    assert covered >= 18
    assert sum(widths) / len(widths) < 1.5 * 3.92 * torch.tensor(values).std().item()


def test_interval_follows_its_seed_and_level():
    values = torch.randn(50, 1, generator=seeded(0))

    def interval(**options):
        return bootstrap_interval(lambda replicate: replicate.mean().item(), values, 50, **options)

    assert interval() == interval()
    assert interval(seed=1) != interval()
    assert interval(level=0.5)[0] > interval()[0]
    for options, message in (
        ({"num_replicates": 0}, "`num_replicates` must be at least 1, got 0"),
        ({"level": 95}, r"`level` must lie in \(0, 1\), got 95"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(lambda replicate: 0.0, values, **options)
