import json

import pytest
import torch
from tiny_models import tiny_pipeline

from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.evaluation.ablation_report import markdown, mean_and_interval, save_sweep
from srdd.evaluation.ablations import Measurements, read_tables
from srdd.evaluation.image_sources import PipelineImages


ROW = {"model": "SDD"}
TABLE = {"name": "t", "title": "A table", "kind": "samples", "rows": {"plain": ROW}}


def read(tmp_path, *tables, **defaults):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"tables": tables, "defaults": defaults}))
    return read_tables(path)


def test_defaults_and_rows_are_read(tmp_path):
    (table,) = read(tmp_path, TABLE, num_images=7, seeds=[1, 2])
    assert (table.num_images, table.seeds, table.axis) == (7, [1, 2], None)
    assert table.rows[0].name == "plain"
    assert table.rows[0].scheduler == {}


def test_a_sweep_makes_a_row_of_each_curve_and_value(tmp_path):
    curves = {
        "full": {"model": "SDD", "scheduler": {"resampling_policy": "masked"}},
        "given": {"model": "SDD", "options": {"num_resampling_passes": None}},
    }
    sweep = {"axis": "num_resampling_passes", "values": [1, 5], "curves": curves}
    (table,) = read(tmp_path, {"name": "t", "title": "A", "kind": "editing", "sweep": sweep})
    assert [row.name for row in table.rows] == [
        f"{curve}, num resampling passes {value}" for curve in curves for value in (1, 5)
    ]
    assert table.rows[1].scheduler == {"resampling_policy": "masked", "num_resampling_passes": 5}
    assert table.rows[2].options == {"num_resampling_passes": 1}
    assert table.axis == "num_resampling_passes"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "poems"}, "'kind' of the table 't' must be one of"),
        ({"tasks": ["3x"]}, "'tasks' of the table 't' must be among"),
        ({"colour": 1}, "The table 't' must have"),
        ({"rows": {"plain": {}}}, "The row 'plain' of 't' must have"),
        ({"rows": {"plain": {"model": "SDD", "guidance": 2}}}, "The row 'plain' of 't' must have"),
        ({"sweep": {}}, "must have either 'rows' or 'sweep'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**TABLE, **changes})


def test_files_without_tables_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="must hold 'tables'"):
        read_tables(path)


def test_rows_change_the_scheduler_and_leave_the_pipeline(tmp_path):
    (table,) = read(tmp_path, {**TABLE, "rows": {"MR": {**ROW, "scheduler": {"resampling_policy": "masked"}}}})
    pipe = tiny_pipeline()
    changed = table.rows[0].pipeline(pipe)
    assert changed.scheduler.config.resampling_policy == "masked"
    assert pipe.scheduler.config.resampling_policy == "none"
    assert changed.transformer is pipe.transformer


@torch.no_grad()
@pytest.mark.skipif(not MULTIPLIES_INT8, reason="The CPU has no VNNI.")
def test_rows_decode_in_int8_and_leave_the_pipeline(tmp_path):
    (table,) = read(tmp_path, {**TABLE, "rows": {"float32": ROW, "int8": {**ROW, "int8_decoding": True}}})
    pipe = tiny_pipeline()
    latents = PipelineImages(pipe, 4).draw(range(4), "latent")
    pictures = [row.pipeline(pipe).vqvae.decode(latents).sample for row in table.rows]
    assert torch.equal(pictures[0], pipe.vqvae.decode(latents).sample)
    assert not torch.equal(*pictures)
    assert (pictures[0] - pictures[1]).std() < 0.05 * pictures[0].std()


def test_cells_are_measured_once_until_their_row_changes(tmp_path):
    calls = []

    def measure():
        calls.append(len(calls))
        return {"frechet_distance": float(len(calls))}

    (table,) = read(tmp_path, TABLE)
    path = tmp_path / "out" / "ablations.json"
    for _ in range(2):
        assert Measurements(path, {"data": "a"}).cell(table, table.rows[0], "seed 0", measure)["frechet_distance"] == 1
    (changed,) = read(tmp_path, {**TABLE, "rows": {"plain": {**ROW, "guidance_scale": 3.0}}})
    assert Measurements(path, {"data": "a"}).cell(changed, changed.rows[0], "seed 0", measure)["frechet_distance"] == 2
    (larger,) = read(tmp_path, {**TABLE, "num_images": 9})
    Measurements(path, {"data": "a"}).cell(larger, larger.rows[0], "seed 0", measure)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="must hold measurements under the same settings"):
        Measurements(path, {"data": "b"})


def test_drawn_images_that_tables_share_are_measured_once(tmp_path):
    other = {**TABLE, "name": "u", "rows": {"the same": ROW, "guided": {**ROW, "guidance_scale": 3.0}}}
    scored = {**TABLE, "name": "v", "kind": "likelihood", "rows": {"the same": ROW}}
    tables = read(tmp_path, TABLE, other, scored)
    measurements, calls = Measurements(tmp_path / "cells.json", {}), []

    def measure():
        calls.append(len(calls))
        return {"frechet_distance": calls[-1]}

    rows = [(table, row) for table in tables for row in table.rows]
    found = [measurements.cell(table, row, "seed 0", measure)["frechet_distance"] for table, row in rows]
    # The same images under another name; other guidance; another measure of the same row.
    assert found == [0, 0, 1, 2]
    assert measurements.cell(*rows[1], "seed 1", measure)["frechet_distance"] == 3
    assert Measurements(tmp_path / "cells.json", {}).cell(*rows[1], "seed 0", measure)["frechet_distance"] == 0


def test_intervals_are_students_over_seeds_and_the_bootstraps_for_one():
    seeds = {f"seed {value}": {"frechet_distance": value} for value in (10.0, 12.0, 14.0)}
    mean, (low, high) = mean_and_interval(seeds, "frechet_distance")
    assert mean == 12
    # scipy.stats.t.interval(0.95, 2, loc=12, scale=2 / 3**0.5)
    assert (low, high) == pytest.approx((7.0317, 16.9683), abs=0.01)
    one = {"seed 0": {"frechet_distance": 3.0, "frechet_distance_interval": [2.0, 5.0]}}
    assert mean_and_interval(one, "frechet_distance") == (3.0, (2.0, 5.0))
    assert mean_and_interval({"all": {"bits": 3.0}}, "bits") == (3.0, None)


def test_tables_and_curves_are_written(tmp_path):
    (table,) = read(tmp_path, {"name": "t", "title": "Bits", "kind": "likelihood", "rows": {"a": ROW, "b": ROW}})
    text = markdown(table, {"a": {"all": {"all": 1.234}}, "b": {"all": {"all": 5.0}}})
    assert text.splitlines() == ["## Bits", "", "| likelihood | all |", "|---|---|", "| a | 1.23 |", "| b | 5.00 |"]
    sweep = {"axis": "scales", "values": [[1, 4], [1, 2, 4]], "curves": {"SDD": ROW}}
    (table,) = read(tmp_path, {"name": "t", "title": "Scales", "kind": "samples", "sweep": sweep})
    cells = {row.name: {"seed 0": {"frechet_distance": 3.0}} for row in table.rows}
    save_sweep(tmp_path / "curve.png", table, cells)
    assert (tmp_path / "curve.png").stat().st_size > 5000
