"""
The code that a model's folder may carry, so that diffusers draws with it where this package is not installed.

It is this package less what drawing does not need, as one flat folder: diffusers looks for imports by regular
expressions, one folder deep, and copies what it finds. The folder's name holds a hash of the code, as diffusers copies
the code of all models to one place. Files beside it are what diffusers opens: one for each pipeline, one for blocks,
which import the folder as a package of that name, and one for each component, which takes its class from there. So the
classes are the same wherever the code was copied to.
"""

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srdd.checks import shown
from srdd.pipelines.scale_pipeline import ScalePipeline


PACKAGE = Path(__file__).parents[1]
HEADER = "# A part of srdd, under the Apache License 2.0. Written by `python -m srdd.publish`: do not edit.\n"

# What there is to draw with, by the names of the files that hold it: by class, and from texts. No two share a name, as
# diffusers copies the files of all models to one place.
PIPELINES = (
    {
        "draw": "SRDDPipeline",
        "inpaint": "SRDDInpaintPipeline",
        "super_resolution": "SRDDSuperResolutionPipeline",
    },
    {
        "text_draw": "SRDDTextPipeline",
        "text_inpaint": "SRDDTextInpaintPipeline",
        "text_super_resolution": "SRDDTextSuperResolutionPipeline",
    },
)

# The same as one set of blocks of Modular Diffusers each, and the module that they are in.
BLOCKS = {"modular": "SRDDBlocks"}, {"text_modular": "SRDDTextBlocks"}
BLOCKS_MODULE = "srdd.pipelines.modular_blocks"

PIPELINE_FILE = """import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # never run: diffusers reads here which files it must copy
    {imports}

sys.path.append(str(Path(__file__).parent))
try:
    importlib.invalidate_caches()
    {name} = importlib.import_module("{module}").{name}
finally:
    sys.path.remove(str(Path(__file__).parent))
"""
COMPONENT_FILE = "from {package} import *  # which the pipeline's file has imported\n"


@dataclass(frozen=True)
class CarriedCode:
    """
    The code in a folder.

    Args:
        digest (`str`): Eight hexadecimal digits of its hash.
        pipelines (`dict[str, str]`): Names of the pipelines' classes, by the names of their files.
    """

    digest: str
    pipelines: dict[str, str]

    @property
    def package(self) -> str:
        """The name of its folder and package."""
        return f"srdd_{self.digest}"


def add_code(folder: str | Path, repository: str | None = None) -> CarriedCode:
    """
    Put the code that draws into the folder of a saved pipeline; code that is there already is replaced. Pipelines of
    this package load the folder as before.

    Args:
        folder (`str` or `Path`): The folder.
        repository (`str`, *optional*): Where it will be on the Hub. `ModularPipeline` loads components from there;
            without, from a folder only, as `modular_model_index.json` must name a repository.

    Returns:
        [`CarriedCode`]

    Raises:
        ValueError: If the folder is none of a pipeline of this package.
        OSError: If there is no `model_index.json`.
    """
    folder = Path(folder)
    index = ScalePipeline.load_config(folder)
    name = index.get("_class_name")
    pipelines, blocks = next((both for both in zip(PIPELINES, BLOCKS) if name in both[0].values()), (None, None))
    if pipelines is None:
        allowed = [each for names in PIPELINES for each in names.values()]
        raise ValueError(f"`_class_name` of {folder} must be one of {allowed}, got {shown(name)}.")
    modules = drawing_modules(PACKAGE, ["srdd", BLOCKS_MODULE])
    code = CarriedCode(_digest(modules), pipelines)
    remove_code(folder)
    (folder / code.package).mkdir()
    for module, source in modules.items():
        _write(folder / code.package / f"{module}.py", source)
    imports = "\n    ".join(f"from .{code.package}.{module} import *" for module in modules)
    for file, each in {**pipelines, **blocks}.items():
        module = code.package if each in pipelines.values() else f"{code.package}.{_flat(BLOCKS_MODULE)}"
        source = PIPELINE_FILE.format(imports=imports, module=module, name=each)
        _write(folder / f"{file}_{code.digest}.py", source)
        if each == name:
            index["_class_name"] = [f"{file}_{code.digest}", each]
    for component, entry in index.items():
        if isinstance(entry, list) and entry[:1] == ["srdd"]:
            index[component] = [code.package, entry[1]]
            _write(folder / component / f"{code.package}.py", COMPONENT_FILE.format(package=code.package))
    ((file, each),) = blocks.items()
    modular = {"_class_name": each, "auto_map": {"ModularPipelineBlocks": f"{file}_{code.digest}.{each}"}}
    for json_file, values in (
        ("model_index.json", index),
        ("modular_config.json", modular),
        ("modular_model_index.json", _modular_index(index, each, repository)),
    ):
        (folder / json_file).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return code


