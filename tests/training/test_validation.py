"""Held-out loss and pictures of a transformer, against plain loops and the pipeline."""

import numpy as np
import pytest
import torch
from tiny_models import CODEBOOK_SIZE, ID2LABEL, random_texts, tiny_pipeline, tiny_scheduler, tiny_transformer
from tiny_texts import tiny_text_pipeline
from torch.utils.data import DataLoader

from srdd import SRDDPipeline
from srdd.data.text_cache import cached_texts
from srdd.data.token_cache import TokenDataset
from srdd.training.validation import draw, validate


def make_tokens(pipe: SRDDPipeline, count: int) -> TokenDataset:
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, CODEBOOK_SIZE, (count, pipe.scheduler.num_tokens), dtype=np.uint16)
    return TokenDataset(token_ids, rng.integers(0, len(ID2LABEL), count))


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["markov", "causal", "banded"])
@pytest.mark.parametrize("overrides", [{}, {"scales": [1, 4]}], ids=["all scales", "fewer scales"])
def test_validation_is_the_improbability_of_every_token_whatever_the_batches(pattern, overrides):
    pipe = tiny_pipeline(pattern, scheduler=tiny_scheduler(**overrides))
    tokens, scale_sizes = make_tokens(pipe, 7), pipe.scheduler.scales
    token_ids = torch.stack([pyramid["token_ids"] for pyramid in tokens])
    labels = torch.stack([pyramid["conditions"]["class_labels"] for pyramid in tokens])
    inputs = pipe.vqvae.teacher_forcing_inputs(token_ids, scale_sizes)
    timesteps = [scale.timestep for scale in pipe.scheduler.visits]
    logits = pipe.transformer(inputs, timestep=timesteps, class_labels=labels).sample
    improbability = -logits.log_softmax(dim=-1).gather(-1, token_ids[..., None])[..., 0]
    is_best = (logits.argmax(dim=-1) == token_ids).float()
    for batch_size in (7, 3):
        metrics = validate(pipe, DataLoader(tokens, batch_size=batch_size))
        assert metrics["loss"] == pytest.approx(improbability.mean().item(), abs=1e-5)
        assert metrics["scales"] == scale_sizes
        for index, scale in enumerate(pipe.scheduler.visits):
            of_scale = improbability[:, scale.tokens]
            assert metrics["per_scale"][index] == pytest.approx(of_scale.mean().item(), abs=1e-5)
            assert metrics["accuracy"][index] == pytest.approx(is_best[:, scale.tokens].mean().item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["markov", "causal", "banded"])
def test_what_is_read_of_a_pyramid_is_the_state_before_each_scale(pattern):
    pipe = tiny_pipeline(pattern)
    tokens = make_tokens(pipe, 5)
    before = validate(pipe, DataLoader(tokens, batch_size=5))
    finest = pipe.scheduler.visits[-1].tokens
    tokens.token_ids[:, finest] = (tokens.token_ids[:, finest] + 1) % CODEBOOK_SIZE
    after = validate(pipe, DataLoader(tokens, batch_size=5))
    assert after["per_scale"][:-1] == before["per_scale"][:-1]
    assert after["per_scale"][-1] != before["per_scale"][-1]


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (4, [4]), (8, [8]), (16, [8, 8]), (11, [8])])
def test_pictures_come_in_equal_rows(count, rows):
    pipe = tiny_pipeline()
    drawn = draw(pipe, count, 2.5, seed=0)
    assert [len(row) for row in drawn] == rows
    assert all(row.shape[1:] == (3, 8, 8) for row in drawn)
    assert max(row.abs().max() for row in drawn) <= 1


def test_shown_pictures_are_spread_over_all_classes():
    pipe = tiny_pipeline()
    [drawn] = draw(pipe, 15, 3.0, seed=0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    expected = pipe([0, 0, 1, 1, 2, 3, 3, 4], guidance_scale=3.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(drawn, expected * 2 - 1)


def test_pictures_are_those_of_the_pipeline_with_classes_spread_over_all():
    pipe = tiny_pipeline()
    [drawn] = draw(pipe, 4, 3.0, seed=0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipe([0, 1, 2, 3], guidance_scale=3.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(drawn, expected * 2 - 1)
    [first] = draw(pipe, 1, 2.5, seed=0)
    generators = [torch.Generator().manual_seed(0)]
    torch.testing.assert_close(first, pipe(0, generator=generators, output_type="pt").images * 2 - 1)


def test_pictures_of_an_unconditional_model():
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0))
    [drawn] = draw(pipe, 4, 2.5, seed=0)
    assert drawn.shape == (4, 3, 8, 8)
    assert not torch.equal(drawn[0], drawn[1])


def test_pictures_of_a_guidance_distilled_model_have_no_guidance():
    pipe = tiny_pipeline(transformer=tiny_transformer(guidance_distilled=True))
    [drawn] = draw(pipe, 4, 5.0, seed=0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipe([0, 1, 2, 3], guidance_scale=1.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(drawn, expected * 2 - 1)


# Texts


@torch.no_grad()
def test_validation_tells_the_transformer_all_that_a_batch_has():
    pipe = tiny_text_pipeline()
    token_ids = torch.stack([pyramid["token_ids"] for pyramid in make_tokens(pipe, 2)])
    conditions = {**random_texts(), "original_size": torch.full((2, 2), 512.0), "crop_coords": torch.rand(2, 2) * 99}
    logits = pipe.transformer(pipe.vqvae.teacher_forcing_inputs(token_ids), **conditions).sample
    improbability = -logits.log_softmax(dim=-1).gather(-1, token_ids[..., None])
    loss = validate(pipe, [{"token_ids": token_ids, "conditions": conditions}])["loss"]
    assert loss == pytest.approx(improbability.mean().item(), abs=1e-5)


def test_pictures_of_texts_are_those_of_the_pipeline(tmp_path):
    pipe = tiny_text_pipeline()
    texts = ["ab", "", "abc", "ab"]
    prompts = cached_texts(pipe, ["", *texts], tmp_path)
    without = tiny_text_pipeline(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    for guidance_scale in (3.0, None):
        [drawn] = draw(without, 4, guidance_scale, 0, prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        expected = pipe(texts, guidance_scale=guidance_scale, generator=generators, output_type="pt").images
        torch.testing.assert_close(drawn, expected * 2 - 1, atol=1e-2, rtol=0)
