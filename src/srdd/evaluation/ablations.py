"""Tables and figures that one JSON file describes: which models, under which settings, measured how."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from srdd import ScaleScheduler, SRDDPipeline
from srdd.evaluation.editing_tasks import EDITING_TASKS
from srdd.evaluation.image_sources import PipelineImages


TABLE_KINDS = ("samples", "editing", "likelihood", "signal_to_noise")

# In rows of editing tables: nothing is drawn, holes are filled as the option "filling" says.
NO_MODEL = "none"

# Images that show the bounds of int8 decoding, of a seed that no table has.
NUM_EXAMPLES, EXAMPLE_SEED = 64, 1000


@dataclass(frozen=True)
class AblationRow:
    """
    One setting.

    Args:
        name (`str`): Its name in the table.
        model (`str`): Which model; `"none"` in editing tables draws nothing ([`~srdd.evaluation.editing_tasks.fill`]).
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
        scheduler (`dict`): Values that replace those of the pipeline's scheduler.
        options (`dict`): More arguments of the editing pipelines, or of `fill`.
        int8_decoding (`bool`, defaults to `False`): Whether a copy of the tokenizer decodes in int8, between bounds of
            `NUM_EXAMPLES` images that the pipeline draws, of all classes alike.
    """

    name: str
    model: str
    guidance_scale: float | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    int8_decoding: bool = False

    def pipeline(self, pipe: SRDDPipeline) -> SRDDPipeline:
        """A pipeline of the same weights with the row's scheduler and decoding."""
        scheduler = ScaleScheduler.from_config(pipe.scheduler.config, **self.scheduler)
        changed = SRDDPipeline(**{**pipe.components, "scheduler": scheduler})
        changed.set_progress_bar_config(disable=True)
        if self.int8_decoding:
            source = PipelineImages(changed, NUM_EXAMPLES, self.guidance_scale, EXAMPLE_SEED)
            latents = source.draw(range(NUM_EXAMPLES), "latent")
            changed.register_modules(vqvae=copy.deepcopy(pipe.vqvae))
            changed.vqvae.enable_int8_decoding(latents)
        return changed


@dataclass(frozen=True)
class AblationTable:
    """
    Rows that are measured alike.

    Args:
        name (`str`): Short name, of files too.
        title (`str`): What the table shows.
        kind (`str`): `"samples"`: distances of drawn images to real ones; `"editing"`: inpainting, outpainting and
            enlarging of held-out images; `"likelihood"` of their tokens; `"signal_to_noise"` of every scale on them.
        rows (`list[AblationRow]`): The settings.
        num_images (`int`): Images drawn for a row and seed, or held-out images.
        seeds (`list[int]`): Seeds of what is drawn; one for the kinds that draw nothing.
        tasks (`list[str]`): Of editing tables, a part of `srdd.evaluation.editing_tasks.EDITING_TASKS`.
        axis (`str`, *optional*): The setting that a sweep varies; its rows are then drawn as a curve too.
    """

    name: str
    title: str
    kind: str
    rows: list[AblationRow]
    num_images: int
    seeds: list[int]
    tasks: list[str]
    axis: str | None = None


def read_tables(path: str | Path, names: Sequence[str] | None = None) -> list[AblationTable]:
    """
    Tables of a JSON file.

    It holds `"tables"`, a list of objects with the fields of [`AblationTable`], and `"defaults"` for those they leave
    out. `"rows"` maps names to the fields of [`AblationRow`]. In place of rows a table may sweep one setting:
    `"sweep": {"axis": "resampling_threshold", "values": [0.001, 0.01], "curves": {name: row, ...}}` makes a row of
    each curve and value; the axis is `guidance_scale`, a value of the scheduler, or one of the editing pipelines'
    arguments where a curve has it among its `"options"`.

    Args:
        path (`str` or `Path`): The file.
        names (`Sequence[str]`, *optional*): The tables to return; all by default.

    Raises:
        ValueError: If a field, a kind, a task or a table is unknown, or two rows of a table have one name.
    """
    content = json.loads(Path(path).read_text())
    unknown = sorted(set(content) - {"defaults", "tables"})
    if unknown or "tables" not in content:
        raise ValueError(f"`{path}` must hold 'tables' and perhaps 'defaults', got {sorted(content)}.")
    tables = [_read_table({**content.get("defaults", {}), **table}) for table in content["tables"]]
    known = [table.name for table in tables]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"`table` must be among {known}, got {unknown}.")
    return [table for table in tables if not names or table.name in names]


