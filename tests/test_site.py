"""The site that `make docs` builds. What it is built with is no part of what the other tests need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from file_modules import load_file

import srdd


ROOT = Path(__file__).resolve().parents[1]

DOCSTRING = """
Draws.

Args:
    sample (`torch.Tensor` of shape `(batch, 3)`, *optional*): Of [`ScaleScheduler`]
        or of another: one.

        More of it.

Returns:
    [`~ScaleScheduler.step`]'s output.

Raises:
    ValueError: If `sample` is none.

```py
[`ScaleScheduler`]
```
"""
MARKDOWN = """
Draws.

**Args**

- **`sample`** (`torch.Tensor` of shape `(batch, 3)`, *optional*): Of [`ScaleScheduler`][srdd.ScaleScheduler]
    or of another: one.

    More of it.

**Returns**

[`step`][srdd.ScaleScheduler.step]'s output.

**Raises**

- **`ValueError`**: If `sample` is none.

```py
[`ScaleScheduler`]
```
"""


@pytest.fixture(scope="module")
def docstring_markdown():
    pytest.importorskip("griffe")
    return load_file(ROOT / "docs" / "docstring_markdown.py")


def resolve(name: str) -> str | None:
    return f"srdd.{name}" if name.startswith("ScaleScheduler") else None


def test_docstrings_become_markdown(docstring_markdown):
    text = docstring_markdown.sections_to_markdown(DOCSTRING)
    assert docstring_markdown.link_names(text, resolve) == MARKDOWN.removesuffix("\n")


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("`ScaleScheduler`", "[`ScaleScheduler`][srdd.ScaleScheduler]"),
        ("[`~ScaleScheduler.step`]", "[`step`][srdd.ScaleScheduler.step]"),
        ("[`ConfigMixin`] and [`~srdd.scales.Scale`]", "`ConfigMixin` and `Scale`"),
        ("[of `ScaleScheduler`](there.md)", "[of `ScaleScheduler`](there.md)"),
        ("`ScaleScheduler(scales=…)`", "`ScaleScheduler(scales=…)`"),
    ],
)
def test_names_become_links(docstring_markdown, text, linked):
    assert docstring_markdown.link_names(text, resolve) == linked


def test_site_is_built_whole(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in srdd.__all__:
        assert f'id="srdd.{name}"' in (tmp_path / "reference" / name / "index.html").read_text(encoding="utf-8")
    scheduler = (tmp_path / "reference" / "ScaleScheduler" / "index.html").read_text(encoding="utf-8")
    assert 'href="../ScaleSchedulerOutput/#srdd.ScaleSchedulerOutput"' in scheduler
    assert "[<code>" not in scheduler  # a name in brackets that did not become a link
    for linked in re.findall(r'<(?:link|script)[^>]* (?:href|src)="(?!https?:)([^"#]+)"', scheduler):
        assert (tmp_path / "reference" / "ScaleScheduler" / linked).exists(), linked
    assert (tmp_path / "schedulers" / "scheduling_scale.py" / "index.html").exists()  # the method links to it
