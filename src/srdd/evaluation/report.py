"""Numbers of an evaluation, with all that one must know to compare them with others."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from srdd.evaluation.distances import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall_density_coverage,
)
from srdd.evaluation.feature_cache import CollectedImages
from srdd.evaluation.features import FeatureExtractor
from srdd.evaluation.image_sources import FolderImages
from srdd.evaluation.paired_metrics import pair_metrics
from srdd.evaluation.real_images import real_against_real
from srdd.evaluation.tables import markdown_table, readable


logger = logging.get_logger(__name__)

# At most: sets of fewer images have fewer parts and smaller subsets.
NUM_NEIGHBOURS, NUM_SPLITS, NUM_SUBSETS, SUBSET_SIZE = 5, 10, 100, 1000

# From here on precision is no praise: real images themselves rarely reach it.
FLATTERING_PRECISION = 0.99

METRIC_SETTINGS = {
    "neighbours": NUM_NEIGHBOURS,
    "score_splits": NUM_SPLITS,
    "kernel_subsets": NUM_SUBSETS,
    "kernel_subset_size": f"{SUBSET_SIZE}, or half of the smaller set",
}


def compare(
    reference: CollectedImages,
    samples: CollectedImages,
    extractors: Sequence[FeatureExtractor],
    num_bootstrap: int = 200,
    show_progress: bool = False,
    others: CollectedImages | None = None,
    inception_statistics: FeatureStatistics | None = None,
) -> dict[str, dict[str, Any]]:
    """
    All metrics of drawn images under every extractor, by names that carry the extractor's. Distances have those of
    real images to real images beside them ([`~srdd.evaluation.real_images`]).

    Args:
        reference ([`CollectedImages`]): Real images.
        samples ([`CollectedImages`]): Drawn ones.
        extractors (`Sequence[FeatureExtractor]`): What looked at both.
        num_bootstrap (`int`, defaults to 200): Replicates of the interval of the Fréchet distance; 0 gives none.
        show_progress (`bool`, defaults to `False`): Show a progress bar.
        others ([`CollectedImages`], *optional*): Real images that are not in the reference, as many as were drawn; by
            default a part of the reference stands for drawn images.
        inception_statistics ([`FeatureStatistics`], *optional*): Mean and covariance that come with the reference, for
            the Fréchet distance on Inception's features; extractors that are not that network take the reference's
            images and say so.

    Returns:
        `dict[str, dict]`: `"value"` of each metric, and `"interval"` (95 %) or `"std"` (over subsets or parts).
        Distances have `"real"`, a dictionary with the `"value"` of real images, `"count"`, the number of them that
        stand for drawn ones, and `"reference_count"`, of those that they are compared with.

    Raises:
        ValueError: If there are fewer than 6 images of either kind.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for extractor in extractors:
        real, fake = reference.features[extractor.name], samples.features[extractor.name]
        pair = real_against_real(real, None if others is None else others.features[extractor.name], len(fake))
        sizes = {"count": len(pair[1]), "reference_count": len(pair[0])}
        statistics = _statistics(real, extractor, inception_statistics)
        distance = {"value": frechet_distance(statistics, fake)}
        if num_bootstrap:
            low, high = bootstrap_interval(
                lambda features, statistics=statistics: frechet_distance(statistics, features),
                fake,
                num_bootstrap,
                show_progress=show_progress,
            )
            distance["interval"] = [max(0.0, low), high]
        metrics[extractor.distance_name] = {**distance, "real": {"value": frechet_distance(*pair), **sizes}}
        mean, std = _kernel_distance(real, fake)
        between_real = {"value": _kernel_distance(*pair)[0], **sizes}
        metrics[extractor.kernel_distance_name] = {"value": mean, "std": std, "real": between_real}
        if extractor.has_logits:
            logits = samples.logits[extractor.name]
            mean, std = inception_score(logits, min(NUM_SPLITS, len(logits)))
            metrics[extractor.score_name] = {"value": mean, "std": std}
        overlap = precision_recall_density_coverage(real, fake, NUM_NEIGHBOURS)
        _warn_of_flattery(extractor, min(len(real), len(fake)), overlap["precision"])
        metrics |= {f"{name} ({extractor.name})": {"value": value} for name, value in overlap.items()}
    return metrics


def _warn_of_flattery(extractor: FeatureExtractor, num_images: int, precision: float) -> None:
    """Say where numbers look better than they are."""
    if num_images < 2 * SUBSET_SIZE:
        logger.warning(
            f"The ± of {extractor.kernel_distance_name} is over subsets of only {num_images // 2:,} images, which"
            " share most of them: it tells no more than the distance of real images beside it."
        )
    if precision >= FLATTERING_PRECISION:
        logger.warning(
            f"precision ({extractor.name}) is {precision:.2f}: pictures that are all alike, or blobs in the middle of"
            " the real ones, reach that too. Recall, coverage and the pictures themselves tell."
        )


