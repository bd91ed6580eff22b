import re

import pytest
from diffusers_suite.mounting import tests_folder


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that the mixins carry."""
    folder = tests_folder()
    text = (folder / "testing_utils.py").read_text(encoding="utf-8") if folder else ""
    for name in sorted(set(re.findall(r"pytest\.mark\.(\w+)\(test_case\)", text))):
        config.addinivalue_line("markers", f"{name}: a marker of diffusers' own tests")
