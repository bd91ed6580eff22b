"""What type checkers know of the package, where pyright is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import srdd


SCRIPT = Path(__file__).with_name("user_script.py")


def complaints(script: Path, folder: Path) -> list[str]:
    """What pyright has to say about a script of a user."""
    pytest.importorskip("pyright")
    config = {"include": [str(script)], "extraPaths": [str(Path(srdd.__file__).parents[1])]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    return [
        f"{complaint['range']['start']['line'] + 1}: {complaint['message']}"
        for complaint in json.loads(output)["generalDiagnostics"]
    ]


@pytest.mark.slow
def test_an_ordinary_script_has_no_type_errors(tmp_path):
    assert not complaints(SCRIPT, tmp_path)


@pytest.mark.slow
def test_slips_of_a_script_are_type_errors(tmp_path):
    script = tmp_path / "script.py"
    slips = ['pipe("Apple 11", guidance=2)', "pipe(1).image", 'pipe(1, output_type="pt").images[0].save("apple.png")']
    lines = ["from srdd import SRDDPipeline", 'pipe = SRDDPipeline.from_pretrained("my-model")', *slips]
    script.write_text("\n".join(lines), encoding="utf-8")
    assert [complaint.partition(":")[0] for complaint in complaints(script, tmp_path)] == ["3", "4", "5"]
