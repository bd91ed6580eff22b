"""The cells of ablation tables: what is drawn, edited or scored, and the numbers that come of it."""

import math
import statistics
import time

import torch
from tqdm.auto import tqdm

from srdd import SRDDPipeline
from srdd.evaluation.ablations import NO_MODEL, AblationRow, AblationTable
from srdd.evaluation.distances import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from srdd.evaluation.editing_tasks import edit, fill, given_pixels
from srdd.evaluation.image_sources import PipelineImages
from srdd.evaluation.likelihood import log_likelihood
from srdd.evaluation.paired_metrics import pair_metrics
from srdd.evaluation.signal_to_noise import signal_to_noise
from srdd.scales import num_tokens_per_scale


class AblationCells:
    """
    Measures cells.

    Args:
        pipelines (`dict[str, SRDDPipeline]`): The models by name, all of one image size.
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`): Held-out images in [0, 1].
        labels (`list[int]`, *optional*): Their classes.
        extractor (`torch.nn.Module`): Features of uint8 images ([`~srdd.evaluation.features.load_features`]).
        num_reference_images (`int`): Drawn images are compared with so many of the held-out ones, the first.
        batch_size (`int`): Images drawn at once.
        num_bootstrap (`int`): Replicates of the confidence intervals.
    """

    def __init__(
        self,
        pipelines: dict[str, SRDDPipeline],
        images: torch.Tensor,
        labels: list[int] | None,
        extractor: torch.nn.Module,
        num_reference_images: int,
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
        self.features = self.features_of(images)
        self.reference_features = self.features[:num_reference_images]
        self.reference = FeatureStatistics.from_features(self.reference_features)

    @staticmethod
    def columns(table: AblationTable) -> list[str]:
        """Columns of a table: seeds of drawn images, tasks of edited ones, one for what is not drawn."""
        if table.kind == "samples":
            return [f"seed {seed}" for seed in table.seeds]
        return table.tasks if table.kind == "editing" else ["all"]

    def measure(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """The numbers of one cell."""
        measures = {
            "samples": self.samples,
            "editing": self.editing,
            "likelihood": self.likelihood,
            "signal_to_noise": self.signal_to_noise,
        }
        return measures[table.kind](table, row, column)

    @torch.no_grad()
    def features_of(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images, uint8 or in [0, 1] and then rounded as a PNG rounds them."""
        pixels = images.mul(255).round().to(torch.uint8) if images.is_floating_point() else images
        return torch.cat([self.extractor(part.to(self.device)).cpu() for part in pixels.split(64)])

    def samples(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Distances of drawn images, of all classes alike, to the held-out ones."""
        seed = int(column.removeprefix("seed "))
        source = PipelineImages(row.pipeline(self.pipelines[row.model]), table.num_images, row.guidance_scale, seed)
        started = time.perf_counter()
        starts = range(0, source.count, self.batch_size)
        drawn = [
            source.read(range(start, min(start + self.batch_size, source.count)))
            for start in tqdm(starts, desc=f"{table.name}, {row.name}, {column}")
        ]
        seconds = time.perf_counter() - started
        features = self.features_of(torch.cat(drawn))
        low, high = bootstrap_interval(
            lambda replicate: frechet_distance(self.reference, replicate), features, self.num_bootstrap
        )
        return {
            "frechet_distance": frechet_distance(self.reference, features),
            "frechet_distance_interval": [low, high],
            "kernel_distance": kernel_distance(self.reference_features, features)[0],
            **precision_recall_density_coverage(self.reference_features[:1024], features),
            "seconds_per_image": seconds / table.num_images,
        }

    def pictures(self, table: AblationTable, count: int = 10) -> list[torch.Tensor]:
        """
        Rows of pictures in [0, 1] for tables that draw: `count` classes spread over all, for each row of a table of
        drawn images; for each task of an editing table originals, what is given and the results of all rows, for the
        first held-out images.
        """
        if table.kind == "samples":
            rows = []
            for row in table.rows:
                pipe = row.pipeline(self.pipelines[row.model])
                num_classes = pipe.transformer.config.num_classes
                images = pipe(
                    [index * num_classes // count for index in range(count)] if num_classes else None,
                    num_images_per_prompt=1 if num_classes else count,
                    guidance_scale=row.guidance_scale,
                    generator=[torch.Generator().manual_seed(index) for index in range(count)],
                    output_type="pt",
                ).images
                rows.append(images.cpu())
            return rows
        part = slice(0, 2)
        return [
            torch.stack(
                [
                    self.images[part],
                    given_pixels(task, self.images[part], [0, 1]),
                    *(self.edited(row, task, part) for row in table.rows),
                ],
                dim=1,
            ).flatten(0, 1)
            for task in table.tasks
        ]

    def edited(self, row: AblationRow, task: str, part: slice) -> torch.Tensor:
        """Results of an editing task for some of the held-out images."""
        images, seeds = self.images[part], list(range(len(self.images)))[part]
        if row.model == NO_MODEL:
            return fill(task, images, seeds, **row.options)
        pipe = row.pipeline(self.pipelines[row.model])
        labels = None if self.labels is None else self.labels[part]
        return edit(pipe, task, images.to(self.device), labels, seeds, row.guidance_scale, **row.options).cpu()

    def editing(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Likeness of edited images to the held-out images that they were made from, all pixels counted."""
        started = time.perf_counter()
        starts = range(0, table.num_images, self.batch_size)
        parts = [slice(start, min(start + self.batch_size, table.num_images)) for start in starts]
        drawn = [self.edited(row, column, part) for part in tqdm(parts, desc=f"{table.name}, {row.name}, {column}")]
        seconds = time.perf_counter() - started
        results = torch.cat(drawn).mul(255).round().div(255)
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
        pipe = row.pipeline(self.pipelines[row.model])
        bits, per_scale = [], []
        for start in tqdm(range(0, table.num_images, self.batch_size), desc=f"{table.name}, {row.name}"):
            part = slice(start, min(start + self.batch_size, table.num_images))
            labels = None if self.labels is None else self.labels[part]
            found = log_likelihood(pipe, images=self.images[part].to(self.device), class_labels=labels)
            bits.append(found.bits_per_token)
            per_scale.append(found.per_scale)
        bits, counts = torch.cat(bits), torch.tensor(num_tokens_per_scale(pipe.scheduler.scales))
        scales = (torch.cat(per_scale).mean(dim=0).cpu() / counts / -math.log(2)).tolist()
        error = bits.std().item() / len(bits) ** 0.5
        return {"all": bits.mean().item(), "standard error": error} | _by_scale(pipe.scheduler.scales, scales)

    def signal_to_noise(self, table: AblationTable, row: AblationRow, column: str) -> dict[str, float]:
        """Decibels after every scale, of latent states."""
        batches = self.images[: table.num_images].mul(2).sub(1).split(self.batch_size)
        found = signal_to_noise(self.pipelines[row.model].vqvae, tqdm(batches, desc=f"{table.name}, {row.name}"))
        # The last scale ends in the state itself.
        return {
            f"{space} {scale}": value
            for space, values in (("latent", found.latent_db), ("pixel", found.pixel_db))
            for scale, value in _by_scale(found.scale_sizes[:-1], values).items()
        }


def _by_scale(scale_sizes: list[list[int]], values: list[float]) -> dict[str, float]:
    return {f"{height}x{width}": value for (height, width), value in zip(scale_sizes, values)}
