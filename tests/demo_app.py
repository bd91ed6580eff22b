"""The demo page's file, which is no part of the package, as a module."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parents[1]


@cache
def load_app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_app_file", ROOT / "demo" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app
