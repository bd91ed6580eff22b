import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import SAMPLE_SIZE, SCALE_SIZES, tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd import ScaleScheduler, SRDDInpaintPipeline
from srdd.evaluation.likelihood import log_likelihood


PATTERNS = ("causal", "markov", "banded")
SHORT = {"scales": [1, 4]}


class RecordingScheduler(ScaleScheduler):
    """A schedule that keeps the probabilities which its steps report."""

    def step(self, *args, **kwargs):
        output = super().step(*args, **kwargs)
        self.recorded.append(output.token_probabilities)
        return output


def lively_pipeline(pattern: str = "markov", scheduler=None):
    """A tiny pipeline that prefers some tokens clearly."""
    pipe = tiny_pipeline(pattern, scheduler=scheduler)
    with torch.no_grad():
        pipe.transformer.pos_embed.mul_(5)
        pipe.transformer.proj_out.weight.mul_(5)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(count: int, num_tokens: int = 21, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (count, num_tokens), generator=generator(seed))


@pytest.mark.parametrize("scales", [None, [[1, 1], [2, 2]]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_probabilities_of_all_pyramids_sum_to_one(pattern, scales):
    sizes = {"codebook_size": 3, "scale_sizes": [[1, 1], [1, 2], [2, 2]]}
    scheduler = tiny_scheduler(scale_sizes=sizes["scale_sizes"], scales=scales)
    pipe = tiny_pipeline(pattern, tiny_vqvae(sample_size=4, **sizes), tiny_transformer(pattern, **sizes), scheduler)
    token_ids = torch.tensor(list(itertools.product(range(3), repeat=scheduler.num_tokens)))
    for guidance_scale in (1.0, 4.0):
        likelihood = log_likelihood(pipe, token_ids=token_ids, class_labels=2, guidance_scale=guidance_scale)
        assert likelihood.nats.exp().sum().item() == pytest.approx(1, abs=1e-4)
        # The first scale is marginal: every token occurs with the same number of continuations.
        first = likelihood.per_scale[:, 0].exp().view(3, -1)
        assert first[:, 0].sum().item() == pytest.approx(1, abs=1e-5)
        assert (first - first[:, :1]).abs().max() < 1e-5


@pytest.mark.parametrize(("labels", "guidance_scale"), [(None, 1.0), ([1, 4, 0], 1.0), ([1, 4, 0], 3.0)])
@pytest.mark.parametrize("scales", [{}, SHORT])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_likelihood_is_the_product_of_what_sampling_reports(pattern, scales, labels, guidance_scale):
    scheduler = RecordingScheduler(scale_sizes=SCALE_SIZES, temperature=0.7, top_k=5, **scales)
    scheduler.recorded = []
    pipe = lively_pipeline(pattern, scheduler)
    images = {"num_images_per_prompt": 3} if labels is None else {}
    drawn = pipe(labels, guidance_scale, generator=generator(), output_type="latent", **images)
    likelihood = log_likelihood(pipe, token_ids=drawn.token_ids, class_labels=labels, guidance_scale=guidance_scale)
    reported = [probabilities.log() for probabilities in scheduler.recorded]
    torch.testing.assert_close(likelihood.token_log_likelihoods, torch.cat(reported, dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(likelihood.nats, sum(ids.sum(dim=1) for ids in reported), atol=1e-3, rtol=0)
    expected = torch.stack([ids.sum(dim=1) for ids in reported], dim=1)
    torch.testing.assert_close(likelihood.per_scale, expected, atol=1e-3, rtol=0)
    assert likelihood.scale_sizes == scheduler.scales
    assert torch.equal(likelihood.token_ids, drawn.token_ids)


def test_guidance_without_a_class_is_off():
    pipe, token_ids = lively_pipeline(), random_tokens(3)
    plain, guided = (log_likelihood(pipe, token_ids=token_ids, guidance_scale=g).nats for g in (1.0, 5.0))
    assert torch.equal(plain, guided)
    plain, guided = (log_likelihood(pipe, None, token_ids, 1, guidance_scale=g).nats for g in (1.0, 5.0))
    assert (plain - guided).abs().min() > 0.1


def test_bits_are_those_of_tokens():
    pipe, token_ids = lively_pipeline(), random_tokens(3)
    likelihood = log_likelihood(pipe, token_ids=token_ids)
    bits = -likelihood.nats / math.log(2)
    torch.testing.assert_close(likelihood.bits_per_token, bits / 21)
    with torch.no_grad():  # a model that knows nothing
        pipe.transformer.proj_out.weight.zero_()
        pipe.transformer.proj_out.bias.zero_()
    assert log_likelihood(pipe, token_ids=token_ids).bits_per_token.tolist() == pytest.approx([5] * 3, abs=1e-5)


@pytest.mark.parametrize("scales", [{}, SHORT])
def test_images_are_tokenised_over_the_scales_of_the_schedule(scales):
    pipe = lively_pipeline(scheduler=tiny_scheduler(**scales))
    images = torch.rand(2, 3, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator()).mul(255).round() / 255
    token_ids = pipe.vqvae.tokenize(images * 2 - 1, pipe.scheduler.scales)
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = pipe.image_processor.numpy_to_pil(arrays)
    expected = log_likelihood(pipe, token_ids=token_ids, class_labels=[0, 3])
    for form in (images, list(images), arrays, list(arrays), pictures):
        likelihood = log_likelihood(pipe, form, class_labels=[0, 3])
        assert torch.equal(likelihood.token_ids, token_ids)
        assert torch.equal(likelihood.nats, expected.nats)
    assert torch.equal(log_likelihood(pipe, pictures[0]).token_ids, token_ids[:1])


def test_one_pyramid_under_many_classes_and_many_under_one():
    pipe, token_ids = lively_pipeline(), random_tokens(3)
    many = log_likelihood(pipe, token_ids=token_ids[:1], class_labels=[0, "cherry", 4]).nats
    for index, label in enumerate((0, 2, 4)):
        one = log_likelihood(pipe, token_ids=token_ids, class_labels=label).nats
        assert many[index].item() == pytest.approx(one[0].item(), abs=1e-3)
    assert many.unique().numel() == 3


def test_batch_equals_single_pyramids():
    pipe, token_ids = lively_pipeline("causal"), random_tokens(4)
    whole = log_likelihood(pipe, token_ids=token_ids, class_labels=1, guidance_scale=2.0).nats
    alone = [log_likelihood(pipe, None, ids, 1, guidance_scale=2.0).nats for ids in token_ids.split(1)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-3, rtol=0)


def test_other_pipelines_dtypes_and_integers():
    pipe, token_ids = lively_pipeline(), random_tokens(3)
    full = log_likelihood(pipe, token_ids=token_ids)
    short = log_likelihood(pipe, token_ids=token_ids.int())
    assert torch.equal(short.nats, full.nats)
    assert short.token_ids.dtype == torch.long
    assert torch.equal(log_likelihood(SRDDInpaintPipeline.from_pipe(pipe), token_ids=token_ids).nats, full.nats)
    assert not full.nats.requires_grad
    half = log_likelihood(pipe.to(torch.bfloat16), token_ids=token_ids)
    assert half.nats.dtype == torch.float32
    torch.testing.assert_close(half.nats, full.nats, atol=0, rtol=0.05)


def test_a_models_own_samples_are_likelier_than_noise():
    pipe = lively_pipeline()
    own = pipe(1, 1.0, num_images_per_prompt=8, generator=generator(), output_type="latent").token_ids
    noise = torch.rand(8, 3, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator())
    assert log_likelihood(pipe, token_ids=own, class_labels=1).nats.min() > -60
    assert log_likelihood(pipe, noise, class_labels=1).nats.max() < -60


def test_fruit_of_the_bundled_model_is_likelier_than_shuffled_fruit_and_than_other_fruit(bundled_pipe, drawn_fruit):
    labels, images = drawn_fruit
    fruit = log_likelihood(bundled_pipe, images, class_labels=labels)
    blocks = images.unflatten(3, (4, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.randperm(16, generator=generator())
    shuffled = blocks[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    assert sorted(shuffled[0].flatten().tolist()) == sorted(images[0].flatten().tolist())
    broken = log_likelihood(bundled_pipe, shuffled, class_labels=labels)
    other = log_likelihood(bundled_pipe, images, class_labels=labels[1:] + labels[:1])
    assert (fruit.nats > broken.nats + 500).all()
    assert (fruit.nats > other.nats + 200).all()
    assert fruit.bits_per_token.max() < 8 < broken.bits_per_token.min()


def test_errors():
    pipe, token_ids = lively_pipeline(), random_tokens(2)
    image = np.zeros((1, SAMPLE_SIZE, SAMPLE_SIZE, 3), dtype=np.float32)
    for arguments, given in (({}, "neither"), ({"images": image, "token_ids": token_ids}, "both")):
        with pytest.raises(ValueError, match=f"takes one of `images` and `token_ids`, got {given}"):
            log_likelihood(pipe, **arguments)
    for wrong in (token_ids[:, :5], token_ids[0], token_ids[:0], token_ids.float()):
        with pytest.raises(ValueError, match=r"`token_ids` must be integers of shape \(batch, 21\)"):
            log_likelihood(pipe, token_ids=wrong)
    for wrong in (token_ids - 1, token_ids + 31):
        with pytest.raises(ValueError, match=r"`token_ids` must lie in \[0, 31\]"):
            log_likelihood(pipe, token_ids=wrong)
    picture = pipe.image_processor.numpy_to_pil(np.zeros((1, 8, 9, 3), dtype=np.float32))[0]
    for wrong in (picture, [picture], torch.zeros(1, 3, 8, 9), np.zeros((1, 8, 9, 3)), [torch.zeros(3, 8, 9)]):
        with pytest.raises(
            ValueError, match=r"`images` must have the model's height and width \(8, 8\), got \(8, 9\)"
        ):
            log_likelihood(pipe, wrong)
    with pytest.raises(ValueError, match="`class_labels` must lie in"):
        log_likelihood(pipe, token_ids=token_ids, class_labels=5)
    with pytest.raises(ValueError, match="`class_labels` must hold 1 or 2 labels for 2 images, got 3"):
        log_likelihood(pipe, token_ids=token_ids, class_labels=[0, 1, 2])
    pipe.scheduler = ScaleScheduler(scale_sizes=[1, 4])
    with pytest.raises(ValueError, match="`scheduler.config.scale_sizes` must be the scales of the transformer"):
        log_likelihood(pipe, token_ids=token_ids)
