"""What is released: one version everywhere, archives that hold the whole package, lowest versions that are tested."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import srdd


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pipelines", "schedulers", "src", "tests")  # what is linked to first, as Windows wants it
LINK = re.compile(r"\]\(([^)\s]+)\)")


def build(kind: str, source: Path, folder: Path) -> Path:
    """An archive as a workflow on GitHub makes it; "sdist" or "wheel"."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}(r'{folder}')"
    environment = {**os.environ, "GITHUB_REPOSITORY": "someone/srdd"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source archive, unpacked. It is made of a copy, as making it writes next to the sources."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(build("sdist", source, tmp_path_factory.mktemp("sdist"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"srdd-{srdd.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> dict[str, bytes]:
    """What the wheel holds, by name."""
    with zipfile.ZipFile(build("wheel", sdist, tmp_path_factory.mktemp("wheel"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    return message_from_bytes(wheel[f"srdd-{srdd.__version__}.dist-info/METADATA"])


def package_files() -> dict[str, bytes]:
    package = ROOT / "src" / "srdd"
    folders = [package, *(path for path in package.iterdir() if path.is_symlink())]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {f"srdd/{path.relative_to(package).as_posix()}": path.read_bytes() for path in files}


def test_versions_agree(metadata):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert metadata["Version"] == citation["version"] == newest[1] == srdd.__version__
    assert citation["date-released"] == newest[2]


def test_archives_hold_the_whole_package(sdist, wheel):
    expected = package_files()
    assert "srdd/pipelines/scale_pipeline.py" in expected
    assert {name: wheel[name] for name in wheel if name.startswith("srdd/")} == expected
    source = sdist / "src"
    files = [path for path in (source / "srdd").rglob("*") if path.is_file()]
    assert {path.relative_to(source).as_posix(): path.read_bytes() for path in files} == expected
    assert not [path for path in sdist.rglob("*") if path.is_symlink()]
    assert not (sdist / "tests").exists()  # without the models and pages that they need


def test_links_of_the_readme_lead_to_the_released_repository(metadata):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = metadata.get_payload(decode=True).decode("utf-8").replace("\r\n", "\n")
    pages, pictures = "https://github.com/someone/srdd/blob", "https://raw.githubusercontent.com/someone/srdd"
    links = LINK.findall(readme)
    assert [link for link in LINK.findall(shown) if "://" not in link] == []
    assert f"]({pictures}/v{srdd.__version__}/model_cards/srdd-fruits64/samples.png)" in shown
    for root in (pages, pictures):
        shown = shown.replace(f"]({root}/v{srdd.__version__}/", "](")
    assert LINK.findall(shown) == links
    assert shown.strip() == readme.strip()


def test_lowest_versions_are_those_of_the_package(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    lowest = {
        each.name: Version(bound.version)
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("train", "test"))
        for bound in each.specifier
        if bound.operator in (">=", "==")
    }
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    constraints = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {each.name: Version(str(each.specifier).removeprefix("==")) for each in constraints} == lowest
