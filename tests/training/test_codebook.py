import pytest
import torch
import torch.nn.functional as F

from srdd.models.quantizer_multiscale import MultiScaleQuantizer
from srdd.training.codebook import CodebookTracker


SCALE_SIZES = [[1, 1], [2, 2], [4, 4]]
CODEBOOK_SIZE = 12


def make_quantizer() -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(CODEBOOK_SIZE, latent_channels=4, scale_sizes=SCALE_SIZES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return quantizer


def random_latents() -> torch.Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def features_by_scale(quantizer, latents) -> list[torch.Tensor]:
    """What every scale looked codes up for, in a plain loop."""
    rest, features = latents, []
    for height, width in SCALE_SIZES:
        small = F.adaptive_avg_pool2d(rest, (height, width))
        features.append(
            torch.stack([small[b, :, i, j] for b in range(3) for i in range(height) for j in range(width)])
        )
        distances = torch.cdist(features[-1], quantizer.codebook.weight)
        rest = rest - quantizer.residual_map(distances.argmin(1).view(3, height, width), (4, 4))
    return features


def test_counts_are_a_running_mean_of_the_uses_per_step():
    tracker, expected = CodebookTracker(5, decay=0.9), torch.zeros(5)
    for step in range(20):
        token_ids = torch.randint(4, (2, 7), generator=torch.Generator().manual_seed(step))
        tracker.update(token_ids)
        for code in range(5):
            expected[code] = 0.9 * expected[code] + 0.1 * (token_ids == code).sum()
    torch.testing.assert_close(tracker.counts, expected, atol=1e-5, rtol=0)
    assert tracker.counts[4] == 0


def test_counts_settle_at_the_uses_per_step():
    tracker = CodebookTracker(3)
    for _ in range(1000):
        tracker.update(torch.tensor([[0, 0, 2]]))
    assert tracker.counts.tolist() == pytest.approx([2.0, 0.0, 1.0], abs=1e-4)


def test_state_survives_a_checkpoint():
    tracker, again = CodebookTracker(5), CodebookTracker(5)
    tracker.update(torch.tensor([1, 1, 3]))
    again.load_state_dict(tracker.state_dict())
    assert torch.equal(again.counts, tracker.counts)
    again.update(torch.tensor([0]))
    assert tracker.counts[0] == 0


def test_only_dead_codes_move_and_onto_features_that_were_seen():
    quantizer, latents = make_quantizer(), random_latents()
    before = quantizer.codebook.weight.detach().clone()
    with torch.no_grad():
        features = torch.cat(features_by_scale(quantizer, latents))
    tracker = CodebookTracker(CODEBOOK_SIZE)
    tracker.counts.fill_(1.0)
    tracker.counts[[2, 5, 11]] = torch.tensor([0.0, 0.009, 0.0])
    tracker.counts[7] = 0.01
    revived = tracker.revive(quantizer, latents, SCALE_SIZES, generator=torch.Generator().manual_seed(0))
    assert revived.tolist() == [2, 5, 11]
    after = quantizer.codebook.weight.detach()
    alive = [code for code in range(CODEBOOK_SIZE) if code not in (2, 5, 11)]
    assert torch.equal(after[alive], before[alive])
    distances = (after[revived].unsqueeze(1) - features).abs().amax(dim=2)
    assert distances.min(dim=1).values.max() < 1e-5
    assert tracker.counts[revived].tolist() == [1.0, 1.0, 1.0]
    assert len(tracker.revive(quantizer, latents, SCALE_SIZES)) == 0


def test_at_first_all_codes_are_idle():
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE)
    revived = tracker.revive(quantizer, random_latents(), SCALE_SIZES, generator=torch.Generator().manual_seed(0))
    assert revived.tolist() == list(range(CODEBOOK_SIZE))


def test_every_scale_gives_as_many_codes():
    quantizer = MultiScaleQuantizer(3000, latent_channels=4, scale_sizes=SCALE_SIZES)
    latents = random_latents()
    with torch.no_grad():
        features = features_by_scale(quantizer, latents)
    tracker = CodebookTracker(3000)
    tracker.revive(quantizer, latents, SCALE_SIZES, generator=torch.Generator().manual_seed(0))
    codes = quantizer.codebook.weight.detach()
    distances = torch.stack([torch.cdist(codes, seen).min(dim=1).values for seen in features])
    per_scale = distances.argmin(dim=0).bincount(minlength=3)
    assert (per_scale - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5


def test_revival_follows_its_generator_and_keeps_no_gradient():
    codes = []
    for seed in (0, 0, 1):
        quantizer = make_quantizer()
        latents = random_latents().requires_grad_()
        CodebookTracker(CODEBOOK_SIZE).revive(
            quantizer, latents, SCALE_SIZES, generator=torch.Generator().manual_seed(seed)
        )
        assert quantizer.codebook.weight.is_leaf
        assert quantizer.codebook.weight.requires_grad
        codes.append(quantizer.codebook.weight.detach())
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
