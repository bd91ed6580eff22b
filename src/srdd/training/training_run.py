"""The parts of a training run that do not depend on what is trained."""

import copy
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel
from srdd.data.images import picture_grid
from srdd.models.transformer_scale_2d import ScaleAttnProcessor
from srdd.training.averaged_weights import AveragedWeights
from srdd.training.checkpoints import remove_partial_checkpoints, resume, save_checkpoint
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.token_loss import TokenLoss, token_loss
from srdd.training.training_data import TokenData, make_loader
from srdd.training.validation import draw, validate


LOSS_LOG = "train_log.jsonl"

# Called with a model and a batch; returns the losses, which must be finite and of which `"loss"` is minimised, and
# what else is logged of the step.
ComputeValues = Callable[
    [torch.nn.Module, dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
]


class TrainingRun:
    """
    What happens around the gradient step of every training script: counting, averaging weights, logging, checkpoints.

    The log `output_dir/train_log.jsonl` holds nothing that depends on the clock, and a resumed run drops the lines
    after its checkpoint: it ends with the log of a run that was never interrupted.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): With model, optimizer and loader prepared.
        model (`torch.nn.Module`): The prepared model.
        schedule (`LRScheduler`): Learning rate schedule, not prepared.
        stateful (`Iterable`): Further objects with `state_dict` and `load_state_dict` that checkpoints hold.
    """

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        model: torch.nn.Module,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        stateful: Iterable = (),
    ):
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.schedule = schedule
        self.ema = AveragedWeights(accelerator.unwrap_model(model).parameters(), decay=args.ema_decay)
        accelerator.register_for_checkpointing(schedule, self.ema, *stateful)
        self.log_path = Path(args.output_dir) / LOSS_LOG
        self.step = resume(accelerator, args.output_dir, args.resume_from_checkpoint)
        if accelerator.is_main_process:
            remove_partial_checkpoints(args.output_dir)
            truncate_log(self.log_path, self.step)
        self.progress = tqdm(
            total=args.max_train_steps, initial=self.step, disable=not accelerator.is_local_main_process
        )
        self._clock, self._num_items = time.perf_counter(), 0
        model.train()

    def batches(self, loader: DataLoader) -> Iterator[dict]:
        """Batches of as many epochs as `max_train_steps` needs, going on where the checkpoint left off."""
        accumulation = self.accelerator.gradient_accumulation_steps
        done, wanted = self.step * accumulation, self.args.max_train_steps * accumulation
        while done < wanted:
            epoch, skipped = divmod(done, len(loader))
            loader.set_epoch(epoch)
            if hasattr(loader.dataset, "set_epoch"):
                loader.dataset.set_epoch(epoch)
            for batch in self.accelerator.skip_first_batches(loader, skipped) if skipped else loader:
                yield batch
                done += 1
                if done == wanted:
                    return

    def check_finite(self, values: dict[str, torch.Tensor]) -> None:
        """
        Stop where a loss is no number, before the step is taken.

        Raises:
            FloatingPointError: If one of the values is not finite; names the step and those values.
        """
        if torch.stack([value.detach().float() for value in values.values()]).isfinite().all():
            return
        bad = {name: value.item() for name, value in values.items() if not value.isfinite()}
        raise FloatingPointError(
            f"The loss is not finite at step {self.step + 1}: {bad}. A lower `--learning_rate` may help."
        )

    def clip_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """
        Clip the norm of all gradients to `max_grad_norm`, where a step is due.

        Raises:
            FloatingPointError: If the norm is not finite; float16 skips such steps by itself.
        """
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            raise FloatingPointError(f"The norm of the gradients is {norm.item()} at step {self.step + 1}.")

    def finish_step(self, values: dict[str, torch.Tensor], num_items: int, unit: str) -> None:
        """
        Count one optimizer step and log it, where logging is due.

        Args:
            values (`dict[str, torch.Tensor]`): Scalars of this step; logged are their means over all processes.
            num_items (`int`): What one process handled since the last step, for the speed.
            unit (`str`): Name of such an item.
        """
        self.schedule.step()
        self.step += 1
        self.ema.step(self.accelerator.unwrap_model(self.model).parameters())
        self.progress.update()
        self._num_items += num_items * self.accelerator.num_processes
        if not self.is_due(self.args.logging_steps):
            return
        values = {name: value.detach().float() for name, value in values.items()}
        means = self.accelerator.reduce(torch.stack(list(values.values())), reduction="mean").tolist()
        record = dict(zip(values, means))
        self.record({**record, "lr": self.schedule.get_last_lr()[0]})
        now = time.perf_counter()
        speed = self._num_items / (now - self._clock)
        self._clock, self._num_items = now, 0
        self.accelerator.log({f"{unit}/s": speed}, step=self.step)
        self.progress.set_postfix({"loss": f"{record['loss']:.4f}", f"{unit}/s": f"{speed:.0f}"})

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, is due now."""
        return self.step % every == 0 or self.step == self.args.max_train_steps

    def record(self, values: dict) -> None:
        """Add a line to the loss log, and its numbers to the tracker."""
        if self.accelerator.is_main_process:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.step)

    def save_images(self, name: str, images: np.ndarray) -> Path:
        """
        Keep one picture as `output_dir/name-step.png` and hand it to the tracker.

        Args:
            name (`str`): What it shows.
            images (`np.ndarray` of shape `(height, width, 3)`): uint8.
        """
        path = Path(self.args.output_dir) / f"{name}-{self.step:06d}.png"
        Image.fromarray(images).save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: images[None]}, step=self.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: images[None]}, step=self.step)
        return path

    def checkpoint(self) -> None:
        """Write a checkpoint where one is due. Last in a step: its log lines must be older than the checkpoint."""
        if self.is_due(self.args.checkpointing_steps):
            save_checkpoint(self.accelerator, self.args.output_dir, self.step, self.args.checkpoints_total_limit)

    def averaged_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """
        Put the averaged weights into `model`, in evaluation mode. Called on all processes.

        Args:
            model (`torch.nn.Module`): A copy of the trained one, made by [`evaluation_copy`] before it was prepared.
        """
        self.ema.copy_to(model.parameters())
        return model.eval()

    def close(self) -> None:
        """End the progress bar and the trackers. The processes stay connected: there is the model to finish."""
        self.progress.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def train_model(
    args: Namespace,
    accelerator: Accelerator,
    model: ModelMixin,
    parameters: Iterable,
    dataset: Dataset,
    compute_values: ComputeValues,
    evaluate: Callable[[ModelMixin], tuple[dict, list[torch.Tensor]]],
    count_items: Callable[[dict[str, torch.Tensor]], int],
    unit: str,
    picture: str,
) -> ModelMixin:
    """
    A whole run of a model that has one optimizer.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): Nothing prepared yet.
        model (`ModelMixin`): The model.
        parameters (`Iterable`): Those that are trained, or groups of them.
        dataset (`Dataset`): What batches are made of.
        compute_values (`ComputeValues`): The loss of a batch.
        evaluate (`Callable`): Called with the averaged model; returns metrics and rows of pictures in [-1, 1].
        count_items (`Callable`): Of how many items a batch is, for the speed.
        unit (`str`): Name of such an item.
        picture (`str`): Name of the pictures.

    Returns:
        `ModelMixin`: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the losses.
    """
    loader = make_loader(args, dataset, accelerator.num_processes)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    averaged = evaluation_copy(model, accelerator)
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = TrainingRun(args, accelerator, model, schedule)
    num_items = 0
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            losses, statistics = compute_values(model, batch)
            run.check_finite(losses)
            accelerator.backward(losses["loss"])
            run.clip_gradients(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        num_items += count_items(batch)
        if not accelerator.sync_gradients:
            continue
        run.finish_step({**losses, **statistics}, num_items, unit)
        num_items = 0
        if run.is_due(args.validation_steps):
            run.averaged_model(averaged)
            if accelerator.is_main_process:
                metrics, pictures = evaluate(averaged)
                run.record({f"val_{name}": value for name, value in metrics.items()})
                run.save_images(picture, picture_grid(pictures))
                numbers = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
                run.progress.write(f"step {run.step}: validation {', '.join(numbers)}")
        run.checkpoint()
    run.averaged_model(averaged)
    run.close()
    return averaged


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


ComputeLoss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], TokenLoss]]

# Called with the averaged model and batches of held-out pyramids; returns metrics, a `"loss"` among them, and rows of
# pictures in [-1, 1].


Evaluate = Callable[[torch.nn.Module, DataLoader], tuple[dict, list[torch.Tensor]]]


def train_transformer(
    args: Namespace,
    accelerator: Accelerator,
    model: ScaleTransformer2DModel,
    vqvae: MultiScaleVQModel,
    tokens: TokenData,
    scheduler: ScaleScheduler,
    compute_loss: ComputeLoss,
) -> ScaleTransformer2DModel:
    """
    Train on cached pyramids, with averaged weights, logs, pictures and checkpoints.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): Nothing prepared yet.
        model ([`ScaleTransformer2DModel`]): The transformer.
        vqvae ([`MultiScaleVQModel`]): The tokenizer, frozen and on its device.
        tokens ([`TokenData`]): Pyramids over the scheduler's scales.
        scheduler ([`ScaleScheduler`]): The scales to train.
        compute_loss (`ComputeLoss`): The loss of a batch.

    Returns:
        [`ScaleTransformer2DModel`]: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the scales.
    """
    scale_sizes = scheduler.scales

    def compute_values(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
        losses, statistics = compute_loss(model, batch)
        losses = {**losses, **by_scale("loss", scale_sizes, statistics.per_scale)}
        return losses, by_scale("accuracy", scale_sizes, statistics.accuracy)

    def evaluate(averaged: torch.nn.Module, loader: DataLoader):
        # A backend for training may want what the copy does not have: compiled blocks.
        averaged.set_attn_processor(ScaleAttnProcessor())
        return validate(averaged, vqvae, loader, scheduler), draw(args, averaged, vqvae, scheduler)

    return train_on_tokens(args, accelerator, model, tokens, compute_values, evaluate)


def by_scale(name: str, scale_sizes: list[list[int]], values: torch.Tensor) -> dict[str, torch.Tensor]:
    """One value for each scale, named as in the loss log."""
    return {f"{name}/{height}x{width}": value for (height, width), value in zip(scale_sizes, values)}


def train_on_tokens(
    args: Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokens: TokenData,
    compute_values: ComputeValues,
    evaluate: Evaluate,
) -> torch.nn.Module:
    """
    The loop of [`train_transformer`], for any model that learns from cached pyramids.

    Args:
        args (`Namespace`): The common arguments.
        accelerator (`Accelerator`): Nothing prepared yet.
        model (`torch.nn.Module`): The model.
        tokens ([`TokenData`]): The pyramids.
        compute_values (`ComputeValues`): The loss of a batch.
        evaluate (`Evaluate`): Validation.

    Returns:
        `torch.nn.Module`: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the losses.
    """
    validation_loader = DataLoader(tokens.validation, batch_size=args.train_batch_size)
    return train_model(
        args,
        accelerator,
        model,
        parameter_groups(model, args.adam_weight_decay),
        tokens.train,
        compute_values,
        evaluate=lambda averaged: evaluate(averaged, validation_loader),
        count_items=lambda batch: batch["token_ids"].numel(),
        unit="tok",
        picture="samples",
    )


def cross_entropy(
    args: Namespace, vqvae: MultiScaleVQModel, scheduler: ScaleScheduler
) -> Callable[[torch.nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, TokenLoss]]:
    """A function of the transformer and a batch that returns logits and their [`TokenLoss`] (paper, Equation 7)."""
    scale_sizes, timesteps = scheduler.scales, [scale.timestep for scale in scheduler.visits]

    def compute(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, TokenLoss]:
        inputs = vqvae.teacher_forcing_inputs(batch["token_ids"], scale_sizes)
        logits = model(inputs, timestep=timesteps, class_labels=batch["labels"]).sample
        return logits, token_loss(
            logits, batch["token_ids"], scale_sizes, args.label_smoothing, args.scale_loss_weights
        )

    return compute
