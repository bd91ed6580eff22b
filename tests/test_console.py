"""Consoles that are not UTF-8: every help text can be written, and so can every table."""

import importlib
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from file_modules import load_file

from srdd.console import encodable, write_text


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for folder in ("training_scripts", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
WITH_HELP = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]
ENCODINGS = ["ascii", "cp932", "cp1252"]


@pytest.fixture(params=ENCODINGS)
def console(request) -> io.TextIOWrapper:
    """To stand where the standard output stands; it raises errors as that does."""
    return io.TextIOWrapper(io.BytesIO(), encoding=request.param)


def written(console: io.TextIOWrapper) -> str:
    console.flush()
    return console.buffer.getvalue().decode(console.encoding)


def test_all_scripts_are_here():
    assert len(WITH_HELP) >= 11


@pytest.mark.parametrize("path", WITH_HELP, ids=lambda path: path.stem)
def test_help_of_scripts(path, console, monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(path.parent))
    module = load_file(path)
    with redirect_stdout(console), pytest.raises(SystemExit) as error:
        module.parse_args(["--help"])
    assert error.value.code == 0
    assert "--output" in written(console)
    for name in {each.stem for each in SCRIPTS} & (set(sys.modules) - before):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["srdd.conversion", "srdd.publish", "srdd.theory"])
def test_help_of_modules(name, console):
    module = importlib.import_module(f"{name}.__main__")
    with redirect_stdout(console), pytest.raises(SystemExit) as error:
        module.main(["--help"])
    assert error.value.code == 0
    assert f"python -m {name}" in written(console)


def test_tables(console):
    with redirect_stdout(console):
        write_text("| Fréchet | 2.0 (1.9–2.1) ± 0.1 × 犬 … |\n")
    text = written(console)
    assert text.startswith("| Fr")
    assert text.replace("\r", "").endswith(" |\n")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "é – ± × … 犬 Ω"),
        ("cp1252", "é – ± × … \\u72ac \\u03a9"),
        ("cp932", "e - ± × … 犬 Ω"),
        ("ascii", "e - +- x ... \\u72ac \\u03a9"),
    ],
)
def test_letters_become_the_nearest_that_an_encoding_has(encoding, expected):
    assert encodable("é – ± × … 犬 Ω", encoding) == expected


def test_consoles_without_an_encoding_take_all():
    with redirect_stdout(io.StringIO()) as stream:
        write_text("é ± 犬")
    assert stream.getvalue() == "é ± 犬"
