"""What happens around the gradient step of every training script."""

import copy
import json
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from srdd.data.images import LabelledImages, picture_grid
from srdd.pipelines.model_folders import CARD
from srdd.training.accelerator import on_main_process
from srdd.training.averaged_weights import AveragedWeights, whole
from srdd.training.checkpoints import checkpoint_step, remove_partial_checkpoints, resume, save_checkpoint
from srdd.training.finite_check import FiniteCheck
from srdd.training.graceful_end import StopAgreement
from srdd.training.run_identity import check_checkpoint, describe_changes, run_identity
from srdd.training.settings import OPTIMIZATION_MAY_CHANGE, TrainingSettings


logger = logging.get_logger(__name__)

LOSS_LOG = "train_log.jsonl"


class TrainingRun:
    """
    Counts the steps of a training script, averages the weights over them, logs them and writes checkpoints.

    The log `output_dir/train_log.jsonl` holds nothing that depends on the clock, and a resumed run drops the lines
    after its checkpoint: it ends with the log of a run that was never interrupted.

    No step waits for an accelerator but where something is logged, validated or written. Losses and gradients that are
    not finite are found there, before anything is; on CPUs at once.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        accelerator (`Accelerator`): With model, optimizer and loader prepared.
        model (`torch.nn.Module`): The prepared model.
        schedule (`LRScheduler`): Learning rate schedule, not prepared.
        stateful (`Iterable`, defaults to `()`): Further objects with `state_dict` and `load_state_dict` that
            checkpoints hold.
        images (`LabelledImages`, *optional*): The data; checkpoints of other data are refused.
        frozen (`dict[str, torch.nn.Module]`, *optional*): Models that training uses as they are, by name; checkpoints
            that were made with others are refused.
        unit (`str`, defaults to `"img"`): What the speed is counted in.
        units_per_image (`float`, defaults to 1): How many of them an image is, on average.

    Raises:
        ValueError: If the checkpoint to start from is damaged or not of this run, or the run is finished.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        model: torch.nn.Module,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        stateful: Iterable = (),
        images: LabelledImages | None = None,
        frozen: dict[str, torch.nn.Module] | None = None,
        unit: str = "img",
        units_per_image: float = 1,
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.schedule = schedule
        self._parameters = list(accelerator.unwrap_model(model).parameters())
        self.ema = AveragedWeights(self._parameters, decay=settings.ema_decay)
        accelerator.register_for_checkpointing(schedule, self.ema, *stateful)
        self.log_path = Path(settings.output_dir) / LOSS_LOG
        config = getattr(accelerator.unwrap_model(model), "config", {})
        self._identity = on_main_process(
            accelerator,
            lambda: run_identity(settings, accelerator.num_processes, images, {"model": config}, frozen),
        )
        self._validation = "validation"
        if images is not None and images.validation is None:
            self._validation = "validation on training images:"
            if accelerator.is_main_process:
                tqdm.write(
                    "Validation is on training images, as there are no others: these go into a split `validation`, or"
                    " into a folder `val` beside `train`, both with the folders of the classes.",
                    file=sys.stderr,
                )
        self.resumed: list[dict] = []
        base_rates = list(schedule.base_lrs)
        self.step = resume(accelerator, settings.output_dir, settings.resume_from_checkpoint, self._check_checkpoint)
        self.resumed = on_main_process(accelerator, lambda: self.resumed)
        if self.step > 0:  # what the settings say holds, not what the checkpoint was made with
            self.ema.decay = settings.ema_decay
            set_learning_rates(schedule, base_rates)
        if accelerator.is_main_process:
            if self.step < settings.max_train_steps:  # a folder with a card is finished
                (Path(settings.output_dir) / CARD).unlink(missing_ok=True)
            remove_partial_checkpoints(settings.output_dir)
            truncate_log(self.log_path, self.step)
        self.progress = tqdm(
            total=settings.max_train_steps, initial=self.step, disable=not accelerator.is_local_main_process
        )
        self._earlier_batches: list[dict[str, torch.Tensor]] = []
        self._finite = FiniteCheck(accelerator.device)
        self.unit = unit
        self.units_per_step = units_per_image * settings.images_per_step(accelerator.num_processes)
        self._timed_step, self._time = self.step, time.perf_counter()
        self._stop = StopAgreement(accelerator)
        model.train()

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that this run cannot go on from, and note what was changed since."""
        settings, step = self.settings, checkpoint_step(checkpoint)
        is_finished = (Path(settings.output_dir) / CARD).is_file() and not settings.push_to_hub
        if settings.max_train_steps < step or settings.max_train_steps == step and is_finished:
            state = "and is finished" if settings.max_train_steps == step else "already"
            raise ValueError(
                f"`max_train_steps` must be more than {step}, the steps that {str(checkpoint)!r} has {state}, got"
                f" {settings.max_train_steps}. Ask for more steps to go on; `--push_to_hub` publishes a finished run."
            )
        changes, self.resumed = check_checkpoint(settings, checkpoint, self._identity)
        if changes:
            tqdm.write(describe_changes({"step": step, "changes": changes}))
        changes = {name: change for name, change in changes.items() if name in OPTIMIZATION_MAY_CHANGE}
        if changes:
            self.resumed = [*self.resumed, {"step": step, "changes": changes}]

    def batches(self, loader: DataLoader) -> Iterator[dict]:
        """Batches of as many epochs as `max_train_steps` needs, going on where the checkpoint left off."""
        accumulation = self.accelerator.gradient_accumulation_steps
        done, wanted = self.step * accumulation, self.settings.max_train_steps * accumulation
        while done < wanted:
            epoch, skipped = divmod(done, len(loader))
            loader.set_epoch(epoch)
            if hasattr(loader.dataset, "set_epoch"):
                loader.dataset.set_epoch(epoch)
            rest = self.accelerator.skip_first_batches(loader, skipped) if skipped else loader
            rest._non_blocking = loader._non_blocking  # accelerate forgets it where batches are skipped
            for batch in rest:
                yield batch
                done += 1
                if done == wanted:
                    return

    def check_finite(self, values: dict[str, torch.Tensor]) -> None:
        """
        Stop where a loss is no number: on a CPU before the step is taken, else before anything that comes of it is
        logged, validated or written.

        Args:
            values (`dict[str, torch.Tensor]`): Scalars of a batch.

        Raises:
            FloatingPointError: On a CPU, if one of the values is not finite; names the step and those values. Else
                [`~TrainingRun.finish_step`], [`~TrainingRun.copy_averages_to`] or [`~TrainingRun.checkpoint`] raises.
        """
        self._finite.add(
            self.step + 1,
            values,
            lambda step, bad: f"The loss is not finite at step {step}: {bad}. A lower `--learning_rate` may help.",
        )

    def clip_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """
        Clip the norm of all gradients to `max_grad_norm`, where a step is due; 0 clips nothing.

        Raises:
            FloatingPointError: If the norm is not finite, when [`~TrainingRun.check_finite`] would; float16 skips such
                steps by itself.
        """
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:
            self._finite.add(
                self.step + 1,
                {"norm": whole(norm)},
                lambda step, bad: f"The norm of the gradients is {bad['norm']} at step {step}.",
            )

    def add_batch(self, values: dict[str, torch.Tensor]) -> None:
        """
        Remember the scalars of a batch that does not end a step, if the step will be logged. Nothing waits for them.

        Args:
            values (`dict[str, torch.Tensor]`): Scalars of the batch.
        """
        if self.is_due(self.settings.logging_steps, self.step + 1):
            self._earlier_batches.append({name: value.detach().float() for name, value in values.items()})

    def finish_step(self, values: dict[str, torch.Tensor]) -> None:
        """
        Count one optimizer step and log it, where logging is due.

        Args:
            values (`dict[str, torch.Tensor]`): Scalars of the last batch of this step; logged are the means over all
                its batches, those that [`~TrainingRun.add_batch`] has seen among them, and over all processes.

        Raises:
            FloatingPointError: Where logging is due, if a loss or gradient since the last log was not finite.
        """
        batches, self._earlier_batches = [*self._earlier_batches, values], []
        self.schedule.step()
        self.step += 1
        self.ema.step(self._parameters)
        self.progress.update()
        if not self.is_due(self.settings.logging_steps):
            return
        self._finite.read()
        means = [_mean([batch[name] for batch in batches if name in batch]) for name in values]
        record = dict(zip(values, self.accelerator.reduce(torch.stack(means), reduction="mean").tolist()))
        self.record({**record, "lr": self.schedule.get_last_lr()[0]})
        now = time.perf_counter()
        speed = (self.step - self._timed_step) * self.units_per_step / (now - self._time)
        self._timed_step, self._time = self.step, now
        self.accelerator.log({f"{self.unit}/s": speed}, step=self.step)
        self.progress.set_postfix({"loss": f"{record['loss']:.4f}", f"{self.unit}/s": f"{speed:.0f}"})

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Whether what happens every so many steps, and after the last, is due now, or will be after `step` steps."""
        step = self.step if step is None else step
        return step % every == 0 or step == self.settings.max_train_steps

    def record(self, values: dict) -> None:
        """Add a line to the loss log, and its numbers to the tracker."""
        if self.accelerator.is_main_process:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.step)

    def record_validation(self, metrics: dict, name: str, pictures: list[torch.Tensor]) -> None:
        """
        Log what a validation measured, and keep its pictures. Called on the main process.

        Args:
            metrics (`dict`): Numbers and lists of them; the log calls them `val_...`.
            name (`str`): What the pictures show.
            pictures (`list[torch.Tensor]`): Equally long rows of them, pixels in [-1, 1].
        """
        self.record({f"val_{key}": value for key, value in metrics.items()})
        self.save_images(name, picture_grid(pictures))
        numbers = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, (int, float))]
        self.progress.write(f"step {self.step}: {self._validation} {', '.join(numbers)}")

    def save_images(self, name: str, images: np.ndarray) -> Path:
        """
        Keep one picture as `output_dir/name-step.png` and hand it to the tracker.

        Args:
            name (`str`): What it shows.
            images (`np.ndarray` of shape `(height, width, 3)`): uint8.
        """
        path = Path(self.settings.output_dir) / f"{name}-{self.step:06d}.png"
        Image.fromarray(images).save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: images[None]}, step=self.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: images[None]}, step=self.step)
        return path

    def checkpoint(self) -> None:
        """
        Write a checkpoint where one is due. Last in a step: its log lines must be older than the checkpoint.

        Raises:
            FloatingPointError: Where a checkpoint is due, if a loss or gradient before it was not finite.
            SystemExit: If SIGTERM or Ctrl-C asked for an end, when the checkpoint is written.
        """
        stopped_by = self._stop.agreed_signal()
        if stopped_by or self.is_due(self.settings.checkpointing_steps):
            self._finite.read()
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.accelerator, self.settings.output_dir, self.step, limit, self._identity, self.resumed)
        if stopped_by:
            self._stop.close()
            self._end_early(stopped_by)

    def _end_early(self, stopped_by: int) -> None:
        """End all processes after a checkpoint, and say how to go on."""
        self._close_trackers()
        if self.accelerator.is_main_process:
            self.progress.write(
                f"Stopped by {signal.Signals(stopped_by).name} after step {self.step}, with a checkpoint: go on with"
                " the same command and `--resume_from_checkpoint latest`."
            )
        self.accelerator.wait_for_everyone()
        self.accelerator.state.destroy_process_group()
        raise SystemExit(128 + stopped_by)

    def copy_averages_to(self, model: torch.nn.Module) -> None:
        """
        Put the averaged weights into `model`, in evaluation mode. Called on all processes.

        Args:
            model (`torch.nn.Module`): A copy of the trained one, made by [`evaluation_copy`] before it was prepared.

        Raises:
            FloatingPointError: If a loss or gradient before was not finite.
        """
        self._finite.read()
        self.ema.copy_to(model.parameters())
        model.eval()

    def close(self) -> None:
        """
        End the progress bar and the trackers. The processes stay connected: there is the model to finish.

        Raises:
            SystemExit: If SIGTERM or Ctrl-C asked for an end in the last step. Going on finishes the model.
        """
        stopped_by = self._stop.close()
        if stopped_by:
            self._end_early(stopped_by)
        self._close_trackers()

    def _close_trackers(self) -> None:
        self.progress.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def set_learning_rates(schedule: torch.optim.lr_scheduler.LRScheduler, base_rates: list[float]) -> None:
    """
    Let a schedule that was loaded go on with other learning rates, and with its own course.

    Args:
        schedule (`LRScheduler`): A `LambdaLR`, as all of `diffusers.optimization` are.
        base_rates (`list[float]`): What its course is multiplied with, for every group of parameters.
    """
    schedule.base_lrs = base_rates
    rates = [rate * course(schedule.last_epoch) for rate, course in zip(base_rates, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    """Mean of scalars, float32."""
    return torch.stack([value.detach().float() for value in values]).mean()


def evaluation_copy(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """A copy of a model that is not prepared yet, for its averaged weights."""
    return copy.deepcopy(model).requires_grad_(False).to(accelerator.device)


def truncate_log(path: Path, last_step: int) -> None:
    """Drop the lines of a JSON-lines log after a step, and one that was cut off while it was written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
