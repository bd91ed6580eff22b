import pytest

from srdd.evaluation.tables import markdown_table, readable, scale_name, speed_ratio, with_range


def test_tables_have_a_line_for_each_row():
    assert markdown_table(["", "a"], [["x", 1], ["y", ""]]) == "|  | a |\n|---|---|\n| x | 1 |\n| y |  |\n"
    assert markdown_table(["a"], iter([])) == "| a |\n|---|\n"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"`rows` must have 2 cells each, got \['x'\]"):
        markdown_table(["a", "b"], [["x"]])


def test_ranges_stand_behind_their_value():
    assert with_range(2.0, (1.5, 2.25), 1) == "2.0 (1.5–2.2)"
    assert with_range(0.9104, None, 3) == "0.910"
    assert with_range(-0.1, (-0.4, 0.2), 1) == "-0.1 (-0.4 to 0.2)"
    # Round by round 2, 4 and 1.
    assert speed_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 6.0]) == "2.00 (1.00–4.00)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (0.123456, "0.1235"),
        (12345.6, "12346"),
        (float("inf"), "inf"),
        (3, "3"),
        ([[1, 1], [2, 3]], "1 2x3"),
        ([0.5, None], "0.5, none"),
        ("masked", "masked"),
    ],
)
def test_values_are_readable(value, text):
    assert readable(value) == text


def test_square_scales_are_one_number():
    assert [scale_name(size) for size in ((4, 4), [4, 2])] == ["4", "4x2"]
