"""The documentation, executed: its Python runs in the order of the page, and its links lead somewhere."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from srdd.acceleration.cpu import MULTIPLIES_INT8


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "training_scripts" / "README.md",
    *sorted((ROOT / "model_cards").glob("*/README.md")),
]
LINKING_PAGES = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "demo" / "README.md",
    *sorted((ROOT / "benchmarks").glob("*.md")),
]

# Above a block that a test cannot run: `<!-- not run: reason -->`. `<!-- needs VNNI -->` leaves it to the CPU.
BLOCK = re.compile(r"^(?:<!-- (?P<marker>.+?) -->\n)?```py\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NEEDS_VNNI = "needs VNNI"

# Image or link, its target without a title; headings as GitHub makes anchors of them.
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)


@dataclass
class Page:
    """A page's blocks as `(marker, first line, code)`, and what those that ran have left behind."""

    path: Path
    blocks: list[tuple[str, int, str]]
    namespace: dict[str, Any] = field(default_factory=dict)
    num_done: int = 0

    def run_up_to(self, index: int) -> None:
        """Run the blocks up to one that have not been run yet: a later block may need what an earlier one has set."""
        while self.num_done <= index:
            marker, line, code = self.blocks[self.num_done]
            self.num_done += 1
            if reason_to_skip(marker) is None:
                # Empty lines ahead, so that errors name the line of the page.
                exec(compile("\n" * (line - 1) + code, str(self.path), "exec"), self.namespace)


@cache
def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    blocks = [
        (match["marker"] or "", text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in BLOCK.finditer(text)
    ]
    return Page(path, blocks)


def reason_to_skip(marker: str) -> str | None:
    if marker.startswith("not run: "):
        return marker.removeprefix("not run: ")
    return "the CPU has no VNNI" if marker == NEEDS_VNNI and not MULTIPLIES_INT8 else None


def all_blocks() -> list:
    return [
        pytest.param(path, index, id=f"{path.relative_to(ROOT)}:{line}")
        for path in PAGES
        for index, (_, line, _) in enumerate(read_page(path).blocks)
    ]


def anchors(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that looks like the repository's root and receives what the blocks write."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("model_cards", "schedulers"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize(("path", "index"), all_blocks())
def test_python_of_the_pages_runs(path, index, folder, monkeypatch):
    page = read_page(path)
    reason = reason_to_skip(page.blocks[index][0])
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.chdir(folder)
    page.run_up_to(index)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_have_no_unknown_marker(path):
    text = path.read_text(encoding="utf-8")
    markers = re.findall(r"<!-- (.+?) -->", text)
    assert markers == [marker for marker, _, _ in read_page(path).blocks if marker]
    assert not [marker for marker in markers if marker != NEEDS_VNNI and not re.match(r"not run: needs \w", marker)]
    assert text.count("```py\n") == len(read_page(path).blocks)


@pytest.mark.parametrize("path", LINKING_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        linked = path if not name else path.parent / name
        if "://" in target or target.startswith("mailto:"):
            continue
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            missing.append(target)
    assert not missing
