"""The text cache: what the pipeline encodes, without padding, made once, and another file whenever it would differ."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_models import POOLED_DIM, SAMPLE_SIZE, TEXT_DIM, tiny_vqvae
from tiny_texts import MAX_LENGTH, tiny_text_encoder, tiny_text_pipeline, tiny_tokenizer

from srdd.data.images import load_labelled_images
from srdd.data.text_cache import EncodedTexts, cached_texts
from srdd.data.token_cache import cached_tokens


TEXTS = ["ab", "", "abcde", "ab", "x y"]
LENGTHS = [4, 2, 7, 4, 4]  # two more than letters


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "texts"


def make(cache: Path, texts=TEXTS, pipe=None, **options) -> EncodedTexts:
    return cached_texts(pipe or tiny_text_pipeline(), texts, cache, **options)


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@torch.no_grad()
def test_items_are_what_the_pipeline_encodes(cache):
    pipe = tiny_text_pipeline()
    texts = make(cache, pipe=pipe)
    assert len(texts) == len(TEXTS)
    states, pooled, mask = pipe.encode_texts(TEXTS)
    for index in range(len(TEXTS)):
        item = texts[index]
        assert item.keys() == {"encoder_hidden_states", "encoder_attention_mask", "pooled_projections"}
        assert torch.equal(item["encoder_attention_mask"], mask[index])
        assert item["encoder_hidden_states"].shape == (MAX_LENGTH, TEXT_DIM)
        kept = states[index].masked_fill(~mask[index, :, None], 0).half()
        torch.testing.assert_close(item["encoder_hidden_states"], kept, atol=0, rtol=1e-3)
        torch.testing.assert_close(item["pooled_projections"], pooled[index].half(), atol=0, rtol=1e-3)
    assert not torch.equal(texts[0]["pooled_projections"], texts[2]["pooled_projections"])


@torch.no_grad()
def test_half_precision_and_no_padding_change_next_to_nothing_of_what_is_drawn(cache):
    pipe = tiny_text_pipeline()
    texts = make(cache, pipe=pipe)
    states, pooled, mask = pipe.encode_texts(TEXTS)
    inputs = torch.randn(1, 21, 8, generator=torch.Generator().manual_seed(0))
    for index in range(len(TEXTS)):
        item = {name: tensor[None] for name, tensor in texts[index].items()}
        whole = {
            "encoder_hidden_states": states[index, None],
            "encoder_attention_mask": mask[index, None],
            "pooled_projections": pooled[index, None],
        }
        ours, theirs = (pipe.transformer(inputs, **told).sample for told in (item, whole))
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_the_file_is_mapped_and_holds_no_padding(cache):
    texts = make(cache)
    [path] = files(cache)
    assert isinstance(texts.rows, np.memmap)
    assert texts.rows.dtype == np.float16
    different = sum(length + 1 for length in LENGTHS) - 5  # "ab" is kept once
    assert path.stat().st_size == texts.rows.offset + different * TEXT_DIM * 2
    assert texts.lengths.tolist() == LENGTHS
    assert texts.pooled_dim == POOLED_DIM


def test_a_second_call_maps_the_file_and_leaves_the_encoders_alone(cache):
    pipe, runs = tiny_text_pipeline(), []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.register_forward_hook(lambda *_: runs.append(1))
    first = make(cache, pipe=pipe)
    assert len(runs) == 2
    before = files(cache)[0].stat().st_mtime_ns
    again = make(cache, pipe=pipe)
    assert len(runs) == 2
    [path] = files(cache)
    assert path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(first.rows, again.rows)


def test_the_size_of_batches_and_an_accelerator_change_nothing(cache):
    whole, parts = make(cache / "whole"), make(cache / "parts", batch_size=2)
    shared = make(cache / "shared", batch_size=2, accelerator=Accelerator())
    for other in (parts, shared):
        np.testing.assert_allclose(whole.rows, other.rows, atol=2e-3)
        assert other.first_rows.tolist() == whole.first_rows.tolist()
    np.testing.assert_array_equal(parts.rows, shared.rows)


def other_weights() -> dict:
    encoder = tiny_text_encoder(TEXT_DIM - POOLED_DIM, seed=3)
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1e-3
    return {"text_encoder": encoder}


def other_configuration() -> dict:
    encoder = tiny_text_encoder(POOLED_DIM, seed=4)
    encoder.config.layer_norm_eps = 1e-3
    return {"text_encoder_2": encoder}


CHANGES = {
    "weights": (other_weights, TEXTS),
    "configuration": (other_configuration, TEXTS),
    "tokenizer": (lambda: {"tokenizer": tiny_tokenizer("!")}, TEXTS),
    "texts": (dict, [*TEXTS[:-1], "x z"]),
    "order": (dict, TEXTS[::-1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_encoders_or_texts_are_another_file(cache, change):
    components, texts = change
    make(cache)
    pipe = tiny_text_pipeline(**components())
    made = make(cache, texts, pipe)
    assert len(files(cache)) == 2
    with torch.no_grad():
        expected = pipe.encode_texts(texts)[1].half()
    torch.testing.assert_close(torch.stack([item["pooled_projections"] for item in made]), expected, atol=0, rtol=1e-3)


def test_the_place_of_the_encoders_does_not_matter(cache, tmp_path):
    pipe = tiny_text_pipeline()
    make(cache, pipe=pipe)
    pipe.save_pretrained(tmp_path / "saved")
    make(cache, pipe=type(pipe).from_pretrained(tmp_path / "saved"))
    assert len(files(cache)) == 1


def test_texts_that_are_cut_are_named_once(cache, caplog):
    texts = ["x" * 8, "ok", "y" * 9]
    made = make(cache, texts, batch_size=1)
    assert made.lengths.tolist() == [9, 4, 9]
    assert caplog.text.count("cut") == 1
    assert "2 of 3 texts have more tokens than the 9 that are read, and are cut: ['xxxxxxxx', 'yyyy" in caplog.text


def test_a_damaged_file_is_named(cache):
    make(cache)
    [path] = files(cache)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"The text cache '.*{path.name}' is damaged .* Delete it"):
        make(cache)


def test_encoders_that_are_not_finite_are_refused(cache):
    pipe = tiny_text_pipeline(**other_weights())
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] = float("nan")
    with pytest.raises(ValueError, match="`text_encoder` must have finite weights, got NaN or infinity in 1 of"):
        make(cache, pipe=pipe)
    assert not cache.exists()


def test_states_that_half_precision_cannot_hold_are_named(cache):
    pipe = tiny_text_pipeline()
    with torch.no_grad():
        pipe.text_encoder_2.get_parameter("final_layer_norm.bias")[0] = 1e5
    with pytest.raises(ValueError, match="states that are finite in float16, got NaN or infinity for the text 'ab'"):
        make(cache, pipe=pipe)
    assert files(cache) == []


# With pictures


def captioned_tokens(tmp_path: Path, monkeypatch, **options):
    """A wide and a high picture of noise, scaled to a side of 8: 8 x 16 and 12 x 8."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in {"0.png": (16, 32), "1.png": (24, 16)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    lines = [json.dumps({"file_name": f"{index}.png", "text": text}) for index, text in enumerate(["ab", "abc"])]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = load_labelled_images(train_data_dir=str(folder), caption_column="text")
    texts = make(tmp_path / "cache", images.train["text"][:])
    tokens = cached_tokens(tiny_vqvae(), images, images.train, tmp_path / "cache", texts=texts, **options)
    plain = cached_tokens(tiny_vqvae(), images, images.train, tmp_path / "cache", **options)
    return tokens, plain, texts


