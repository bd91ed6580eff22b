import json
from pathlib import Path

import pytest
from tiny_models import tiny_latent_diffusion, tiny_pipeline, tiny_scheduler, tiny_transformer

from srdd.evaluation.ablation_report import ablation_markdown, mean_and_interval, save_sweep
from srdd.evaluation.ablations import model_keys, read_tables
from srdd.evaluation.latent_diffusion import load_drawing_pipeline
from srdd.evaluation.measurements import Measurements
from srdd.scales import default_scale_sizes


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
        ({"rows": {"plain": {"model": "SDD", "variant": "int9"}}}, "Variants must be named .* got 'int9'"),
        ({"sweep": {}}, "must have either 'rows' or 'sweep'"),
        ({"rows": {"plain": {"model": ["a", "b"]}}, "seeds": [0]}, r"each of the 1 'seeds', got lists of \[2\]"),
        ({"rows": {"plain": {"model": ["a"]}}, "kind": "editing"}, "where nothing is edited"),
        ({"differences": [["plain", "fancy"]]}, r"'differences' of the table 't' must be pairs of"),
        ({"differences": [["plain", "plain"]], "kind": "editing"}, "'differences' of the table 't' must be empty"),
        ({"seeds": [0, 1], "kind": "editing"}, r"'seeds' of the table 't' must be one, .* got \[0, 1\]"),
        ({"seeds": [0, 1], "kind": "likelihood"}, r"'seeds' of the table 't' must be one, .* got \[0, 1\]"),
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


def test_rows_say_more_than_their_variant(tmp_path):
    row = {**ROW, "variant": "sdd-interval-unguided", "scheduler": {"resampling_policy": "simple"}}
    (table,) = read(tmp_path, {**TABLE, "rows": {"plain": row, "guided": {**row, "guidance_scale": 3.0}}})
    plain, guided = (each.changes for each in table.rows)
    assert plain.attention_pattern == guided.attention_pattern == "markov"
    assert plain.scheduler == guided.scheduler == {"guidance_stop": 0.8, "resampling_policy": "simple"}
    assert (plain.guidance_scale, guided.guidance_scale) == (1.0, 3.0)
    assert plain.pipeline(tiny_pipeline()).scheduler.config.resampling_policy == "simple"


def test_cells_that_tables_share_are_measured_once(tmp_path):
    rows = {"the same": ROW, "guided": {**ROW, "guidance_scale": 3.0}, "int8": {**ROW, "variant": "int8"}}
    tables = read(
        tmp_path,
        TABLE,
        {**TABLE, "name": "u", "rows": rows},
        {**TABLE, "name": "v", "kind": "likelihood", "rows": {"the same": ROW}},
        {**TABLE, "name": "w", "num_images": 9},
    )
    measurements, calls = Measurements(tmp_path / "cells.json"), []

    def measure():
        calls.append(len(calls))
        return {"frechet_distance": calls[-1]}

    cells = [table.cell(row, table.columns[0]) for table in tables for row in table.rows]
    # The same images under another name; other guidance, variant, kind or number.
    assert [measurements.measure(cell, measure)["frechet_distance"] for cell in cells] == [0, 0, 1, 2, 3, 4]
    other_seed = tables[0].cell(tables[0].rows[0], "seed 1")
    assert measurements.measure(other_seed, measure)["frechet_distance"] == 5


@pytest.mark.parametrize("name", ["ablations", "bundled", "editing"])
def test_the_tables_of_the_project_can_be_measured(name):
    tables = read_tables(Path(__file__).parents[2] / "benchmarks" / f"{name}.json")
    assert tables
    for row in [row for table in tables for row in table.rows if row.model != "none"]:
        if row.models[0].startswith(("LDM", "DiT")):
            row.changes.pipeline(tiny_latent_diffusion())  # raises if a value is none, as the next line does
        else:
            scale_sizes = default_scale_sizes(16) if name == "bundled" else [1, 2, 3, 4, 5, 6, 8]
            tiny_scheduler(scale_sizes=scale_sizes, **row.changes.scheduler)


def test_intervals_are_students_over_seeds_and_the_bootstraps_for_one():
    seeds = {f"seed {value}": {"frechet_distance": value} for value in (10.0, 12.0, 14.0)}
    mean, (low, high) = mean_and_interval(seeds, "frechet_distance")
    assert mean == 12
    # scipy.stats.t.interval(0.95, 2, loc=12, scale=2 / 3**0.5)
    assert (low, high) == pytest.approx((7.0317, 16.9683), abs=0.01)
    one = {"seed 0": {"frechet_distance": 3.0, "frechet_distance_interval": [2.0, 5.0]}}
    assert mean_and_interval(one, "frechet_distance") == (3.0, (2.0, 5.0))
    assert mean_and_interval({"all": {"bits": 3.0}}, "bits") == (3.0, None)


