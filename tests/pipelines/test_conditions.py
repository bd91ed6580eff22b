import numpy as np
import pytest
import torch

from srdd.pipelines.conditions import Conditions, class_conditions, label_ids


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
        (
            "Apple",
            r"`class_labels` must be names of classes \(apple, crane, bird, .*\) or ids, got 'Apple'\. Did you mean"
            r" 'apple'\?$",
        ),
        (["apple", "tomatoe"], r"got 'tomatoe'\. Did you mean 'tomato'\?$"),
        ("pear tree", r"got 'pear tree'\.$"),
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


def test_classes_are_told_with_the_null_class_beside_them():
    conditions = class_conditions(["apple", 3], 4, ID2LABEL)
    assert conditions.batch_size == 2
    assert conditions.conditional["class_labels"].tolist() == [0, 3]
    assert conditions.unconditional["class_labels"].tolist() == [4, 4]


def test_without_a_class_there_is_nothing_to_guide_away_from():
    conditions = class_conditions(None, 4, ID2LABEL)
    assert conditions.conditional["class_labels"].tolist() == [4]
    assert conditions.unconditional is None
    repeated = conditions.repeat_interleave(3)
    assert repeated.conditional["class_labels"].tolist() == [4, 4, 4]
    assert repeated.unconditional is None


def test_every_image_may_be_told_several_times():
    prompts, null = torch.randn(2, 5, 3), torch.zeros(2, 5, 3)
    conditions = Conditions(2, {"text": prompts, "size": torch.arange(2)}, {"text": null, "size": torch.arange(2)})
    repeated = conditions.repeat_interleave(2)
    assert repeated.batch_size == 4
    assert repeated.conditional["size"].tolist() == repeated.unconditional["size"].tolist() == [0, 0, 1, 1]
    assert torch.equal(repeated.conditional["text"], prompts[[0, 0, 1, 1]])


def test_a_whole_name_wins_over_synonyms_and_digits_may_be_names():
    names = {0: "Tomato", 1: "Tomato, red", 2: "7", 3: "plum"}
    assert label_ids(["Tomato", "red", "Tomato, red"], 4, names) == [0, 1, 1]
    assert label_ids(["7", 2, "3", "1"], 4, names) == [2, 2, 3, 1]
    with pytest.raises(ValueError, match=r"`class_labels` must lie in \[0, 3\], got 8"):
        label_ids("8", 4, names)
    with pytest.raises(ValueError, match="names of classes .* got '-1'"):
        label_ids("-1", 4, names)


@pytest.mark.parametrize(
    "labels", [{"apple": 1}, {"apple"}, 1.0, object(), [["apple"]], [None], b"apple", float("nan")]
)
def test_labels_of_other_kinds_are_refused(labels):
    with pytest.raises(ValueError, match="`class_labels` must"):
        label_ids(labels, 4, ID2LABEL)


def test_names_by_ids_in_text_as_a_config_has_them():
    assert label_ids(["tomato", 0], 4, {str(index): name for index, name in ID2LABEL.items()}) == [3, 0]
