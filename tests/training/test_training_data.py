"""Shuffled batches of what a run reads."""

import argparse

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_vqvae
from training.launching import make_image_folder

from srdd import ScaleScheduler
from srdd.data.images import LabelledImages, image_to_tensor, load_labelled_images
from srdd.evaluation.paired_metrics import peak_signal_to_noise
from srdd.training.settings import PixelSettings, TrainingSettings, TransformerSettings, share
from srdd.training.trained_schedules import TrainedSchedules
from srdd.training.training_data import (
    LOW_PSNR,
    NUM_DECODED,
    load_pixels,
    load_tokens,
    make_loader,
    make_validation_loader,
)


def make_numbers(count: int) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.arange(count))


def test_a_batch_needs_enough_images():
    settings = TrainingSettings(output_dir="out", train_batch_size=5)
    with pytest.raises(
        ValueError, match=r"`train_batch_size` must be at most 4, .* images \(9\) over that of processes \(2\), got 5"
    ):
        make_loader(settings, make_numbers(9), num_processes=2)
    loader = make_loader(settings, make_numbers(10), num_processes=2)
    assert [len(numbers) for [numbers] in loader] == [5, 5]


def test_the_last_small_batch_is_dropped():
    loader = make_loader(TrainingSettings(output_dir="out", train_batch_size=4), make_numbers(11))
    assert [len(numbers) for [numbers] in loader] == [4, 4]


def test_the_order_is_that_of_the_seed():
    def order(seed):
        loader = make_loader(TrainingSettings(output_dir="out", train_batch_size=4, seed=seed), make_numbers(12))
        return torch.cat([numbers for [numbers] in loader]).tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(12))


def test_validation_reads_all_in_order_and_draws_no_random_numbers():
    loader = make_validation_loader(TrainingSettings(output_dir="out", train_batch_size=4), make_numbers(9))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert [numbers.tolist() for [numbers] in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_in_the_centre_are_of_one_size():
    settings = PixelSettings(output_dir="out", center_crop=True, min_crop=0.5)
    with pytest.raises(ValueError, match="`min_crop` must be 1 with `center_crop`, got 0.5"):
        load_pixels(settings, 8, LabelledImages(None, None, "image", None, {}))
    assert share("1") == 1.0
    for wrong in ("0", "1.1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must lie in \(0, 1\]"):
            share(wrong)


# How well the tokenizer gives the pictures back


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> LabelledImages:
    root = tmp_path_factory.mktemp("data")
    make_image_folder(root / "images", 40)
    return load_labelled_images(train_data_dir=str(root / "images"), cache_dir=str(root / "datasets"))


def tokenise(images: LabelledImages, folder, vqvae=None, **options) -> float:
    """The PSNR that comes with the tokens."""
    vqvae = vqvae or tiny_vqvae()
    settings = TransformerSettings(output_dir=str(folder), **options)
    scheduler = ScaleScheduler(scale_sizes=vqvae.config.scale_sizes)
    schedules = TrainedSchedules.from_settings(settings, scheduler)
    return load_tokens(settings, Accelerator(), vqvae, images, schedules)[2]


def test_the_psnr_is_that_of_pictures_spread_over_the_data(images, tmp_path, capsys):
    vqvae = tiny_vqvae()
    assert len(images.train) == 80 > NUM_DECODED
    indices = [index * 80 // NUM_DECODED for index in range(NUM_DECODED)]
    pixels = torch.stack([image_to_tensor(images.train[index]["image"], 8) for index in indices])
    with torch.no_grad():
        decoded = vqvae(pixels).sample.clamp(-1, 1)
    expected = peak_signal_to_noise(decoded / 2 + 0.5, pixels / 2 + 0.5).mean().item()
    psnr = tokenise(images, tmp_path, vqvae)
    assert psnr == pytest.approx(expected, abs=1e-4)
    line = f"Tokenizer: PSNR {psnr:.1f} dB on {NUM_DECODED} of your pictures."
    assert line in capsys.readouterr().err.splitlines()
    # The tokens are there; mirrored or cut pictures are others.
    assert tokenise(images, tmp_path, vqvae) == psnr
    assert tokenise(images, tmp_path, vqvae, random_flip=True) == psnr
    assert tokenise(images, tmp_path, vqvae, random_crops=2) != psnr
    # The first of several schedules is what the pipeline draws over.
    assert tokenise(images, tmp_path, vqvae, schedules=[[1, 4], [1, 2, 4]]) != psnr
    assert tokenise(images, tmp_path, vqvae, schedules=[[1, 2, 4], [1, 4]]) == psnr


def test_few_pictures_are_all_decoded(images, tmp_path, capsys):
    few = LabelledImages(
        images.train.select(range(5)), None, images.image_column, images.label_column, images.id2label
    )
    tokenise(few, tmp_path)
    assert "dB on 5 of your pictures." in capsys.readouterr().err


@pytest.mark.parametrize("is_low", [True, False])
def test_a_low_psnr_comes_with_a_remedy(images, tmp_path, caplog, monkeypatch, is_low):
    psnr = tokenise(images, tmp_path)
    assert psnr < LOW_PSNR  # the tokenizer is not trained
    caplog.clear()
    if not is_low:
        monkeypatch.setattr("srdd.training.training_data.LOW_PSNR", psnr)
    tokenise(images, tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == is_low
    for message in messages:
        assert f"with a PSNR of {psnr:.1f} dB, less than 21" in message
        assert "train_tokenizer.py --pretrained_model_name_or_path" in message


def test_measuring_draws_no_random_numbers(images, tmp_path):
    vqvae = tiny_vqvae()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for _ in range(2):  # tokenised, and from the cache
        tokenise(images, tmp_path, vqvae, random_crops=2)
        assert torch.equal(torch.get_rng_state(), before)