def _modular_index(index: dict, blocks: str, repository: str | None) -> dict:
    """The `modular_model_index.json` to a `model_index.json`. A folder's own files go before those of a repository."""
    modular = {"_class_name": "ModularPipeline", "_blocks_class_name": blocks}
    for name, entry in index.items():
        if name != "_class_name" and isinstance(entry, list) and entry[0] is not None:
            where = {"pretrained_model_name_or_path": repository, "subfolder": name, "variant": None, "revision": None}
            modular[name] = [*entry, {"type_hint": entry, **where}]
    return modular


def remove_code(folder: Path) -> None:
    """Remove the files that [`add_code`] has put into a folder, also those of other versions."""
    files = "|".join(("srdd", *PIPELINES[0], *PIPELINES[1], *BLOCKS[0], *BLOCKS[1]))
    for path in (*folder.iterdir(), *folder.glob("*/*.py")):
        if re.fullmatch(rf"({files})_[0-9a-f]{{8}}(\.py)?", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def drawing_modules(package: Path, roots: Sequence[str]) -> dict[str, str]:
    """
    Modules of the package and what they import of it, as modules of one folder.

    Args:
        package (`Path`): The folder of the package.
        roots (`Sequence[str]`): The modules to start from.

    Returns:
        `dict[str, str]`: Sources by the names of modules.
    """
    waiting, sources = [*roots], {}
    while waiting:
        module = waiting.pop()
        if _flat(module) not in sources:
            sources[_flat(module)], imported = _flattened(module, package)
            waiting += imported
    return dict(sorted(sources.items()))


def _digest(modules: dict[str, str]) -> str:
    sources = modules, PIPELINE_FILE, COMPONENT_FILE
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:8]


def _write(path: Path, source: str) -> None:
    path.write_text(HEADER + source, encoding="utf-8", newline="\n")


def _flat(module: str) -> str:
    """The name of a module in the flat folder."""
    return module.partition(".")[2].replace(".", "_") or "__init__"


def _source(module: str, package: Path) -> Path | None:
    """The file of a module of ours, `None` if there is none."""
    path = package.joinpath(*module.split(".")[1:])
    return next((each for each in (path / "__init__.py", path.with_name(f"{path.name}.py")) if each.is_file()), None)


def _flattened(module: str, package: Path) -> tuple[str, list[str]]:
    """A module's source with imports as they are in the flat folder, and the modules of ours that it imports."""
    source = _source(module, package).read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        if node.module.split(".")[0] != "srdd":
            continue
        statements, modules = _flat_import(node, package)
        imported += modules
        before, after = lines[node.lineno - 1][: node.col_offset], lines[node.end_lineno - 1][node.end_col_offset :]
        lines[node.lineno - 1 : node.end_lineno] = [before + statements + after]
    return "".join(lines), imported


def _flat_import(node: ast.ImportFrom, package: Path) -> tuple[str, list[str]]:
    """
    An import of ours as it is in the flat folder, and the modules that it imports. A space after the dot keeps
    diffusers from looking for the module outside of the folder.
    """
    statements, modules = [], []
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        if _source(submodule, package) is not None:
            modules.append(submodule)
            statements.append(f"from . import {_flat(submodule)} as {alias.asname or alias.name}")
    names = [alias for alias in node.names if f"{node.module}.{alias.name}" not in modules]
    if names:
        where = "" if node.module == "srdd" else f"{_flat(node.module)} "
        statements.insert(0, f"from . {where}import {', '.join(map(ast.unparse, names))}")
        modules.append(node.module)
    return "; ".join(statements), modules
