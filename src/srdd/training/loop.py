"""The parts of a training run that do not depend on what is trained."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, Dataset

from srdd.training.data import LabelledImages, load_labelled_images


def make_accelerator(args: Namespace) -> Accelerator:
    """An `Accelerator` set up from the common arguments, with its tracker started."""
    report_to = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if report_to is not None:
            settings = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
            accelerator.init_trackers(Path(args.output_dir).name or "srdd", config=settings)
    return accelerator


def load_images(args: Namespace, label_column: str | None) -> LabelledImages:
    """The data set that the common arguments name; `label_column` is `None` for data without labels."""
    return load_labelled_images(
        dataset_name=args.dataset_name,
        train_data_dir=args.train_data_dir,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=label_column,
        cache_dir=args.cache_dir,
        max_train_samples=args.max_train_samples,
        seed=args.seed,
    )


def validation_images(images: LabelledImages, count: int) -> datasets.Dataset:
    """At most `count` images, always the same: of the validation split, or of the training split without one."""
    split = images.validation if images.validation is not None else images.train
    return split.shuffle(seed=0).select(range(min(count, len(split))))


def make_loader(args: Namespace, dataset: Dataset, collate_fn=None) -> DataLoader:
    """Shuffled batches of `train_batch_size`."""
    if len(dataset) < args.train_batch_size:
        raise ValueError(
            f"`train_batch_size` must be at most the number of training images, {len(dataset)}, got"
            f" {args.train_batch_size}."
        )
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_fn,
        generator=torch.Generator().manual_seed(args.seed),
    )


def make_optimizer(args: Namespace, parameters) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its learning rate schedule over `max_train_steps` (in optimizer steps on every process)."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, schedule


def batches_from(accelerator: Accelerator, loader: DataLoader, first_step: int, max_steps: int) -> Iterator[dict]:
    """Batches of as many epochs as `max_steps` optimizer steps need, going on where `first_step` left off."""
    accumulation = accelerator.gradient_accumulation_steps
    done, wanted = first_step * accumulation, max_steps * accumulation
    while done < wanted:
        epoch, skipped = divmod(done, len(loader))
        loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            yield batch
            done += 1
            if done == wanted:
                return


def log_images(accelerator: Accelerator, output_dir: str | Path, name: str, images: np.ndarray, step: int) -> None:
    """
    Hand one picture to the tracker and keep it as `output_dir/name-step.png`.

    Args:
        images (`np.ndarray` of shape `(height, width, 3)`): uint8.
    """
    from PIL import Image

    Image.fromarray(images).save(Path(output_dir) / f"{name}-{step:06d}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: images[None]}, step=step, **options)


def append_json_line(path: str | Path, record: dict) -> None:
    """Add one line to a JSON-lines log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def picture_grid(rows: list[torch.Tensor]) -> np.ndarray:
    """
    Lay equally long rows of pictures under each other.

    Args:
        rows (`list[torch.Tensor]`): Each of shape `(num_images, 3, height, width)`, pixels in [-1, 1].

    Returns:
        `np.ndarray` of shape `(len(rows) * height, num_images * width, 3)`, uint8.
    """
    strips = [torch.cat(list(row.float().clamp(-1, 1)), dim=-1) for row in rows]
    picture = torch.cat(strips, dim=-2).add(1).mul(127.5).round().to(torch.uint8)
    return picture.permute(1, 2, 0).cpu().numpy()
