"""What a run reads: images, or their tokens, in shuffled batches."""

from argparse import Namespace

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from srdd import MultiScaleVQModel
from srdd.data.images import LabelledImages, load_labelled_images, validation_images
from srdd.data.token_cache import TokenDataset, cached_tokens


def load_images(args: Namespace, label_column: str | None, max_train_samples: int | None = None) -> LabelledImages:
    """The data set that the data arguments name; `label_column` is `None` for data without labels."""
    return load_labelled_images(
        dataset_name=args.dataset_name,
        train_data_dir=args.train_data_dir,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=label_column,
        cache_dir=args.cache_dir,
        max_train_samples=max_train_samples,
        seed=args.seed,
        min_image_size=args.min_image_size,
        strict=args.strict_data,
        num_proc=args.preprocessing_num_workers,
    )


def load_tokens(
    args: Namespace,
    accelerator: Accelerator,
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    scale_sizes: list[list[int]],
) -> tuple[TokenDataset, TokenDataset]:
    """The pyramids of training and validation images, tokenised once."""
    options = {
        "cache_dir": args.token_cache_dir,
        "scale_sizes": scale_sizes,
        "num_workers": args.dataloader_num_workers,
        "accelerator": accelerator,
    }
    views = {"random_crops": args.random_crops, "random_flip": args.random_flip, "seed": args.seed}
    train = cached_tokens(vqvae, images, images.train, **views, **options)
    return train, cached_tokens(vqvae, images, validation_images(images, 1024), **options)


def make_loader(args: Namespace, dataset: Dataset, num_processes: int = 1) -> DataLoader:
    """
    Shuffled batches of `train_batch_size`.

    Raises:
        ValueError: If there are fewer images than all processes need for one batch each.
    """
    largest = len(dataset) // num_processes
    if args.train_batch_size > largest:
        raise ValueError(
            f"`train_batch_size` must be at most {largest}, the number of training images ({len(dataset)}) over that"
            f" of processes ({num_processes}), got {args.train_batch_size}."
        )
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
