"""Labels, guidance and the fit of the components; the loop itself is tested through the pipelines."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import LATENT_CHANNELS, tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd import ScaleKVCache
from srdd.pipelines.scale_sampling import GuidedTransformer, check_components, label_ids


ID2LABEL = {0: "apple", 1: "crane, bird", 2: "crane, machine", 3: "tomato, love apple"}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (2, [2]),
        ("apple", [0]),
        ("tomato", [3]),
        ("love apple", [3]),
        ("tomato, love apple", [3]),
        ("crane, machine", [2]),
        ("bird", [1]),
        ([1, "apple", "tomato", 1], [1, 0, 3, 1]),
        ((3, 0), [3, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(2), [2]),
        (np.int64(2), [2]),
        (np.array([3, 1]), [3, 1]),
    ],
)
def test_labels_by_id_and_by_name(labels, expected):
    assert label_ids(labels, 4, ID2LABEL) == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("crane", r"`class_labels` must name one class each, but 'crane' names the classes \[1, 2\]"),
        ("Apple", r"`class_labels` must be names of classes \(apple, crane, bird, .*\) or ids, got 'Apple'"),
        ("", "`class_labels` must be names of classes .* got ''"),
        ("love", "`class_labels` must be names of classes .* got 'love'"),
        (4, r"`class_labels` must lie in \[0, 3\], got 4"),
        ([0, -1], r"`class_labels` must lie in \[0, 3\], got -1"),
        (True, r"`class_labels` must lie in \[0, 3\], got True"),
        ([1.0], r"`class_labels` must lie in \[0, 3\], got 1.0"),
        ([None], r"`class_labels` must lie in \[0, 3\], got None"),
        (torch.tensor([0.5]), r"`class_labels` must lie in \[0, 3\], got 0.5"),
        ([], r"`class_labels` must hold at least one label, got \[\]"),
        (torch.tensor([], dtype=torch.long), r"`class_labels` must hold at least one label, got \[\]"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_ids(labels, 4, ID2LABEL)


def test_two_classes_of_one_name_cannot_be_named():
    with pytest.raises(ValueError, match=r"'pear' names the classes \[0, 5\]"):
        label_ids("pear", 6, {0: "pear", 5: "pear"})
    assert label_ids(5, 6, {0: "pear", 5: "pear"}) == [5]


def test_a_model_without_names_or_classes():
    with pytest.raises(ValueError, match=r"names of classes \(none\) or ids, got 'apple'"):
        label_ids("apple", 4, {})
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, got 0"):
        label_ids(0, 0, {})


def test_a_long_list_of_names_is_cut_short():
    with pytest.raises(ValueError, match=r"name 00, .*name 09 … \(12 in all\)"):
        label_ids("pear", 12, {index: f"name {index:02}" for index in range(12)})


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.7, 4.0])
@pytest.mark.parametrize("pattern", ["causal", "markov", "banded"])
def test_guidance_is_one_plus_w_times_cond_minus_w_times_uncond(pattern, weight):
    transformer, labels = tiny_transformer(pattern), torch.tensor([1, 4])
    inputs = torch.randn(2, 21, LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
    cond, uncond = (transformer(inputs, class_labels=which).sample for which in (labels, None))
    guided = GuidedTransformer(transformer, labels)
    logits, _ = guided(inputs, [2, 1, 0], weight)
    torch.testing.assert_close(logits, (1 + weight) * cond - weight * uncond, atol=1e-5, rtol=0)
    kept, _ = guided(inputs, [2, 1, 0], weight, keep_unconditional=True)
    torch.testing.assert_close(kept, logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("keep", "cached"), [(False, 2), (True, 4)])
def test_the_unconditional_half_is_cached_where_later_scales_need_it(keep, cached):
    transformer, cache = tiny_transformer("causal"), ScaleKVCache()
    x = torch.zeros(2, 1, LATENT_CHANNELS)
    GuidedTransformer(transformer, torch.tensor([1, 4]))(x, 2, 0.0, cache, keep_unconditional=keep)
    assert cache.get(0, [2])[0].shape[0] == cached


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": DDIMScheduler()}, "`scheduler` must be a ScaleScheduler, got DDIMScheduler"),
        (
            {"scheduler": tiny_scheduler(scale_sizes=[1, 4])},
            r"must be the scales of the transformer, \[\[1, 1\], \[2, 2\], \[4, 4\]\], got \[\[1, 1\], \[4, 4\]\]",
        ),
        ({"vqvae": tiny_vqvae(codebook_size=40)}, "must have the same codebook_size, got 40 and 32"),
        ({"vqvae": tiny_vqvae(latent_channels=4)}, "must have the same latent_channels, got 4 and 8"),
        (
            {"vqvae": tiny_vqvae(sample_size=10, scale_sizes=[1, 5])},
            r"must have the same latent grid, got \[5, 5\] and \[4, 4\]",
        ),
    ],
)
def test_components_that_do_not_fit_are_refused(change, message):
    components = {"vqvae": tiny_vqvae(), "transformer": tiny_transformer(), "scheduler": tiny_scheduler()}
    check_components(**components)
    with pytest.raises(ValueError, match=message):
        check_components(**{**components, **change})


def test_a_tokenizer_may_have_scales_of_its_own():
    check_components(tiny_vqvae(scale_sizes=[1, 3, 4]), tiny_transformer(), tiny_scheduler(scales=[1, 4]))
