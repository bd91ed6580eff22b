"""The demo page's file, which is no part of the package, as a module."""

from functools import cache
from pathlib import Path
from types import ModuleType

from file_modules import load_file


ROOT = Path(__file__).resolve().parents[1]


@cache
def load_app() -> ModuleType:
    return load_file(ROOT / "demo" / "app.py")
