"""
Distances between sets of images, on features of them: pure functions of tensors.

All of it is computed in float64: the Fréchet distance is a small difference of large traces.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchmetrics.image.kid import poly_mmd
from tqdm.auto import tqdm


# Images whose distances to all others are computed at once.
CHUNK = 1024

# Share of the variance that rounding can leave of the distance between equal sets.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """
    What the Fréchet distance knows of a set of images: mean and covariance of their features.

    Args:
        mean (`torch.Tensor` of shape `(num_features,)`): float64.
        factor (`torch.Tensor` of shape `(num_rows, num_features)`): float64; `factor^T factor` is the covariance. It
            has no more rows than features.
    """

    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def from_features(cls, features: torch.Tensor) -> "FeatureStatistics":
        """
        Statistics of features; the covariance is the unbiased one.

        Args:
            features (`torch.Tensor` of shape `(num_images, num_features)`): At least 2 rows, finite.

        Raises:
            ValueError: If the features are not finite, or too few.
        """
        features = _check_features("features", features)
        mean = features.mean(dim=0)
        factor = (features - mean) / (len(features) - 1) ** 0.5
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(mean, factor)

    @classmethod
    def from_moments(cls, mean: torch.Tensor, covariance: torch.Tensor) -> "FeatureStatistics":
        """
        Statistics that others have published, such as `mu` and `sigma` of a reference set.

        Args:
            mean (`torch.Tensor` of shape `(num_features,)`): Mean of the features.
            covariance (`torch.Tensor` of shape `(num_features, num_features)`): Their covariance.

        Raises:
            ValueError: If shapes do not fit.
        """
        if covariance.ndim != 2 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"`covariance` must have shape {(len(mean),) * 2}, got {tuple(covariance.shape)}.")
        values, vectors = torch.linalg.eigh(covariance.double())
        # What rounding left of directions without variance must not count: its square root is not small.
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        return cls(mean.double(), (vectors[:, kept] * values[kept].sqrt()).T)


def frechet_distance(reference: FeatureStatistics | torch.Tensor, samples: FeatureStatistics | torch.Tensor) -> float:
    r"""
    Fréchet distance between two sets of images (Heusel et al. 2017, Section 3), each described by the Gaussian with
    the mean and the covariance of its features: `|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`. It is an FID on Inception's
    features only.

    With factors `S = F^T F` and `T = G^T G`, the trace of the root is the sum of the singular values of `F G^T`: real,
    no matter whether the covariances are singular, and without the digits that a square root of rounding errors costs.

    Args:
        reference ([`FeatureStatistics`] or `torch.Tensor` of shape `(num_images, num_features)`): One set.
        samples ([`FeatureStatistics`] or `torch.Tensor` of shape `(num_images, num_features)`): The other one.

    Returns:
        `float`: At least 0, and 0 for equal sets.

    Raises:
        ValueError: If features are not finite, too few, or not of the same number.
    """
    reference, samples = (
        each if isinstance(each, FeatureStatistics) else FeatureStatistics.from_features(each)
        for each in (reference, samples)
    )
    if reference.mean.shape != samples.mean.shape:
        raise ValueError(
            f"`samples` must have as many features as `reference`, {len(reference.mean)}, got {len(samples.mean)}."
        )
    root_trace = torch.linalg.svdvals(reference.factor @ samples.factor.T).sum()
    total = reference.factor.square().sum() + samples.factor.square().sum()
    spread = total - 2 * root_trace
    if spread < ROUNDING * total:
        spread = torch.zeros_like(spread)
    return ((reference.mean - samples.mean).square().sum() + spread).item()


def kernel_distance(
    reference: torch.Tensor,
    samples: torch.Tensor,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Squared maximum mean discrepancy with a polynomial kernel of degree 3 (Bińkowski et al. 2018), as torchmetrics'
    `KernelInceptionDistance`, in float64 and with the choice of subsets fixed by a seed. It is a KID on Inception's
    features only. The estimate has no bias: for sets that are alike it lies around 0, on either side.

    Args:
        reference (`torch.Tensor` of shape `(num_images, num_features)`): Features of one set.
        samples (`torch.Tensor` of shape `(num_images, num_features)`): Features of the other one.
        num_subsets (`int`, defaults to 100): How many random subsets the mean is taken over.
        subset_size (`int`, defaults to 1000): Images in a subset; no more than the smaller set has.
        seed (`int`, defaults to 0): Seed of the choice.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over subsets.

    Raises:
        ValueError: If features are not finite, too few, or not of the same number.
    """
    reference, samples = _check_pair(reference, samples)
    subset_size = min(subset_size, len(reference), len(samples))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        subsets = [each[torch.randperm(len(each), generator=generator)[:subset_size]] for each in (reference, samples)]
        values.append(poly_mmd(*subsets))
    values = torch.stack(values)
    return values.mean().item(), values.std(unbiased=False).item()


