"""The cells of ablation tables: what is drawn, edited or scored, and the numbers that come of it."""

import math
import statistics
import time
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from srdd.evaluation.ablations import NO_MODEL, AblationRow, AblationTable
from srdd.evaluation.distances import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from srdd.evaluation.editing_tasks import edit, fill, given_pixels
from srdd.evaluation.figures import spread
from srdd.evaluation.image_sources import PipelineImages, RealImages
from srdd.evaluation.latent_diffusion import DrawingPipeline
from srdd.evaluation.likelihood import log_likelihood
from srdd.evaluation.paired_metrics import pair_metrics
from srdd.evaluation.real_images import other_real_images, real_against_real
from srdd.evaluation.signal_to_noise import signal_to_noise
from srdd.scales import num_tokens_per_scale


# Pictures in a row that shows what a model draws.
NUM_EXAMPLES = 10


class AblationCells:
    """
    Measures cells.

    Args:
        pipelines (`dict[str, DrawingPipeline]`): The models by name, all of one image size.
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`): Held-out images in [0, 1].
        labels (`list[int]`, *optional*): Their classes.
        extractor (`torch.nn.Module`): Features of uint8 images ([`~srdd.evaluation.features.load_features`]).
        reference ([`DataSetImages`]): Those of the held-out images that drawn ones are compared with, the first.
        batch_size (`int`): Images drawn at once.
        num_bootstrap (`int`): Replicates of the confidence intervals.
    """

    def __init__(
        self,
        pipelines: dict[str, DrawingPipeline],
        images: torch.Tensor,
        labels: list[int] | None,
        extractor: torch.nn.Module,
        reference: RealImages,
        batch_size: int,
        num_bootstrap: int,
    ):
        self.pipelines = pipelines
        self.images = images
        self.labels = labels
        self.extractor = extractor
        self.batch_size = batch_size
        self.num_bootstrap = num_bootstrap
        self.device = next(iter(pipelines.values())).device
        self._last: tuple[AblationRow, DrawingPipeline] | None = None
        self.features = self.features_of(images)
        self.reference = reference
        self.reference_features = self.features[: reference.count]
        self.reference_statistics = FeatureStatistics.from_features(self.reference_features)

    def measure(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """The numbers of one cell."""
        measures = {
            "samples": self.samples,
            "editing": self.editing,
            "likelihood": self.likelihood,
            "signal_to_noise": self.signal_to_noise,
        }
        return measures[table.kind](table, table.row_of(row, column), column)

    @torch.no_grad()
    def features_of(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images, uint8 or in [0, 1] and then rounded as a PNG rounds them."""
        pixels = images.mul(255).round().to(torch.uint8) if images.is_floating_point() else images
        return torch.cat([self.extractor(batch.to(self.device)).cpu() for batch in pixels.split(64)])

    def pipeline(self, row: AblationRow) -> DrawingPipeline:
        """The pipeline of a row. The last one is kept: int8 takes time to prepare."""
        if self._last is None or self._last[0] != row:
            self._last = row, row.changes.pipeline(self.pipelines[row.model])
        return self._last[1]

    def batches(self, table: AblationTable, description: str) -> Iterable[slice]:
        """The images of a table, a batch at a time, under a progress bar."""
        starts = range(0, table.num_images, self.batch_size)
        batches = [slice(start, min(start + self.batch_size, table.num_images)) for start in starts]
        return tqdm(batches, desc=f"{table.name}, {description}")

    def samples(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Distances of drawn images, of all classes alike, to the held-out ones."""
        seed = int(column.removeprefix("seed "))
        pipe = self.pipeline(row)
        source = PipelineImages(pipe, table.num_images, row.changes.guidance_scale, seed)
        started = time.perf_counter()
        batches = self.batches(table, f"{row.name}, {column}")
        images = torch.cat([source.read(range(batch.start, batch.stop)) for batch in batches])
        seconds = time.perf_counter() - started
        features = self.features_of(images)
        distances = self.distances(features, self.reference_features, self.reference_statistics)
        return {**distances, "seconds_per_image": seconds / table.num_images}

    def real_images(self, table: AblationTable) -> dict[str, float]:
        """What the distances of a table are for as many real images; for others also the numbers of images."""
        others = other_real_images(self.reference, table.num_images)
        if others is not None:
            starts = range(0, others.count, 64)
            batches = [others.read(range(start, min(start + 64, others.count))) for start in starts]
            others = self.features_of(torch.cat(batches))
        reference, features = real_against_real(self.reference_features, others, table.num_images)
        distances = self.distances(features, reference, FeatureStatistics.from_features(reference))
        sizes = len(features), len(reference)
        if sizes == (table.num_images, self.reference.count):
            return distances
        return {**distances, "num_images": sizes[0], "num_reference_images": sizes[1]}

    def distances(
        self, features: torch.Tensor, reference: torch.Tensor, statistics: FeatureStatistics
    ) -> dict[str, float]:
        """Distances of features to those of a reference, whose statistics are given."""
        low, high = bootstrap_interval(
            lambda replicate: frechet_distance(statistics, replicate), features, self.num_bootstrap
        )
        return {
            "frechet_distance": frechet_distance(statistics, features),
            "frechet_distance_interval": [low, high],
            "kernel_distance": kernel_distance(reference, features)[0],
            **precision_recall_density_coverage(reference[:1024], features),
        }

    def pictures(self, table: AblationTable) -> list[torch.Tensor]:
        """
        Rows of pictures in [0, 1] for tables that draw: ten classes spread over all, for each row of a table of drawn
        images; for each task of an editing table originals, what is given and the results of all rows, for the first
        held-out images.
        """
        if table.kind == "samples":
            return [self.examples(table.row_of(row, table.columns[0])) for row in table.rows]
        shown = slice(0, 2)
        return [
            torch.stack(
                [
                    self.images[shown],
                    given_pixels(task, self.images[shown], [0, 1]),
                    *(self.edited(row, task, shown) for row in table.rows),
                ],
                dim=1,
            ).flatten(0, 1)
            for task in table.tasks
        ]

    def examples(self, row: AblationRow) -> torch.Tensor:
        """Drawn images of classes that are spread over all."""
        pipe = self.pipeline(row)
        num_classes = pipe.num_classes
        return pipe(
            spread(NUM_EXAMPLES, num_classes) if num_classes else None,
            num_images_per_prompt=1 if num_classes else NUM_EXAMPLES,
            guidance_scale=row.changes.guidance_scale,
            generator=[torch.Generator().manual_seed(index) for index in range(NUM_EXAMPLES)],
            output_type="pt",
        ).images.cpu()

    def edited(self, row: AblationRow, task: str, batch: slice) -> torch.Tensor:
        """Results of an editing task for some of the held-out images."""
        images, seeds = self.images[batch], list(range(len(self.images)))[batch]
        if row.model == NO_MODEL:
            return fill(task, images, seeds, **row.options)
        pipe = self.pipeline(row)
        guidance_scale = row.changes.guidance_scale
        images = images.to(self.device)
        return edit(pipe, task, images, self.labels_of(batch), seeds, guidance_scale, **row.options).cpu()

    def labels_of(self, batch: slice) -> list[int] | None:
        """Classes of some of the held-out images, if they have any."""
        return None if self.labels is None else self.labels[batch]

    def editing(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Likeness of edited images to the held-out images that they were made from, all pixels counted."""
        started = time.perf_counter()
        batches = self.batches(table, f"{row.name}, {column}")
        results = torch.cat([self.edited(row, column, batch) for batch in batches])
        seconds = time.perf_counter() - started
        results = results.mul(255).round().div(255)
        pairs = pair_metrics(results, self.images[: table.num_images])
        distances = pairs["perceptual_distance"].tolist()
        return {
            **{name: values.mean().item() for name, values in pairs.items()},
            "perceptual_distance_error": statistics.stdev(distances) / len(distances) ** 0.5,
            "frechet_distance": frechet_distance(self.features[: table.num_images], self.features_of(results)),
            "seconds_per_image": seconds / len(distances),
        }

    def likelihood(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Bits per token of held-out images, with their labels."""
        pipe = self.pipeline(row)
        likelihoods = [
            log_likelihood(pipe, images=self.images[batch].to(self.device), class_labels=self.labels_of(batch))
            for batch in self.batches(table, row.name)
        ]
        bits = torch.cat([likelihood.bits_per_token for likelihood in likelihoods])
        per_scale = torch.cat([likelihood.per_scale for likelihood in likelihoods]).mean(dim=0).cpu()
        counts = torch.tensor(num_tokens_per_scale(pipe.scheduler.scales))
        error = bits.std().item() / len(bits) ** 0.5
        bits_per_scale = (per_scale / counts / -math.log(2)).tolist()
        return {"all": bits.mean().item(), "standard error": error} | _by_scale(pipe.scheduler.scales, bits_per_scale)

    def signal_to_noise(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Decibels after every scale, of latent states."""
        pixels = (self.images[batch].mul(2).sub(1) for batch in self.batches(table, row.name))
        ratios = signal_to_noise(self.pipeline(row).vqvae, pixels)
        # The last scale ends in the state itself.
        return {
            f"{space} {scale}": value
            for space, values in (("latent", ratios.latent_db), ("pixel", ratios.pixel_db))
            for scale, value in _by_scale(ratios.scale_sizes[:-1], values).items()
        }


def _by_scale(scale_sizes: list[list[int]], values: list[float]) -> dict[str, float]:
    return {f"{height}x{width}": value for (height, width), value in zip(scale_sizes, values)}
