"""Measurements that take long, kept in a file so that an interrupted run goes on."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.utils import logging


logger = logging.get_logger(__name__)


class Measurements:
    """
    What was measured, each measurement a cell that its settings name. A cell is measured once: whoever asks for equal
    settings, under whatever name, gets what is there. A run that is stopped leaves the file as it was before a cell or
    after it.

    Args:
        path (`str` or `Path`, *optional*): A JSON file; by default nothing is kept beyond this object.
        settings (`dict`, *optional*): What all cells share, such as data and versions.
        models (`dict[str, str]`, *optional*): Keys of the models that cells name as their `"model"`, by name. Cells of
            a model that had another key are forgotten, with a warning; so is all of a file that has no keys.

    Raises:
        ValueError: If the file holds something else, or cells that were measured under other shared settings.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        settings: dict[str, Any] | None = None,
        models: dict[str, str] | None = None,
    ):
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings or {}))
        self.models = models
        self._results: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(stored.get("cells"), list):
            raise ValueError(f"`path` must be a file of measurements, with a list of 'cells', got {self.path}.")
        if models is not None and "models" not in stored:
            logger.warning(
                f"{self.path} does not say what its models were: its {len(stored['cells'])} cells are forgotten, and"
                " measured anew where they are asked for."
            )
            return
        if stored["settings"] != self.settings:
            raise ValueError(
                f"`path` must hold measurements under the same settings, {self.settings}, or be a new file, got"
                f" {self.path} with {stored['settings']}."
            )
        cells, keys = stored["cells"], stored.get("models", {})
        changed = {name for name, key in (models or {}).items() if keys.get(name) != key}
        forgotten = [cell["cell"]["model"] for cell in cells if changed and cell["cell"].get("model") in changed]
        if forgotten:
            logger.warning(
                f"{self.path} has other models by the names {sorted(set(forgotten))}: {len(forgotten)} of its"
                f" {len(cells)} cells are forgotten, and measured anew where they are asked for."
            )
            cells = [cell for cell in cells if cell["cell"].get("model") not in changed]
        if "models" in stored:
            self.models = {**keys, **(models or {})}
        self._results = {_key(cell["cell"]): cell["result"] for cell in cells}

    def find(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a cell; `None` if it was not measured."""
        return self._results.get(_key(cell))

    def measure(self, cell: dict[str, Any], call: Callable[[], dict[str, Any]], again: bool = False) -> dict[str, Any]:
        """
        The result of a cell, which is measured if it is not there.

        Args:
            cell (`dict`): Its settings, of JSON values.
            call (`Callable`): Measures it; returns JSON values by name.
            again (`bool`, defaults to `False`): Measure it though it is there.
        """
        key = _key(cell)
        if again or key not in self._results:
            self._results[key] = json.loads(json.dumps(call()))
            self._save()
        return self._results[key]

    def _save(self) -> None:
        if self.path is None:
            return
        cells = [{"cell": json.loads(key), "result": result} for key, result in self._results.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        models = {} if self.models is None else {"models": self.models}
        content = {"settings": self.settings, **models, "cells": cells}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _key(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