def inception_score(logits: torch.Tensor, num_splits: int = 10) -> tuple[float, float]:
    """
    Exponential of the mean divergence between the class distribution of one image and that of all (Salimans et al.
    2016). It is an IS with Inception's logits only.

    Args:
        logits (`torch.Tensor` of shape `(num_images, num_classes)`): Of drawn images.
        num_splits (`int`, defaults to 10): Parts, shuffled by a fixed seed, that are scored alone; 10 is what papers
            use.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the parts, from 1 to the number of classes.

    Raises:
        ValueError: If the logits are not finite or fewer than parts.
    """
    logits = _check_features("logits", logits)
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"`num_splits` must lie in [1, {len(logits)}], the number of images, got {num_splits}.")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for split in logits[order].log_softmax(dim=1).chunk(num_splits):
        mean = split.logsumexp(dim=0) - torch.tensor(len(split), dtype=split.dtype).log()
        scores.append((split.exp() * (split - mean)).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(unbiased=False).item()


def precision_recall_density_coverage(reference: torch.Tensor, samples: torch.Tensor, k: int = 5) -> dict[str, float]:
    """
    How far two sets overlap, each image standing for a ball that reaches to its k-th nearest neighbour in its own set.

    Args:
        reference (`torch.Tensor` of shape `(num_images, num_features)`): Features of real images.
        samples (`torch.Tensor` of shape `(num_images, num_features)`): Features of drawn images.
        k (`int`, defaults to 5): The neighbour that a ball reaches to.

    Returns:
        `dict[str, float]`: `"precision"`, the share of drawn images in some ball of real ones, and `"recall"`, the
        share of real images in some ball of drawn ones (Kynkäänniemi et al. 2019); `"density"`, the mean number of
        balls of real images that a drawn one is in, over k, and `"coverage"`, the share of real images with a drawn
        one in their ball (Naeem et al. 2020). All depend on the sizes of both sets.

    Raises:
        ValueError: If features are not finite, not of the same number, or a set has no k-th neighbours.
    """
    reference, samples = _check_pair(reference, samples)
    smallest = min(len(reference), len(samples))
    if not 1 <= k < smallest:
        raise ValueError(f"`k` must lie in [1, {smallest - 1}] for sets of {smallest} images or more, got {k}.")
    centre = reference.mean(dim=0)
    reference, samples = reference - centre, samples - centre
    # Far below what tells two images apart, far above rounding errors: equal distances must compare as equal.
    tolerance = 1e-10 * max(each.square().sum(dim=1).mean() for each in (reference, samples))
    radii, sample_radii = (_neighbour_distances(each, k) + tolerance for each in (reference, samples))
    hits = torch.zeros(len(samples), dtype=torch.long, device=samples.device)  # balls of real images a drawn one is in
    covered, recalled = [], []
    for chunk, chunk_radii in zip(reference.split(CHUNK), radii.split(CHUNK)):
        distances = _squared_distances(chunk, samples)
        inside = distances <= chunk_radii[:, None]
        hits += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((distances <= sample_radii).any(dim=1))
    return {
        "precision": (hits > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": hits.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def bootstrap_interval(
    statistic: Callable[[torch.Tensor], float],
    samples: torch.Tensor,
    num_replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
    show_progress: bool = False,
) -> tuple[float, float]:
    """
    Confidence interval of a statistic of drawn images: where its value would lie for as many other images of the same
    model.

    Replicates are random halves (Shao and Wu 1989): for a mean their spread is that of the whole set. Draws with
    replacement repeat images, which inflates Fréchet distances. The value of half as many images is biased as well,
    so the quantiles are moved: the mean of the replicates goes to the value of all images.

    Args:
        statistic (`Callable`): Takes features like `samples`, returns a number.
        samples (`torch.Tensor` of shape `(num_images, num_features)`): What is drawn from.
        num_replicates (`int`, defaults to 200): How often.
        level (`float`, defaults to 0.95): Probability of the interval.
        seed (`int`, defaults to 0): Seed of the draws.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `tuple[float, float]`: Both ends.

    Raises:
        ValueError: If `num_replicates` or `level` is out of range.
    """
    if num_replicates < 1:
        raise ValueError(f"`num_replicates` must be at least 1, got {num_replicates}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level}.")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in tqdm(range(num_replicates), desc="Bootstrap", disable=not show_progress):
        half = torch.randperm(len(samples), generator=generator)[: len(samples) // 2]
        values.append(statistic(samples[half]))
    values = torch.tensor(values, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (statistic(samples) + (values - values.mean()).quantile(tails)).tolist()
    return low, high


def _check_features(name: str, features: torch.Tensor) -> torch.Tensor:
    """The features in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"`{name}` must have shape (2 or more, num_features), got {tuple(features.shape)}.")
    if not features.isfinite().all():
        bad = (~features.isfinite()).any(dim=1).sum().item()
        raise ValueError(f"`{name}` must be finite, got NaN or infinite features for {bad} of {len(features)} images.")
    return features.double()


def _check_pair(reference: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reference, samples = _check_features("reference", reference), _check_features("samples", samples)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"`samples` must have as many features as `reference`, {reference.shape[1]}, got {samples.shape[1]}."
        )
    return reference, samples


def _squared_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.square().sum(dim=1)[:, None] + right.square().sum(dim=1) - 2 * left @ right.T


def _neighbour_distances(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each row to its k-th nearest among the others."""
    nearest = [_squared_distances(chunk, features).kthvalue(k + 1, dim=1).values for chunk in features.split(CHUNK)]
    return torch.cat(nearest)
