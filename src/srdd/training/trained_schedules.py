"""One transformer for several schedules: each step learns one of them."""

import random
from collections.abc import Sequence

import torch

from srdd import ScaleScheduler
from srdd.evaluation.tables import scale_name
from srdd.training.settings import TransformerSettings


def schedule_name(scale_sizes: Sequence[Sequence[int]]) -> str:
    """A schedule as `--schedules` names it, `1-2-4`."""
    return "-".join(map(scale_name, scale_sizes))


class TrainedSchedules:
    """
    The schedules that a transformer learns. A pyramid of each, one after the other, makes the tokens of a picture.

    Args:
        schedulers (`Sequence[ScaleScheduler]`): One for each; the first is that of the finished pipeline.
        seed (`int`, defaults to 0): Draws the schedule of every step.
    """

    def __init__(self, schedulers: Sequence[ScaleScheduler], seed: int = 0):
        self.schedulers = list(schedulers)
        self.seed = seed

    @classmethod
    def from_settings(cls, settings: TransformerSettings, scheduler: ScaleScheduler) -> "TrainedSchedules":
        """
        The schedules that `--schedules` names.

        Args:
            settings ([`TransformerSettings`]): What the script was told.
            scheduler ([`ScaleScheduler`]): Knows all scales; without `--schedules` its own are learned. All schedules
                have its other options.

        Raises:
            ValueError: If a schedule is none of the model's, the same one is there twice or none at all, or there are
                several and `--scale_loss_weights`, which are for one list of scales.
        """
        schedules = settings.schedules
        if schedules is None:
            return cls([scheduler], settings.seed)
        if not schedules or any(schedules.count(sides) > 1 for sides in schedules):
            raise ValueError(f"`schedules` must be at least one, and each of them once, got {schedules}.")
        if len(schedules) > 1 and settings.scale_loss_weights is not None:
            raise ValueError(
                f"`scale_loss_weights` must be left out with several `schedules`, got {settings.scale_loss_weights}."
            )
        schedulers = []
        for sides in schedules:
            try:
                schedulers.append(ScaleScheduler.from_config(scheduler.config, scales=sides))
            except ValueError as error:
                raise ValueError(f"`schedules` must be scales that the model has, got {sides}: {error}") from error
        return cls(schedulers, settings.seed)

    @property
    def first(self) -> ScaleScheduler:
        """That of the finished pipeline."""
        return self.schedulers[0]

    @property
    def mean_num_tokens(self) -> float:
        """How many tokens of a picture a step learns on average."""
        return sum(scheduler.num_tokens for scheduler in self.schedulers) / len(self.schedulers)

    def split(self, token_ids: torch.LongTensor) -> list[tuple[ScaleScheduler, torch.LongTensor]]:
        """
        All schedules with their pyramids.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): Those of all schedules, one after the other.

        Returns:
            `list[tuple[ScaleScheduler, torch.LongTensor]]`
        """
        counts = [scheduler.num_tokens for scheduler in self.schedulers]
        return list(zip(self.schedulers, token_ids.split(counts, dim=1)))

    def of_step(self, step: int, token_ids: torch.LongTensor) -> tuple[ScaleScheduler, torch.LongTensor]:
        """
        The schedule of a step, each as often as the others, with its pyramids. Nothing but the seed and the number of
        the step decides: all processes, and a run that is resumed, have the same.

        Args:
            step (`int`): How many steps were taken before.
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): Those of all schedules, one after the other.
        """
        return random.Random(f"{self.seed} {step}").choice(self.split(token_ids))
