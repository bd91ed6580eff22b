"""What a run reads: images, or their tokens, in shuffled batches."""

import sys

import datasets
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL
from diffusers.utils import logging
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, SRDDTextPipeline
from srdd.data.image_views import ImageViews, leave_signals_to_main_process
from srdd.data.images import (
    AugmentedImages,
    LabelledImages,
    load_labelled_images,
    training_transform,
    validation_images,
)
from srdd.data.latent_cache import LatentDataset, cached_latents
from srdd.data.text_cache import EncodedTexts, cached_texts
from srdd.data.token_cache import CaptionedTokens, TokenDataset, cached_tokens
from srdd.evaluation.figures import spread
from srdd.evaluation.reconstruction import token_psnr
from srdd.training.accelerator import on_main_process
from srdd.training.settings import (
    DataSettings,
    PixelSettings,
    TokenSettings,
    TrainingSettings,
    TransformerSettings,
)
from srdd.training.trained_schedules import TrainedSchedules
from srdd.training.validation import whole_rows


logger = logging.get_logger(__name__)

# Pictures that the tokenizer's PSNR is measured on: its mean is then good to about half a decibel.
NUM_DECODED = 64

# In dB. Where photographs came back with 17 or 18, a transformer drew blobs of colour; VAR's tokenizer has between 21
# and 22 on large ones.
LOW_PSNR = 21.0


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
) -> tuple[TokenDataset | CaptionedTokens, TokenDataset | CaptionedTokens, float]:
    """
    The pyramids of training and validation images, tokenised once, with captions, if any, that `pipe` encodes; and the
    PSNR of the training images that come back of them ([`tokenizer_psnr`]).
    """
    options = {
        "cache_dir": settings.token_cache_dir,
        "schedules": [scheduler.scales for scheduler in schedules.schedulers],
        "num_workers": settings.dataloader_num_workers,
        "accelerator": accelerator,
    }
    views = {"random_crops": settings.random_crops, "random_flip": settings.random_flip, "seed": settings.seed}

    def tokens(split: datasets.Dataset, **views: bool | int) -> TokenDataset | CaptionedTokens:
        texts = None
        if images.caption_column is not None:
            captions = split[images.caption_column][:]
            texts = cached_texts(pipe, captions, settings.token_cache_dir, accelerator=accelerator)
        return cached_tokens(vqvae, images, split, texts=texts, **views, **options)

    train, validation = tokens(images.train, **views), tokens(validation_images(images, 1024))
    pictures = ImageViews(images.train, images.image_column, vqvae.resolution, **views)
    psnr = on_main_process(accelerator, lambda: tokenizer_psnr(vqvae, pictures, train, schedules))
    return train, validation, psnr


def tokenizer_psnr(
    vqvae: MultiScaleVQModel, views: ImageViews, tokens: TokenDataset | CaptionedTokens, schedules: TrainedSchedules
) -> float:
    """
    PSNR of pictures that are decoded from their tokens, in dB: the most that a transformer trained on these can give.
    It is written to the console, with a warning where it is low.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        views ([`ImageViews`]): The pictures; some of them, spread over all, are decoded.
        tokens ([`TokenDataset`] or [`CaptionedTokens`]): Their pyramids, row by row.
        schedules ([`TrainedSchedules`]): What these are pyramids of; those of the first are decoded.
    """
    count, scheduler = len(views.split), schedules.first
    rows = torch.tensor(spread(min(NUM_DECODED, count), count))
    batches = (
        default_collate([(views[row][0], tokens[row]["token_ids"][: scheduler.num_tokens]) for row in batch.tolist()])
        for batch in rows.split(16)
    )
    psnr = token_psnr(vqvae, batches, scheduler.scales)
    tqdm.write(f"Tokenizer: PSNR {psnr:.1f} dB on {len(rows)} of your pictures.", file=sys.stderr)
    if psnr < LOW_PSNR:
        logger.warning(
            f"The tokenizer gives your pictures back with a PSNR of {psnr:.1f} dB, less than {LOW_PSNR:.0f}: what is"
            " trained on its tokens cannot draw better than that. Train a tokenizer on these pictures, from this one"
            " (`train_tokenizer.py --pretrained_model_name_or_path ...`) or anew, or take another one: for pictures of"
            " any kind, srdd-tokenizer-64 (model_cards), or VAR's for 256 pixels (docs/public_weights.md)."
        )
    return psnr


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
    count = whole_rows(settings.num_validation_images)
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


def make_validation_loader(settings: TrainingSettings, dataset: Dataset) -> DataLoader:
    """
    Batches of `train_batch_size` in order. Validating leaves torch's global generator alone: how often a run does
    changes nothing of what it learns.
    """
    # Without a generator every pass over the data takes a number from the global one.
    return DataLoader(dataset, batch_size=settings.train_batch_size, generator=torch.Generator())
