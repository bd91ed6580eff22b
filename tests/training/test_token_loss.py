import math

import pytest
import torch

from srdd.training.token_loss import token_loss


SCALE_SIZES = [[1, 1], [1, 2], [2, 2]]
COUNTS = [1, 2, 4]
CODEBOOK_SIZE = 5


def random_batch(batch_size: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.LongTensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch_size, 7, CODEBOOK_SIZE, generator=generator)
    return logits.to(dtype), torch.randint(CODEBOOK_SIZE, (batch_size, 7), generator=generator)


def plain_losses(logits, token_ids, label_smoothing: float = 0.0) -> list[list[float]]:
    """Cross-entropy of every token, image by image."""
    losses = []
    for image_logits, image_ids in zip(logits.tolist(), token_ids.tolist()):
        losses.append([])
        for row, token_id in zip(image_logits, image_ids):
            total = math.log(sum(math.exp(value) for value in row))
            wanted = [label_smoothing / len(row) + (1 - label_smoothing) * (v == token_id) for v in range(len(row))]
            losses[-1].append(sum(share * (total - value) for share, value in zip(wanted, row)))
    return losses


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_loss_is_the_mean_over_all_tokens(label_smoothing):
    logits, token_ids = random_batch()
    plain = plain_losses(logits, token_ids, label_smoothing)
    result = token_loss(logits, token_ids, SCALE_SIZES, label_smoothing)
    assert result.loss.item() == pytest.approx(mean(value for row in plain for value in row), abs=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [4.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.5, 0.0, 0.1]])
def test_weights_count_tokens_of_a_scale_more(weights, label_smoothing):
    logits, token_ids = random_batch()
    total = weight_sum = 0.0
    for row in plain_losses(logits, token_ids, label_smoothing):
        for scale, start in enumerate((0, 1, 3)):
            for value in row[start : start + COUNTS[scale]]:
                total += weights[scale] * value
                weight_sum += weights[scale]
    result = token_loss(logits, token_ids, SCALE_SIZES, label_smoothing, scale_weights=weights)
    assert result.loss.item() == pytest.approx(total / weight_sum, abs=1e-5)


def test_only_the_proportions_of_weights_matter():
    logits, token_ids = random_batch()
    small, large = ([factor * weight for weight in (3, 2, 1)] for factor in (1e-3, 1e3))
    left, right = (token_loss(logits, token_ids, SCALE_SIZES, scale_weights=weights) for weights in (small, large))
    torch.testing.assert_close(left.loss, right.loss)


def test_statistics_are_per_scale_and_do_not_depend_on_the_weights():
    logits, token_ids = random_batch()
    plain = plain_losses(logits, token_ids)
    result = token_loss(logits, token_ids, SCALE_SIZES, scale_weights=[9, 1, 0])
    parts = [slice(0, 1), slice(1, 3), slice(3, 7)]
    expected = [mean(value for row in plain for value in row[part]) for part in parts]
    assert result.per_scale.tolist() == pytest.approx(expected, abs=1e-5)
    hits = [
        mean(
            float(max(range(CODEBOOK_SIZE), key=values.__getitem__) == token_id)
            for row, ids in zip(logits.tolist(), token_ids.tolist())
            for values, token_id in zip(row[part], ids[part])
        )
        for part in parts
    ]
    assert result.accuracy.tolist() == pytest.approx(hits)
    assert 0 < sum(hits) < 3


def test_accuracy_of_a_model_that_knows():
    _, token_ids = random_batch()
    logits = 50 * torch.nn.functional.one_hot(token_ids, CODEBOOK_SIZE).float()
    result = token_loss(logits, token_ids, SCALE_SIZES)
    assert result.accuracy.tolist() == [1, 1, 1]
    assert result.loss.item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_summed_in_float32():
    logits, token_ids = random_batch(dtype=torch.bfloat16)
    result = token_loss(logits, token_ids, SCALE_SIZES)
    assert result.loss.dtype == result.per_scale.dtype == torch.float32
    assert torch.equal(result.loss, token_loss(logits.float(), token_ids, SCALE_SIZES).loss)


def test_gradient_reaches_the_logits_through_the_loss_alone():
    logits, token_ids = random_batch()
    logits.requires_grad_()
    result = token_loss(logits, token_ids, SCALE_SIZES, scale_weights=[1.0, 0.0, 1.0])
    assert not result.per_scale.requires_grad
    assert not result.accuracy.requires_grad
    result.loss.backward()
    assert (logits.grad[:, 1:3] == 0).all()
    assert (logits.grad[:, 3:].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0], [1.0] * 4, [1.0, -0.1, 1.0], [0.0, 0.0, 0.0]])
def test_bad_weights_are_refused(weights):
    logits, token_ids = random_batch()
    with pytest.raises(ValueError, match=r"`scale_weights` must be 3 numbers, none negative and not all zero, got \["):
        token_loss(logits, token_ids, SCALE_SIZES, scale_weights=weights)


def test_scales_are_named_as_in_the_loss_log():
    result = token_loss(*random_batch(), SCALE_SIZES)
    values = result.by_scale(SCALE_SIZES)
    sizes = ["1x1", "1x2", "2x2"]
    assert list(values) == [f"loss/{size}" for size in sizes] + [f"accuracy/{size}" for size in sizes]
    assert [values[f"loss/{size}"] for size in sizes] == result.per_scale.tolist()
    assert [values[f"accuracy/{size}"] for size in sizes] == result.accuracy.tolist()
