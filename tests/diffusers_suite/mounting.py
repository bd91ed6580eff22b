"""Gives our tests the test mixins of a diffusers source checkout, as the package `diffusers_tests`.

Only the checkout's `tests` folder is used: what is tested against is the installed diffusers. An environment variable
names the checkout because pytest takes the value of an unknown option for one more folder of tests and runs the
`conftest.py` in it, which puts the checkout's diffusers before the installed one.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import pytest


PACKAGE = "diffusers_tests"
VARIABLE = "DIFFUSERS_SOURCE"


def tests_folder() -> Path | None:
    """The `tests` folder of the checkout, `None` without a checkout."""
    source = os.environ.get(VARIABLE)
    if not source:
        return None
    folder = Path(source).expanduser().resolve() / "tests"
    if not (folder / "testing_utils.py").is_file():
        raise pytest.UsageError(f"`{VARIABLE}` must be the path of a diffusers source checkout, got {source!r}.")
    return folder


def mounted(name: str) -> ModuleType:
    """A module of the checkout's tests; without a checkout the test module that asks for it is skipped."""
    folder = tests_folder()
    if folder is None:
        pytest.skip(f"needs {VARIABLE}, the path of a diffusers source checkout", allow_module_level=True)
    if PACKAGE not in sys.modules:
        spec = ModuleSpec(PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[PACKAGE] = module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")
