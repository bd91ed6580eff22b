import pytest
import torch
import torch.nn.functional as F

from srdd.models.quantizer_multiscale import MultiScaleQuantizer
from srdd.training.codebook_upkeep import CodebookTracker, low_usage, packed_lookups


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


def lookups_in_order(quantizer, latents) -> tuple[torch.Tensor, torch.Tensor]:
    """All features and the ids of their nearest codes, scale by scale, in a plain loop."""
    features = torch.cat(features_by_scale(quantizer, latents))
    return features, torch.cdist(features, quantizer.codebook.weight).argmin(dim=1)


@torch.no_grad()
def test_packed_lookups_are_all_features_with_their_codes():
    quantizer, latents = make_quantizer(), random_latents()
    features, token_ids = packed_lookups(quantizer, latents, SCALE_SIZES)
    expected_features, expected_ids = lookups_in_order(quantizer, latents)
    torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=0)
    assert torch.equal(token_ids, expected_ids)
    per_scale = [part.view(3, -1) for part in token_ids.split([3, 12, 48])]
    assert torch.equal(torch.cat(per_scale, dim=1), quantizer.quantize(latents, SCALE_SIZES))


@torch.no_grad()
def test_moved_codes_are_running_means_of_the_features_that_chose_them():
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE, latent_channels=4, decay=0.8)
    reference = make_quantizer()
    counts, sums = [0.0] * CODEBOOK_SIZE, [torch.zeros(4) for _ in range(CODEBOOK_SIZE)]
    for step in range(6):
        latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        features, token_ids = lookups_in_order(reference, latents)
        for code in range(CODEBOOK_SIZE):
            chosen = features[token_ids == code]
            counts[code] = 0.8 * counts[code] + 0.2 * len(chosen)
            sums[code] = 0.8 * sums[code] + 0.2 * chosen.sum(dim=0)
            if counts[code] >= 0.01:
                reference.codebook.weight[code] = sums[code] / counts[code]
        tracker.move_codes(quantizer, latents, SCALE_SIZES)
        torch.testing.assert_close(quantizer.codebook.weight, reference.codebook.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(tracker.counts, torch.tensor(counts), atol=1e-5, rtol=0)


@torch.no_grad()
def test_codes_that_nobody_chose_stay_where_they_are():
    quantizer, latents = make_quantizer(), random_latents()
    quantizer.codebook.weight[[3, 8]] = 100.0
    before = quantizer.codebook.weight.clone()
    _, token_ids = lookups_in_order(quantizer, latents)
    CodebookTracker(CODEBOOK_SIZE, latent_channels=4).move_codes(quantizer, latents, SCALE_SIZES)
    unused = [code for code in range(CODEBOOK_SIZE) if code not in token_ids]
    assert {3, 8} <= set(unused) < set(range(CODEBOOK_SIZE))
    assert torch.equal(quantizer.codebook.weight[unused], before[unused])
    used = token_ids.unique()
    assert (quantizer.codebook.weight[used] != before[used]).any(dim=1).all()


@torch.no_grad()
def test_codes_of_a_trained_codebook_start_where_they_are():
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE, latent_channels=4, decay=0.9)
    quantizer.codebook.weight[5] = 100.0
    before = quantizer.codebook.weight.clone()
    tracker.start_from(quantizer)
    assert len(tracker.revive(quantizer, random_latents(), SCALE_SIZES)) == 0
    features, token_ids = lookups_in_order(quantizer, random_latents())
    tracker.move_codes(quantizer, random_latents(), SCALE_SIZES)
    torch.testing.assert_close(quantizer.codebook.weight[5], before[5])
    code = int(token_ids[0])
    chosen = features[token_ids == code]
    expected = (0.9 * before[code] + 0.1 * chosen.sum(dim=0)) / (0.9 + 0.1 * len(chosen))
    torch.testing.assert_close(quantizer.codebook.weight[code], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_revived_code_starts_a_running_mean_of_its_own():
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE, latent_channels=4, decay=0.9)
    tracker.start_from(quantizer)
    tracker.sums[2], tracker.counts[2] = torch.tensor([7.0, 7.0, 7.0, 7.0]), 0.001
    revived = tracker.revive(quantizer, random_latents(), SCALE_SIZES, generator=torch.Generator().manual_seed(0))
    assert revived.tolist() == [2]
    place = quantizer.codebook.weight[2].clone()
    assert torch.equal(tracker.sums[2], place)
    assert tracker.counts[2] == 1
    far_away = random_latents() + 1000  # nothing that the code would choose
    quantizer.codebook.weight[0] = 1000.0
    tracker.move_codes(quantizer, far_away, [[1, 1]])
    torch.testing.assert_close(quantizer.codebook.weight[2], place)


def test_codes_move_without_gradients():
    quantizer = make_quantizer()
    latents = random_latents().requires_grad_()
    CodebookTracker(CODEBOOK_SIZE, latent_channels=4).move_codes(quantizer, latents, SCALE_SIZES)
    assert quantizer.codebook.weight.is_leaf
    assert quantizer.codebook.weight.requires_grad
    assert quantizer.codebook.weight.grad_fn is None


@torch.no_grad()
def test_running_means_survive_a_checkpoint(tmp_path):
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE, latent_channels=4)
    tracker.move_codes(quantizer, random_latents(), SCALE_SIZES)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    again = CodebookTracker(CODEBOOK_SIZE, latent_channels=4)
    again.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    other = make_quantizer()
    other.load_state_dict(quantizer.state_dict())
    for trackers in ((tracker, quantizer), (again, other)):
        trackers[0].move_codes(trackers[1], random_latents(), SCALE_SIZES)
    assert torch.equal(quantizer.codebook.weight, other.codebook.weight)
    assert torch.equal(tracker.counts, again.counts)
    assert torch.equal(tracker.sums, again.sums)


def test_a_tracker_that_only_counts_keeps_no_sums():
    quantizer, tracker = make_quantizer(), CodebookTracker(CODEBOOK_SIZE)
    tracker.start_from(quantizer)
    assert tracker.sums is None
    assert tracker.state_dict()["sums"] is None
    assert tracker.counts.tolist() == [1.0] * CODEBOOK_SIZE


@pytest.mark.parametrize(
    ("usage", "num_tokens", "threshold", "low"),
    [
        ([0.05, 0.5, 1.0], [1000, 1000, 1000], 0.1, [0]),
        ([0.05, 0.5, 1.0], [1000, 1000, 1000], 0.6, [0, 1]),
        # Ten tokens cannot use more than ten of the hundred codes.
        ([0.05, 0.05, 0.009], [10, 100, 10], 0.1, [1, 2]),
        ([0.05, 0.05, 0.009], [10, 100, 10], 0.6, [0, 1, 2]),
        ([0.1], [10], 1.0, []),
        ([0.0, 0.0], [100, 100], 0.0, []),
        ([], [], 0.5, []),
    ],
)
def test_low_usage_is_measured_by_what_a_scale_could_use(usage, num_tokens, threshold, low):
    assert low_usage(usage, num_tokens, 100, threshold) == low
