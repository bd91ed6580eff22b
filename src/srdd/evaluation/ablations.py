"""Tables and figures that one JSON file describes: which models, under which settings, measured how."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from srdd.evaluation.editing_tasks import EDITING_TASKS
from srdd.evaluation.image_sources import pipeline_key
from srdd.evaluation.latent_diffusion import DrawingPipeline, LatentDiffusionPipeline, load_drawing_pipeline
from srdd.evaluation.pipeline_variants import PipelineVariant, variant_of


TABLE_KINDS = ("samples", "editing", "likelihood", "signal_to_noise")

# In rows of editing tables: nothing is drawn, holes are filled as the option "filling" says.
NO_MODEL = "none"


@dataclass(frozen=True)
class AblationRow:
    """
    One setting.

    Args:
        name (`str`): Its name in the table.
        model (`str` or `list[str]`): Which model; `"none"` in editing tables draws nothing
            ([`~srdd.evaluation.editing_tasks.fill`]). Models that were trained alike but for their seeds, one for each
            seed of the table, make one row.
        variant (`str`, defaults to `""`): Of its pipeline ([`~srdd.evaluation.pipeline_variants.variant_of`]).
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`]; the variant's by default.
        scheduler (`dict`): Values that replace those of the variant's scheduler; of latent diffusion
            `num_inference_steps`.
        options (`dict`): More arguments of the editing pipelines, or of `fill`.
    """

    name: str
    model: str | list[str]
    variant: str = ""
    guidance_scale: float | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return [self.model] if isinstance(self.model, str) else self.model

    @property
    def changes(self) -> PipelineVariant:
        """What is different about the model's pipeline."""
        variant = variant_of(self.variant)
        guidance_scale = variant.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return replace(variant, scheduler={**variant.scheduler, **self.scheduler}, guidance_scale=guidance_scale)


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
        differences (`list[list[str]]`): Pairs of rows, to show how much more the first has than the second, seed by
            seed, of the metrics that both have; none in editing tables.
    """

    name: str
    title: str
    kind: str
    rows: list[AblationRow]
    num_images: int
    seeds: list[int]
    tasks: list[str]
    axis: str | None = None
    differences: list[list[str]] = field(default_factory=list)

    @property
    def has_seeds(self) -> bool:
        """Whether its columns are seeds, of drawn images or of trainings."""
        return self.kind == "samples" or any(isinstance(row.model, list) for row in self.rows)

    @property
    def columns(self) -> list[str]:
        """Seeds of drawn images and of trainings, tasks of edited images, one column for what has no seed."""
        if self.has_seeds:
            return [f"seed {seed}" for seed in self.seeds]
        return self.tasks if self.kind == "editing" else ["all"]

    def row_of(self, row: AblationRow, column: str) -> AblationRow:
        """A row with the one model that it has in a column."""
        if isinstance(row.model, str):
            return row
        return replace(row, model=row.model[self.columns.index(column)])

    def cell(self, row: AblationRow, column: str) -> dict[str, Any]:
        """All that the numbers of a cell depend on, beside data and models: no names of tables and rows."""
        settings = asdict(self.row_of(row, column))
        del settings["name"]
        return {"kind": self.kind, "num_images": self.num_images, "column": column, **settings}

    @property
    def real_cell(self) -> dict[str, Any]:
        """As [`~AblationTable.cell`], for as many real images in the place of drawn ones."""
        return {"kind": "real images", "num_images": self.num_images}


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
        ValueError: If a field, a kind, a task, a variant or a table is unknown, or seeds or differences do not fit a
            table.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    unknown = sorted(set(content) - {"defaults", "tables"})
    if unknown or "tables" not in content:
        raise ValueError(f"`{path}` must hold 'tables' and perhaps 'defaults', got {sorted(content)}.")
    tables = [_read_table({**content.get("defaults", {}), **table}) for table in content["tables"]]
    defined = [table.name for table in tables]
    unknown = sorted(set(names or ()) - set(defined))
    if unknown:
        raise ValueError(f"`table` must be among {defined}, got {unknown}.")
    return [table for table in tables if not names or table.name in names]


def load_pipelines(
    models: Sequence[str], tables: Sequence[AblationTable], device: str | torch.device
) -> dict[str, DrawingPipeline]:
    """
    The models that tables name, in float32; what is quantized stays so.

    Args:
        models (`Sequence[str]`): Where they lie, as `"NAME=FOLDER"`; folders or Hub ids.
        tables (`Sequence[AblationTable]`): The tables.
        device (`str` or `torch.device`): Where to run them.

    Raises:
        ValueError: If one is missing, no table names any, or their image sizes differ; if a row of latent diffusion
            asks for what it has not.
    """
    folders = dict(model.partition("=")[::2] for model in models)
    wanted = {model for table in tables for row in table.rows for model in row.models} - {NO_MODEL}
    if not wanted or wanted - set(folders):
        raise ValueError(f"`model` must say where {sorted(wanted)} lie, as NAME=FOLDER, got {list(models)}.")
    pipelines = {name: load_drawing_pipeline(folders[name], dtype=torch.float32).to(device) for name in sorted(wanted)}
    sizes = sorted({pipe.sample_size for pipe in pipelines.values()})
    if len(sizes) > 1:
        raise ValueError(f"`model` must name models of one image size, got {sizes}.")
    for table in tables:
        for row, model in [(row, model) for row in table.rows for model in row.models]:
            if isinstance(pipelines.get(model), LatentDiffusionPipeline):
                row.changes.pipeline(pipelines[model])  # raises where it has none such
                if table.kind != "samples":
                    raise ValueError(
                        f"'kind' of the table {table.name!r} must be 'samples' for latent diffusion, got"
                        f" {table.kind!r} with the model {model!r}."
                    )
    return pipelines


def model_keys(pipelines: dict[str, DrawingPipeline]) -> dict[str, str]:
    """Twelve hexadecimal digits of SHA-256 over the weights and configs of each model."""
    texts = {name: json.dumps(pipeline_key(pipe), sort_keys=True) for name, pipe in pipelines.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


def check_num_images(tables: Sequence[AblationTable], num_held_out: int) -> None:
    """
    Make sure that there are as many held-out images as tables want.

    Args:
        tables (`Sequence[AblationTable]`): Those that draw images need none.
        num_held_out (`int`): How many there are.

    Raises:
        ValueError: If a table wants more.
    """
    for table in tables:
        if table.kind != "samples" and table.num_images > num_held_out:
            raise ValueError(
                f"'num_images' of the table {table.name!r} must be at most {num_held_out}, the number of held-out"
                f" images, got {table.num_images}."
            )


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
        variant_of(rows[-1].variant)  # raises if it is none
    required = {"name", "title", "kind", "rows"}
    _check_fields(f"The table {name!r}", fields, required, set(AblationTable.__dataclass_fields__))
    table = AblationTable(**{**fields, "rows": rows})
    if table.kind not in TABLE_KINDS:
        raise ValueError(f"'kind' of the table {name!r} must be one of {TABLE_KINDS}, got {table.kind!r}.")
    _check_seeds(table)
    unknown = sorted(set(table.tasks) - set(EDITING_TASKS))
    if unknown:
        raise ValueError(f"'tasks' of the table {name!r} must be among {EDITING_TASKS}, got {unknown}.")
    return table


def _check_seeds(table: AblationTable) -> None:
    """Refuse rows and seeds that do not fit each other, and differences where there are none to show."""
    counts = sorted({len(row.model) for row in table.rows if isinstance(row.model, list)} - {len(table.seeds)})
    if counts or (table.kind == "editing" and any(isinstance(row.model, list) for row in table.rows)):
        raise ValueError(
            f"'model' in rows of the table {table.name!r} must be one name, or, where nothing is edited, one for each"
            f" of the {len(table.seeds)} 'seeds', got lists of {counts or [len(table.seeds)]}."
        )
    if not table.has_seeds and len(table.seeds) != 1:
        raise ValueError(
            f"'seeds' of the table {table.name!r} must be one, as nothing is drawn and no row has several models, got"
            f" {table.seeds}."
        )
    if table.kind == "editing" and table.differences:
        raise ValueError(
            f"'differences' of the table {table.name!r} must be empty where images are edited, got"
            f" {table.differences}."
        )
    names = [row.name for row in table.rows]
    if any(len(pair) != 2 or set(pair) - set(names) for pair in table.differences):
        raise ValueError(
            f"'differences' of the table {table.name!r} must be pairs of {names}, got {table.differences}."
        )


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
