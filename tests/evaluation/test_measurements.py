import json

import pytest

from srdd.evaluation.measurements import Measurements


CELL = {"model": "SDD", "scales": (1, 2)}


class Counted:
    """A measurement that tells how often it was made."""

    count = 0

    def __call__(self) -> dict:
        self.count += 1
        return {"value": self.count}


@pytest.mark.parametrize("kept", [True, False])
def test_cells_are_measured_once_until_their_settings_change(tmp_path, kept):
    path, call = (tmp_path / "new" / "cells.json" if kept else None), Counted()
    measurements = Measurements(path)
    assert measurements.find(CELL) is None
    assert measurements.measure(CELL, call) == measurements.find(CELL) == {"value": 1}
    # The order of settings does not count, nor whether a list is a tuple.
    assert measurements.measure({"scales": [1, 2], "model": "SDD"}, call) == {"value": 1}
    assert measurements.measure({**CELL, "seed": 1}, call) == {"value": 2}
    assert measurements.measure(CELL, call, again=True) == {"value": 3}
    assert list(tmp_path.iterdir()) == ([tmp_path / "new"] if kept else [])


def test_another_run_goes_on_with_the_same_file(tmp_path):
    path, call = tmp_path / "cells.json", Counted()
    Measurements(path, {"data": "a"}).measure(CELL, call)
    again = Measurements(path, {"data": "a"})
    assert again.measure(CELL, call) == {"value": 1}
    again.measure({"model": "VAR"}, call)
    assert [cell["result"] for cell in json.loads(path.read_text())["cells"]] == [{"value": 1}, {"value": 2}]
    assert [each.name for each in tmp_path.iterdir()] == ["cells.json"]


def test_a_measurement_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "cells.json"
    measurements = Measurements(path)
    measurements.measure(CELL, Counted())
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        measurements.measure({"model": "VAR"}, lambda: {"value": 1 / 0})
    with pytest.raises(TypeError):
        measurements.measure({"model": "VAR"}, lambda: {"value": path})
    assert path.read_bytes() == before
    assert Measurements(path).find({"model": "VAR"}) is None


def test_other_settings_want_another_file(tmp_path):
    path = tmp_path / "cells.json"
    Measurements(path, {"dtype": "float32"}).measure(CELL, Counted())
    with pytest.raises(ValueError, match="the same settings, {'dtype': 'bfloat16'}, or .* 'float32'"):
        Measurements(path, {"dtype": "bfloat16"})


def test_cells_of_models_that_changed_are_forgotten(tmp_path, caplog):
    path, call = tmp_path / "cells.json", Counted()
    first = Measurements(path, models={"SDD": "a", "VAR": "b"})
    cells = [CELL, {"model": "VAR"}, {"model": "none"}, {"kind": "real images"}]
    assert [first.measure(cell, call)["value"] for cell in cells] == [1, 2, 3, 4]
    assert json.loads(path.read_text())["models"] == {"SDD": "a", "VAR": "b"}
    # Of models that a run does not name nothing is known to have changed.
    assert [Measurements(path, models={"SDD": "a"}).find(cell)["value"] for cell in cells] == [1, 2, 3, 4]
    assert not caplog.records
    before = path.read_bytes()
    other = Measurements(path, models={"SDD": "c", "new": "d"})
    assert path.read_bytes() == before
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has other models by the names ['SDD']: 1 of its 4 cells are forgotten, and measured anew where they"
        " are asked for."
    ]
    assert [other.measure(cell, call)["value"] for cell in cells] == [5, 2, 3, 4]
    assert json.loads(path.read_text())["models"] == {"SDD": "c", "VAR": "b", "new": "d"}


def test_files_that_do_not_say_what_was_measured_are_forgotten(tmp_path, caplog):
    path, call = tmp_path / "cells.json", Counted()
    Measurements(path, {"data": "a"}).measure(CELL, call)
    measurements = Measurements(path, {"data": "a", "images": "b"}, models={"SDD": "a"})
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} does not say what its models were: its 1 cells are forgotten, and measured anew where they are asked"
        " for."
    ]
    assert measurements.measure(CELL, call) == {"value": 2}
    assert Measurements(path, {"data": "a", "images": "b"}, models={"SDD": "a"}).find(CELL) == {"value": 2}


def test_files_of_other_things_are_refused(tmp_path):
    path = tmp_path / "cells.json"
    path.write_text('{"settings": {}, "cells": {"table": {}}}')
    with pytest.raises(ValueError, match="`path` must be a file of measurements, with a list of 'cells', got"):
        Measurements(path)