@pytest.mark.parametrize("crops", [0, 3])
def test_pyramids_come_with_captions_sizes_and_crops(tmp_path, monkeypatch, crops):
    tokens, plain, texts = captioned_tokens(tmp_path, monkeypatch, random_crops=crops, random_flip=True)
    num_views = 2 * max(crops, 1)
    assert len(tokens) == 2 * num_views
    lefts = []
    for row, item in enumerate(tokens[row] for row in range(len(tokens))):
        assert torch.equal(item["token_ids"], plain[row]["token_ids"])
        told = item["conditions"]
        for name, tensor in texts[row % 2].items():
            assert torch.equal(told[name], tensor)
        assert told["original_size"].tolist() == [[512, 1024], [768, 512]][row % 2]
        assert told["original_size"].dtype == told["crop_coords"].dtype == torch.float32
        top, left = told["crop_coords"].tolist()
        assert (top if row % 2 == 0 else left) == 0
        free = 512 if row % 2 == 0 else 256
        assert 0 <= max(top, left) <= free
        assert crops or max(top, left) == free / 2
        lefts += [left] if row % 2 == 0 else []
    # A mirrored crop lies as far from the other side.
    assert [left + mirrored for left, mirrored in zip(lefts, lefts[num_views // 2 :])] == [512] * (num_views // 2)
    assert not crops or len(set(lefts)) > 2


def test_a_crop_is_where_it_is_said_to_be(tmp_path, monkeypatch):
    tokens, _, _ = captioned_tokens(tmp_path, monkeypatch, random_crops=2, random_flip=True)
    vqvae = tiny_vqvae()
    with Image.open(tmp_path / "pictures" / "0.png") as picture:
        scaled = picture.convert("RGB").resize((SAMPLE_SIZE * 2, SAMPLE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1
    for row in range(0, len(tokens), 2):
        item = tokens[row]
        is_mirrored = row >= len(tokens) // 2
        left = int(item["conditions"]["crop_coords"][1] * SAMPLE_SIZE / 512)
        whole = pixels.flip(-1) if is_mirrored else pixels
        with torch.no_grad():
            expected = vqvae.tokenize(whole[None, :, :, left : left + SAMPLE_SIZE])
        assert torch.equal(item["token_ids"], expected[0])


def test_files_with_and_without_places_are_two(tmp_path, monkeypatch):
    captioned_tokens(tmp_path, monkeypatch)
    assert len(list((tmp_path / "cache").glob("tokens-*.npy"))) == 2
