"""The benchmark of how cost grows, on models far too small to say anything. Nothing here looks at a time."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training.launching import start_server


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODEL = ["--depth", "1", "--image_size", "32", "--vae_channels", "32", "--codebook_size", "1024", "--device", "cpu"]
AXES = {
    "batch_size": ["--batch_sizes", "1", "2"],
    "image_size": ["--image_sizes", "32", "48"],
    "depth": ["--depths", "1", "2"],
    "num_passes": ["--pass_counts", "0", "2"],
}


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    start_server()
    yield importlib.import_module("growth")
    for name in ("measuring", "samplers", "official_var", "growth"):
        sys.modules.pop(name, None)


def arguments(*axes: str, rows: tuple[str, ...] = ("causal", "sdd")) -> list[str]:
    values = [word for axis in axes for word in AXES[axis]]
    return [*MODEL, "--num_rounds", "1", "--rows", *rows, "--axes", *axes, *values]


def run(growth, *words: str) -> None:
    growth.main(growth.parse_args(list(words)))


def measured(path: Path) -> dict[tuple, dict]:
    """Results by row and place."""
    names = ("row", "batch_size", "image_size", "depth", "num_passes")
    cells = json.loads(path.read_text())["cells"]
    return {tuple(entry["cell"][name] for name in names): entry["result"] for entry in cells}


@pytest.mark.slow
def test_all_axes(growth, tmp_path, capsys):
    path, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    run(growth, *arguments(*AXES), "--output", str(path), "--plot", str(plot))
    report, cells = capsys.readouterr().out, measured(path)
    # The base is a cell of every axis, and measured once.
    places = [(1, 32, 1, 0), (2, 32, 1, 0), (1, 48, 1, 0), (1, 32, 2, 0), (1, 32, 1, 2)]
    assert set(cells) == {(row, *place) for row in ("causal", "sdd") for place in places}
    for result in cells.values():
        assert len(result["seconds"]) == 1
        assert result["seconds"][0] > 0
        assert result["mebibytes"] >= 0
    assert "| batch size: seconds per image | 1 | 2 | exponent | last half |" in report
    assert "| further passes: peak MiB beyond the weights | 0 | 2 | a pass, share of none |" in report
    assert "- 48px: 14 tokens, scales 1 2 3" in report
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_was_stopped(growth, tmp_path, capsys):
    path = tmp_path / "growth.json"
    words = [*arguments("batch_size"), "--output", str(path)]
    run(growth, *words)
    stored = json.loads(path.read_text())
    last = stored["cells"].pop()
    for index, entry in enumerate(stored["cells"]):
        entry["result"]["seconds"] = [1000.0 + index]  # what nothing here would take
    path.write_text(json.dumps(stored))
    capsys.readouterr()
    run(growth, *words)
    again = json.loads(path.read_text())["cells"]
    assert again[:-1] == stored["cells"]
    assert again[-1]["cell"] == last["cell"]
    assert again[-1]["result"]["seconds"][0] < 1000
    report = capsys.readouterr().out
    seconds = [line for line in report.splitlines() if line.startswith("| causal |")][0]
    assert seconds.startswith("| causal | 1000 | 500.5 |")  # by image


def test_other_settings_want_another_file(growth, tmp_path):
    path = tmp_path / "growth.json"
    run(growth, *arguments("depth"), "--depths", "1", "--output", str(path))
    before = path.read_text()
    with pytest.raises(ValueError, match="under the same settings, .*'bfloat16'.* got .*'float32'"):
        run(growth, *arguments("depth"), "--dtype", "bfloat16", "--output", str(path))
    assert path.read_text() == before


def test_a_cell_that_takes_too_long_is_ended_and_nothing_larger_tried(growth, tmp_path, capsys):
    path = tmp_path / "growth.json"
    words = [*arguments("depth"), "--output", str(path)]
    run(growth, *words, "--cell_timeout", "0.01")
    assert {result["failure"] for result in measured(path).values()} == {"out of time"}
    assert set(measured(path)) == {(row, 1, 32, 1, 0) for row in ("causal", "sdd")}
    assert not multiprocessing.active_children()
    report = capsys.readouterr().out
    assert "| sdd | out of time | not tried | — | — |" in report
    assert "- sdd, batch 1, 32px, depth 1: out of time (more than 0.01 s)" in report
    run(growth, *words)  # failures stay until they are to be tried again
    assert len(measured(path)) == 2
    run(growth, *words, "--retry")
    assert len(measured(path)) == 4
    assert all("seconds" in result for result in measured(path).values())


def test_a_cell_that_is_killed_is_reported(growth):
    def kill_first_child():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(children[0].pid, signal.SIGKILL)

    args = growth.parse_args(arguments("depth"))
    killer = threading.Thread(target=kill_first_child)
    killer.start()
    result = growth.in_own_process(args, growth.cells_along(args, "depth", "sdd")[1])
    killer.join()
    assert result["failure"] == "killed"
    assert "exit code -9" in result["detail"]


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    states = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [state for state in states if int(state[3]) == session and state[0] != "Z"]


@pytest.mark.slow
def test_nothing_goes_on_when_a_run_is_killed(tmp_path):
    words = [*MODEL, "--axes", "batch_size", "--batch_sizes", "100000", "--rows", "sdd"]  # minutes
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, BENCHMARKS / "growth.py", *words], stdout=file, stderr=file, start_new_session=True
        )
    try:
        started = time.monotonic()
        while len(members(process.pid)) < 4:  # itself, the server, the tracker of resources, and a cell
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < started + 120
            time.sleep(0.1)
        process.kill()
        process.wait()
        while members(process.pid):
            assert time.monotonic() < started + 150
            time.sleep(0.1)
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_other_errors_are_reported_and_larger_cells_tried(growth, tmp_path):
    path = tmp_path / "growth.json"
    run(growth, *arguments("depth", rows=("sdd-6",)), "--output", str(path))  # there are two scales
    cells = measured(path)
    assert {result["failure"] for result in cells.values()} == {"error"}
    assert "ValueError: `num_scales` must be in" in cells["sdd-6", 1, 32, 2, 0]["detail"]


@pytest.mark.parametrize("axis", list(AXES))
def test_the_reference_makes_no_further_passes(growth, axis):
    args = growth.parse_args([*arguments(axis), "--num_passes", "3"])
    cells = growth.cells_along(args, axis, "reference").values()
    assert {cell.num_passes for cell in cells} == {0}
    assert len(cells) == (1 if axis == "num_passes" else 2)
    assert {cell.num_passes for cell in growth.cells_along(args, axis, "sdd").values()} <= {0, 2, 3}


@pytest.mark.parametrize("row", ["causal", "sdd"])
@pytest.mark.parametrize("num_passes", [0, 3])
def test_the_number_of_further_passes_is_exact(growth, row, num_passes):
    args = growth.parse_args(MODEL)
    sampler = growth.row_sampler(growth.random_pipeline(args), row, num_passes)
    forwards = []
    sampler.pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    sampler(torch.tensor([0, 1]))
    assert len(forwards) == 2 * (1 + num_passes)  # two scales


@pytest.mark.parametrize(("power", "factor"), [(2.0, 0.3), (-0.5, 7.0), (0.0, 2.0)])
def test_exponents_of_power_laws(growth, power, factor):
    values = [1, 2, 4, 8, 16]
    assert growth.fit_exponent(values, [factor * value**power for value in values]) == pytest.approx(power, abs=1e-9)


def test_the_last_half_has_an_exponent_of_its_own(growth):
    bent = {1: 1.0, 2: 1.0, 4: 1.0, 8: 8.0, 16: 64.0, 32: 512.0}  # flat, and from 4 on a cube
    exponent, last_half = growth.fit("batch_size", bent)
    assert last_half == pytest.approx(3)
    assert 1 < exponent < 3
    odd = {4: 1.0, 8: 8.0, 16: 64.0}
    assert growth.fit("batch_size", {1: 5.0, 2: 9.0, **odd})[1] == pytest.approx(3)


def test_what_has_no_exponent(growth):
    assert growth.fit_exponent([4], [1.0]) is None
    assert growth.fit_exponent([], []) is None
    assert growth.fit_exponent([1, 2], [0.0, 1.0]) is None
    assert growth.fit_line([0], [1.0]) is None
    assert growth.fit_line([1, 2], [1.0, 3.0]) is None  # none would cost less than nothing


def test_passes_are_a_share_of_none(growth):
    assert growth.fit("num_passes", {0: 2.0, 1: 2.5, 5: 4.5}) == [pytest.approx(0.25)]


def test_seconds_are_medians_by_image(growth):
    args = growth.parse_args(["--axes", "batch_size", "--batch_sizes", "4", "8", "--rows", "sdd"])
    measurements, cells = growth.Measurements(), growth.cells_along(args, "batch_size", "sdd")
    results = {4: {"seconds": [8.0, 100.0, 2.0], "mebibytes": 6.0}, 8: {"failure": "killed", "detail": ""}}
    for value, result in results.items():
        measurements.measure(growth.asdict(cells[value]), lambda result=result: result)
    for cost, expected in (("seconds", {4: 2.0}), ("mebibytes", {4: 6.0})):
        assert growth.points_of(args, "batch_size", cost, "sdd", measurements) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_sizes", "4", "2"], r"`--batch_sizes` must grow .*, got \[4, 2\]"),
        (["--pass_counts", "0", "0"], r"`--pass_counts` must grow .*, got \[0, 0\]"),
        (["--image_sizes", "256", "300"], "multiples of 16, got 300"),
        (["--reference", "nowhere"], "`--reference` must be a checkout of the official VAR code, got nowhere"),
    ],
)
def test_arguments_that_are_refused(growth, capsys, words, message):
    with pytest.raises(SystemExit):
        growth.parse_args(words)
    assert re.search(message, capsys.readouterr().err)
