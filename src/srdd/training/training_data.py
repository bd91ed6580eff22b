"""What a run reads: images, or their tokens, in shuffled batches."""

import sys

import datasets
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, SRDDTextPipeline
from srdd.data.images import (
    AugmentedImages,
    LabelledImages,
    load_labelled_images,
    training_transform,
    validation_images,
)
from srdd.data.latent_cache import LatentDataset, cached_latents
from srdd.data.loader_workers import leave_signals_to_main_process
from srdd.data.text_cache import EncodedTexts, cached_texts
from srdd.data.token_cache import CaptionedTokens, SideBySide, TokenDataset, cached_tokens
from srdd.training.settings import (
    DataSettings,
    PixelSettings,
    TokenSettings,
    TrainingSettings,
    TransformerSettings,
)
from srdd.training.trained_schedules import TrainedSchedules
from srdd.training.validation import spread


def load_images(
    settings: DataSettings,
    label_column: str | None,
    max_train_samples: int | None = None,
    seed: int | None = None,
    caption_column: str | None = None,
) -> LabelledImages:
    """
    The data set that the settings name. What it holds is written to the console.

    Args:
        settings ([`DataSettings`]): Where it comes from.
        label_column (`str`, *optional*): `None` for data without labels.
        max_train_samples (`int`, *optional*): Keep this many training images, drawn with `seed`.
        seed (`int`, *optional*): Seed of that draw.
        caption_column (`str`, *optional*): For captions instead of labels.
    """
    # A run may write into a folder within the data: its own pictures are not to be trained on.
    written = [getattr(settings, name, None) for name in ("output_dir", "token_cache_dir", "cache_dir")]
    images = load_labelled_images(
        dataset_name=settings.dataset_name,
        train_data_dir=settings.train_data_dir,
        dataset_config_name=settings.dataset_config_name,
        image_column=settings.image_column,
        label_column=label_column,
        cache_dir=settings.cache_dir,
        max_train_samples=max_train_samples,
        seed=seed,
        min_image_size=settings.min_image_size,
        strict=settings.strict_data,
        num_proc=settings.preprocessing_num_workers,
        run_folders=[folder for folder in written if folder is not None],
        caption_column=caption_column,
    )
    if PartialState().is_local_main_process:
        tqdm.write(images.summary, file=sys.stderr)  # what scripts write to the other stream is their result
    return images


def load_pixels(
    settings: PixelSettings, resolution: int, images: LabelledImages
) -> tuple[AugmentedImages, datasets.Dataset]:
    """
    Training and validation images of the size that a tokenizer or an autoencoder reads.

    Raises:
        ValueError: If crops are to be random in size, but in the centre.
    """
    if settings.center_crop and settings.min_crop < 1:
        raise ValueError(f"`min_crop` must be 1 with `center_crop`, got {settings.min_crop}.")
    train = AugmentedImages(
        images,
        resolution,
        not settings.center_crop,
        settings.random_flip,
        settings.seed,
        settings.min_crop,
        settings.random_colors,
    )
    return train, validation_images(images, 512).with_transform(training_transform(images, resolution))


def load_tokens(
    settings: TransformerSettings,
    accelerator: Accelerator,
    vqvae: MultiScaleVQModel,
    images: LabelledImages,
    schedules: TrainedSchedules,
    pipe: SRDDTextPipeline | None = None,
) -> tuple[TokenDataset, TokenDataset] | tuple[CaptionedTokens, CaptionedTokens]:
    """
    The pyramids of training and validation images, tokenised once, with captions, if any, that `pipe` encodes. Those
    of several schedules lie in a file each, and one after the other in an item.
    """
    options = {
        "cache_dir": settings.token_cache_dir,
        "num_workers": settings.dataloader_num_workers,
        "accelerator": accelerator,
    }
    views = {"random_crops": settings.random_crops, "random_flip": settings.random_flip, "seed": settings.seed}

    def tokens(split: datasets.Dataset, **views: bool | int) -> TokenDataset | CaptionedTokens:
        texts = None
        if images.caption_column is not None:
            captions = split[images.caption_column][:]
            texts = cached_texts(pipe, captions, settings.token_cache_dir, accelerator=accelerator)
        of_schedules = [
            cached_tokens(vqvae, images, split, scale_sizes=scheduler.scales, texts=texts, **views, **options)
            for scheduler in schedules.schedulers
        ]
        first = of_schedules[0]
        if len(of_schedules) > 1:
            first.token_ids = SideBySide([each.token_ids for each in of_schedules])
        return first

    return tokens(images.train, **views), tokens(validation_images(images, 1024))


def load_latents(
    settings: TokenSettings, accelerator: Accelerator, vae: AutoencoderKL, images: LabelledImages, resolution: int
) -> tuple[LatentDataset, LatentDataset]:
    """The latents of training and validation images, encoded once."""
    options = {
        "cache_dir": settings.token_cache_dir,
        "resolution": resolution,
        "num_workers": settings.dataloader_num_workers,
        "accelerator": accelerator,
    }
    views = {"random_crops": settings.random_crops, "random_flip": settings.random_flip, "seed": settings.seed}
    validation = validation_images(images, 1024)
    return tuple(
        cached_latents(vae, images, split, **more, **options)
        for split, more in ((images.train, views), (validation, {}))
    )


def load_prompts(
    settings: TransformerSettings, accelerator: Accelerator, pipe: SRDDTextPipeline, images: LabelledImages
) -> tuple[list[str], EncodedTexts]:
    """
    The text of each picture at validations, and these encoded, after the empty text. They are those of the settings,
    or captions of validation images.
    """
    count = settings.num_validation_images
    texts = settings.validation_prompts or validation_images(images, count)[images.caption_column][:]
    texts = [texts[index] for index in spread(count, len(texts))]
    return texts, cached_texts(pipe, ["", *texts], settings.token_cache_dir, accelerator=accelerator)


def make_loader(settings: TrainingSettings, dataset: Dataset, num_processes: int = 1) -> DataLoader:
    """
    Shuffled batches of `train_batch_size`.

    Raises:
        ValueError: If there are fewer images than all processes need for one batch each.
    """
    largest = len(dataset) // num_processes
    if settings.train_batch_size > largest:
        raise ValueError(
            f"`train_batch_size` must be at most {largest}, the number of training images ({len(dataset)}) over that"
            f" of processes ({num_processes}), got {settings.train_batch_size}."
        )
    return DataLoader(
        dataset,
        batch_size=settings.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=leave_signals_to_main_process,
        generator=torch.Generator().manual_seed(settings.seed),
        pin_memory=PartialState().device.type == "cuda",
    )