def load_pipelines(
    models: Sequence[str], tables: Sequence[AblationTable], device: str | torch.device
) -> dict[str, SRDDPipeline]:
    """
    The models that tables name, in float32; what is quantized stays so.

    Args:
        models (`Sequence[str]`): Where they lie, as `"NAME=FOLDER"`; folders or Hub ids.
        tables (`Sequence[AblationTable]`): The tables.
        device (`str` or `torch.device`): Where to run them.

    Raises:
        ValueError: If one is missing, no table names any, or their image sizes differ.
    """
    folders = dict(model.partition("=")[::2] for model in models)
    wanted = {row.model for table in tables for row in table.rows} - {NO_MODEL}
    if not wanted or wanted - set(folders):
        raise ValueError(f"`model` must say where {sorted(wanted)} lie, as NAME=FOLDER, got {list(models)}.")
    pipelines = {
        name: SRDDPipeline.from_pretrained(folders[name], dtype=torch.float32).to(device) for name in sorted(wanted)
    }
    sizes = sorted({pipe.sample_size for pipe in pipelines.values()})
    if len(sizes) > 1:
        raise ValueError(f"`model` must name models of one image size, got {sizes}.")
    return pipelines


def _read_table(fields: dict[str, Any]) -> AblationTable:
    fields = {"num_images": 1024, "seeds": [0], "tasks": list(EDITING_TASKS), **fields}
    name = fields.get("name")
    sweep = fields.pop("sweep", None)
    if ("rows" in fields) == (sweep is not None):
        raise ValueError(f"The table {name!r} must have either 'rows' or 'sweep'.")
    if sweep is not None:
        fields["axis"] = sweep["axis"]
        fields["rows"] = {
            f"{curve}, {sweep['axis'].replace('_', ' ')} {_readable(value)}": _with_value(row, sweep["axis"], value)
            for curve, row in sweep["curves"].items()
            for value in sweep["values"]
        }
    rows = []
    for row_name, row in fields["rows"].items():
        _check_fields(f"The row {row_name!r} of {name!r}", row, {"model"}, set(AblationRow.__dataclass_fields__))
        rows.append(AblationRow(**{"name": row_name, **row}))
    required = {"name", "title", "kind", "rows"}
    _check_fields(f"The table {name!r}", fields, required, set(AblationTable.__dataclass_fields__))
    table = AblationTable(**{**fields, "rows": rows})
    if table.kind not in TABLE_KINDS:
        raise ValueError(f"'kind' of the table {name!r} must be one of {TABLE_KINDS}, got {table.kind!r}.")
    unknown = sorted(set(table.tasks) - set(EDITING_TASKS))
    if unknown:
        raise ValueError(f"'tasks' of the table {name!r} must be among {EDITING_TASKS}, got {unknown}.")
    return table


def _check_fields(what: str, fields: dict, required: set[str], allowed: set[str]) -> None:
    if required - set(fields) or set(fields) - allowed:
        raise ValueError(f"{what} must have {sorted(required)} and may have {sorted(allowed)}, got {sorted(fields)}.")


def _with_value(row: dict, axis: str, value: Any) -> dict:
    if axis == "guidance_scale":
        return {**row, axis: value}
    where = "options" if axis in row.get("options", {}) else "scheduler"
    return {**row, where: {**row.get(where, {}), axis: value}}


def _readable(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, list) else f"{value}"


class Measurements:
    """
    What was measured, in a JSON file. A cell is measured once, and again only if its definition changes. Drawn images
    that two tables share under different names are measured once for both.

    Args:
        path (`str` or `Path`): The file.
        settings (`dict`): What all cells share: data, extractor, versions. Another value of any of them is an error.

    Raises:
        ValueError: If the file holds measurements under other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        self.content: dict[str, Any] = {"settings": settings, "cells": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        if self.content["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(
                f"`{self.path}` must hold measurements under the same settings, {settings}, got"
                f" {self.content['settings']}."
            )

    def cell(
        self, table: AblationTable, row: AblationRow, column: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The cell of a row and a column, measured if it is not there."""
        cells = self.content["cells"].setdefault(table.name, {}).setdefault(row.name, {})
        definition = json.loads(json.dumps({**asdict(row), "num_images": table.num_images}))
        found = cells.get(column)
        if found is None or found["definition"] != definition:
            known = self._drawn_alike(definition, column) if table.kind == "samples" else None
            cells[column] = {"definition": definition, "metrics": measure() if known is None else known}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1))
            os.replace(partial, self.path)
        return cells[column]["metrics"]

    def _drawn_alike(self, definition: dict[str, Any], column: str) -> dict[str, Any] | None:
        """What another row found with the same images, whatever its name."""
        for rows in self.content["cells"].values():
            for found in rows.values():
                if column in found and found[column]["definition"] | {"name": definition["name"]} == definition:
                    return found[column]["metrics"]
        return None
