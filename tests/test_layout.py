"""What the house style says about the sources as a whole: one-way imports, documented names, true docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import srdd
import srdd.pipelines
import srdd.schedulers


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "srdd"
LINKED_FOLDERS = ("pipelines", "schedulers")

# `src/srdd` itself, and the top-level folders that it links to.
SOURCES = sorted(
    {path.resolve() for folder in (PACKAGE, *map(ROOT.joinpath, LINKED_FOLDERS)) for path in folder.rglob("*.py")}
)

# The floors of the house, from the ground up. A part imports itself and parts of the floors below it.
FLOORS = (
    ("checks.py", "kept_tensors.py"),
    ("scales.py", "pictures.py", "area_means.py", "console.py", "whole_folders.py"),
    ("schedulers", "acceleration"),
    ("models",),
    ("pipelines", "data"),
    ("evaluation", "publish"),
    ("training", "theory", "conversion"),
    ("diffusers_registration.py",),
    ("__init__.py",),
)
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}

# What plain drawing does without.
EDITING = {
    "known_region",
    "pixel_regions",
    "windowed_canvas",
    "inpaint_pipeline",
    "super_resolution_pipeline",
    "pipeline_srdd_inpaint",
    "pipeline_srdd_super_resolution",
}

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    """The folder or module of the package that a source belongs to."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parts[0]


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"srdd.{alias.name}" for alias in node.names) if module == "srdd" else (module,)


@pytest.mark.parametrize("name", srdd.__all__)
def test_public_names_exist_and_are_documented(name):
    docstring = getattr(srdd, name).__doc__
    assert docstring
    # A dataclass without a docstring gets its own signature for one.
    assert not docstring.startswith(f"{name}(")


def test_public_names_are_sorted_and_unique():
    assert len(set(srdd.__all__)) == len(srdd.__all__)
    assert sorted(srdd.__all__) == list(srdd.__all__)


@pytest.mark.parametrize("folder", LINKED_FOLDERS)
def test_package_finds_its_top_level_folders(folder):
    link = PACKAGE / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", folder)
    assert Path(getattr(srdd, folder).__file__).resolve() == ROOT / folder / "__init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_of_ours_are_absolute(path):
    parts_and_dots = {entry.stem for entry in PACKAGE.iterdir()} | {""}
    assert not [module for module in imported_modules(tree_of(path)) if module.split(".")[0] in parts_and_dots]


def ours(path: Path) -> list[str]:
    """Modules of ours that a source imports; public names of `srdd` itself stand for where they are from."""
    modules = [module for module in imported_modules(tree_of(path)) if module.split(".")[0] == "srdd"]
    names = [module.removeprefix("srdd.") for module in modules if module != "srdd.__version__"]
    return [getattr(srdd, name).__module__ if name in srdd.__all__ else f"srdd.{name}" for name in names]


def test_all_parts_have_a_floor():
    assert {part_of(path) for path in SOURCES} == {*FLOOR_OF}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path):
    part = part_of(path)
    imported = {module.split(".")[1] for module in ours(path)} - {part}
    floors = {each: FLOOR_OF.get(each, FLOOR_OF.get(f"{each}.py")) for each in imported}
    assert not {each: floor for each, floor in floors.items() if floor is None or floor >= FLOOR_OF[part]}


def test_plain_drawing_does_without_editing():
    waiting, reached = ["pipeline_srdd"], set()
    while waiting:
        name = waiting.pop()
        if name not in reached and (ROOT / "pipelines" / f"{name}.py").exists():
            reached.add(name)
            imports = [
                node
                for node in ast.walk(tree_of(ROOT / "pipelines" / f"{name}.py"))
                if isinstance(node, ast.ImportFrom)
            ]
            modules = [node.module for node in imports if node.module.startswith("srdd.pipelines")]
            waiting += [module.rpartition(".")[2] for module in modules]
            waiting += [alias.name for node in imports if node.module == "srdd.pipelines" for alias in node.names]
    assert {"scale_pipeline", "scale_sampling", "refinement"} <= reached
    assert not EDITING & reached


@pytest.mark.parametrize("path", sorted(ROOT.joinpath("training_scripts").glob("*.py")), ids=name_of)
def test_scripts_stand_alone(path):
    scripts = {script.stem for script in path.parent.glob("*.py")}
    assert not [module for module in imported_modules(tree_of(path)) if module.split(".")[0] in scripts]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_prints(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def documented_parameters(docstring: str) -> dict[str, str]:
    """What stands in the parentheses after every name in the `Args:` or `Parameters:` section."""
    section = re.search(r"^(?:Args|Parameters):\n((?:    .*\n?|\n)+)", docstring, flags=re.MULTILINE)
    if section is None:
        return {}
    # A name starts at the section's own indentation; its parentheses may hold others, and line breaks.
    return dict(re.findall(r"^    (\w+) \((.+?)\):(?=\s|$)", section[1], flags=re.MULTILINE | re.DOTALL))


def signature_defaults(node: Documented) -> dict[str, ast.expr | None] | None:
    """The parameters of a function, of a class's own `__init__` or of a dataclass, and their defaults."""
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits and not node.decorator_list:
            return None  # a base class's
        if not inits:
            return {item.target.id: item.value for item in node.body if isinstance(item, ast.AnnAssign)}
        node = inits[0]
    arguments = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
    parameters = dict(zip([*arguments, *node.args.kwonlyargs], [*defaults, *node.args.kw_defaults], strict=True))
    return {argument.arg: default for argument, default in parameters.items() if argument.arg not in ("self", "cls")}


def slips(node: Documented) -> Iterator[str]:
    """Where a docstring says something else about the parameters than the signature."""
    documented = documented_parameters(ast.get_docstring(node) or "")
    defaults = signature_defaults(node)
    if defaults is None:
        return
    expected = list(defaults) if isinstance(node, ast.ClassDef) else [name for name in defaults if name in documented]
    if documented and list(documented) != expected:
        yield f"documented are {list(documented)}, the parameters are {list(defaults)}"
    for name, about in documented.items():
        default = defaults.get(name)
        stated = re.search(r"defaults to `?(.+?)`?$", about, flags=re.DOTALL)
        if default is None:
            if stated:
                yield f"`{name}` has no default"
            continue
        try:
            value = ast.literal_eval(default)
        except ValueError:  # an expression
            continue
        if stated and ast.literal_eval(stated[1]) != value:
            yield f"`{name}` defaults to {value!r}, not to {stated[1]}"
        elif value is None and "*optional*" not in about:
            yield f"`{name}` is not marked *optional*"
        elif not stated and isinstance(value, (bool, int, float, str)):
            yield f"`{name}` defaults to {value!r}, which is not said"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstring_defaults_are_those_of_the_signature(path):
    documented = [node for node in ast.walk(tree_of(path)) if isinstance(node, Documented)]
    assert not [f"{node.name}: {slip}" for node in documented for slip in slips(node)]


def test_the_docstring_check_sees_every_parameter_of_a_model():
    source = (PACKAGE / "models" / "transformer_scale_2d.py").read_text(encoding="utf-8")
    (node,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name == "ScaleTransformer2DModel"
    ]
    assert documented_parameters(ast.get_docstring(node))["norm_eps"] == "`float`, defaults to 1e-6"
    assert not list(slips(node))
    wrong = ast.parse(source.replace("norm_eps: float = 1e-6", "norm_eps: float = 1e-5"))
    found = [slip for node in ast.walk(wrong) if isinstance(node, Documented) for slip in slips(node)]
    assert found == ["`norm_eps` defaults to 1e-05, not to 1e-6"]