def test_rows_of_several_trainings_have_one_model_for_each_seed(tmp_path):
    fields = {"name": "t", "title": "A", "seeds": [3, 5], "differences": [["new", "old"]]}
    rows = {"old": {"model": ["a0", "a1"]}, "new": {"model": ["b0", "b1"]}, "third": {"model": "c"}}
    drawn, scored = (read(tmp_path, {**fields, "kind": kind, "rows": rows})[0] for kind in ("samples", "likelihood"))
    for table in (drawn, scored):
        assert table.columns == ["seed 3", "seed 5"]
        models = [[table.cell(row, column)["model"] for column in table.columns] for row in table.rows]
        assert models == [["a0", "a1"], ["b0", "b1"], ["c", "c"]]
    # The cell of a row that names this model alone.
    (alone,) = read(tmp_path, {**fields, "differences": [], "kind": "samples", "rows": {"x": {"model": "b1"}}})
    assert drawn.cell(drawn.rows[1], "seed 5") == alone.cell(alone.rows[0], "seed 5")
    results = {
        name: {column: {"all": value} for column, value in zip(drawn.columns, values)}
        for name, values in (("old", (4.0, 5.0)), ("new", (3.0, 3.6)), ("third", (1.0, 1.0)))
    }
    lines = ablation_markdown(scored, results).splitlines()
    # -1.0 and -1.4: scipy.stats.t.interval(0.95, 1, loc=-1.2, scale=0.2) is (-3.7412, 1.3412)
    assert lines[-2:] == ["| third | 1.00 (1.00–1.00) |", "| new − old | -1.20 (-3.74 to 1.34) |"]


def test_models_with_other_scales_share_a_table(tmp_path):
    rows = {"few": ROW, "many": ROW}
    fields = {"name": "t", "title": "A", "kind": "likelihood", "rows": rows, "differences": [["many", "few"]]}
    few = {"all": 1.0, "standard error": 0.5, "1x1": 1.0, "3x3": 2.0, "16x16": 4.0}
    many = {"all": 3.0, "standard error": 0.25, "1x1": 1.5, "2x2": 2.0, "4x4": 2.5, "16x16": 3.0}
    (table,) = read(tmp_path, fields)
    assert ablation_markdown(table, {"few": {"all": few}, "many": {"all": many}}).splitlines()[2:] == [
        "| likelihood | all | standard error | 1x1 | 2x2 | 3x3 | 4x4 | 16x16 |",
        "|---|---|---|---|---|---|---|---|",
        "| few | 1.00 | 0.50 | 1.00 |  | 2.00 |  | 4.00 |",
        "| many | 3.00 | 0.25 | 1.50 | 2.00 |  | 2.50 | 3.00 |",
        "| many − few | 2.00 | -0.25 | 0.50 |  |  |  | -1.00 |",
    ]
    few, many = ({"latent 1x1": 1.0, **more, "pixel 1x1": 2.0} for more in ({}, {"latent 2x2": 3.0}))
    lines = ablation_markdown(table, {"few": {"all": few}, "many": {"all": many}}).splitlines()
    assert lines[2] == "| likelihood | latent 1x1 | latent 2x2 | pixel 1x1 |"


def test_keys_of_models_are_of_what_they_are(tmp_path):
    folders = {name: tmp_path / name for name in ("first", "again", "causal", "other")}
    tiny_pipeline().save_pretrained(folders["first"])
    tiny_pipeline().save_pretrained(folders["again"])
    tiny_pipeline("causal").save_pretrained(folders["causal"])  # the same weights
    tiny_pipeline(transformer=tiny_transformer(seed=7)).save_pretrained(folders["other"])
    keys = model_keys({name: load_drawing_pipeline(folder) for name, folder in folders.items()})
    assert keys["first"] == keys["again"]
    assert len(set(keys.values())) == 3
    assert all(len(key) == 12 for key in keys.values())
    tiny_latent_diffusion().save_pretrained(tmp_path / "diffusion")
    assert model_keys({"LDM": load_drawing_pipeline(tmp_path / "diffusion")}).keys() == {"LDM"}


def test_tables_and_curves_are_written(tmp_path):
    (table,) = read(tmp_path, {"name": "t", "title": "Bits", "kind": "likelihood", "rows": {"a": ROW, "b": ROW}})
    text = ablation_markdown(table, {"a": {"all": {"all": 1.234}}, "b": {"all": {"all": 5.0}}})
    assert text.splitlines() == ["## Bits", "", "| likelihood | all |", "|---|---|", "| a | 1.23 |", "| b | 5.00 |"]
    sweep = {"axis": "scales", "values": [[1, 4], [1, 2, 4]], "curves": {"SDD": ROW}}
    (table,) = read(tmp_path, {"name": "t", "title": "Scales", "kind": "samples", "sweep": sweep})
    cells = {row.name: {"seed 0": {"frechet_distance": 3.0}} for row in table.rows}
    save_sweep(tmp_path / "curve.png", table, cells)
    assert (tmp_path / "curve.png").stat().st_size > 5000