def _kernel_distance(reference: torch.Tensor, samples: torch.Tensor) -> tuple[float, float]:
    """
    Mean and deviation over subsets of half of the images at most. Subsets of all images would be the same ones, and
    their deviation nothing; of half of them it is the error of the mean over all.
    """
    subset_size = max(2, min(SUBSET_SIZE, len(reference) // 2, len(samples) // 2))
    return kernel_distance(reference, samples, NUM_SUBSETS, subset_size)


def _statistics(
    features: torch.Tensor, extractor: FeatureExtractor, inception_statistics: FeatureStatistics | None
) -> FeatureStatistics:
    """What the reference is for the Fréchet distance: statistics that came with it where they are of this network."""
    if inception_statistics is not None and extractor.is_published_inception:
        return inception_statistics
    if inception_statistics is not None:
        logger.warning(
            f"The reference's own 'mu' and 'sigma' are of Inception, not of {extractor.name}:"
            f" {extractor.distance_name} compares with its {len(features):,} images. `--features inception` uses them."
        )
    return FeatureStatistics.from_features(features)


def check_pairs(images: FolderImages, references: FolderImages) -> None:
    """
    Raises:
        ValueError: If two folders do not hold pictures of the same names, or one of them two of a name.
    """
    for name, folder in (("images", images), ("references", references)):
        twice = sorted(each for each, count in Counter(folder.names()).items() if count > 1)
        if twice:
            raise ValueError(
                f"`{name}` must hold one picture of each name, whatever its ending, got several of {twice[:3]}."
            )
    unpaired = sorted(set(images.names()) ^ set(references.names()))
    if unpaired:
        raise ValueError(f"`references` must hold pictures of the same names, got {unpaired[:3]} in one folder only.")


def compare_pairs(
    images: FolderImages,
    references: FolderImages,
    lpips: torch.nn.Module | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_bootstrap: int = 200,
    show_progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Means of the metrics of pairs, of pictures with equal names in two folders.

    Args:
        images ([`FolderImages`]): The pictures to be measured.
        references ([`FolderImages`]): What they should be.
        lpips (`torch.nn.Module`, *optional*): What [`~srdd.evaluation.paired_metrics.load_lpips`] returns.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where they are compared.
        batch_size (`int`, defaults to 64): Pairs at once.
        num_bootstrap (`int`, defaults to 200): Replicates of the intervals; 0 gives none.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `dict[str, dict]`: `"value"` of each metric and `"interval"` (95 %).

    Raises:
        ValueError: If the folders do not hold pictures of the same names.
    """
    check_pairs(images, references)
    starts = tqdm(range(0, images.count, batch_size), desc="Pairs", disable=not show_progress)
    of_batches = []
    for start in starts:
        batch = range(start, min(start + batch_size, images.count))
        pixels, wanted = (each.read(batch).to(device) / 255 for each in (images, references))
        of_batches.append(pair_metrics(pixels, wanted, lpips))
    names = {"psnr": "PSNR", "ssim": "SSIM", "perceptual_distance": "perceptual distance (efficientnet-lite0)"}
    metrics = {}
    for key in of_batches[0]:
        values = torch.cat([metrics_of_batch[key] for metrics_of_batch in of_batches]).double().cpu()
        metric = {"value": values.mean().item()}
        if num_bootstrap and values.isfinite().all() and len(values) > 1:
            interval = bootstrap_interval(lambda replicate: replicate.mean().item(), values, num_bootstrap)
            metric["interval"] = list(interval)
        metrics[names.get(key, "LPIPS")] = metric
    return metrics


def report_tables(report: dict[str, Any]) -> str:
    """
    A report as two Markdown tables. What distances are between real images stands beside them, with the numbers of
    images where these are other ones.

    Args:
        report (`dict`): `"settings"` by name, and `"metrics"` as [`compare`] returns them.

    Returns:
        `str`: Ends with a newline.
    """
    counts = tuple(report["settings"].get(name, {}).get("count") for name in ("samples", "reference"))
    lines = []
    for name, metric in report["metrics"].items():
        spread = ""
        if "interval" in metric:
            spread = "95 %: " + " to ".join(readable(end) for end in metric["interval"])
        elif "std" in metric:
            spread = f"± {readable(metric['std'])}"
        lines.append((name, readable(metric["value"]), spread, _between_real(metric.get("real"), counts)))
    settings = [(name, readable(value)) for name, value in _flat(report["settings"])]
    metrics = markdown_table(["metric", "value", "", "between real images"], lines)
    return metrics + "\n" + markdown_table(["setting", "value"], settings)


def _between_real(real: dict[str, Any] | None, counts: tuple[int | None, int | None]) -> str:
    if real is None:
        return ""
    sizes = real["count"], real["reference_count"]
    return readable(real["value"]) + (f" ({sizes[0]:,} against {sizes[1]:,})" if sizes != counts else "")


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings without nesting, by names that say where they were."""
    flat = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name} ")
        else:
            flat.append((prefix + name.replace("_", " "), value))
    return flat
