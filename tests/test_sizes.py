"""
How large the parts are that a reader must hold in mind at once, and bounds for it.

`python tests/test_sizes.py` prints the sizes. Functions and changes of file are those of one draw with a tiny Markov
model whose linear layers are torch's own, as on most CPUs and on GPUs: each function of ours counts once, and each
time that the next call is in another file than the one before.
"""

import ast
import inspect
import sys
from pathlib import Path
from unittest import mock

import torch
from tiny_models import tiny_pipeline

from srdd import ScaleScheduler
from srdd.acceleration import linear_layers
from srdd.pipelines.scale_sampling import sample_scales


ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / folder) for folder in ("src", "pipelines", "schedulers")]

# What the two may be at most.
BOUNDS = {
    "lines of sample_scales": 45,
    "branches of sample_scales": 10,
    "values carried from turn to turn in sample_scales": 4,
    "options of ScaleScheduler": 12,
    "functions in a plain draw": 44,
    "changes of file in a plain draw": 59,
}


def tree_of(function) -> ast.FunctionDef:
    return ast.parse(inspect.getsource(function)).body[0]


def num_lines(function: ast.FunctionDef) -> int:
    """Lines from the signature to the end, less the docstring."""
    docstring = function.body[0]
    return function.end_lineno - function.lineno - (docstring.end_lineno - docstring.lineno)


def num_branches(function: ast.FunctionDef) -> int:
    """Places where the way through a function depends on a value."""
    counts = [len(node.values) - 1 for node in ast.walk(function) if isinstance(node, ast.BoolOp)]
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.comprehension, ast.ExceptHandler)
    return sum(counts) + sum(isinstance(node, kinds) for node in ast.walk(function))


def names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Names that are read or set somewhere in an expression or statement."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, context)}


def read_before_set(statements: list[ast.stmt], known: set[str]) -> tuple[set[str], set[str]]:
    """Names that statements may read before they have set them, and those that are set after them whatever happens."""
    early, known = set(), set(known)
    for statement in statements:
        if isinstance(statement, (ast.If, ast.For)):
            head = statement.test if isinstance(statement, ast.If) else statement.iter
            target = set() if isinstance(statement, ast.If) else names(statement.target, ast.Store)
            early |= names(head, ast.Load) - known
            ways = [read_before_set(statement.body, known | target), read_before_set(statement.orelse, known)]
            early = early.union(*(way[0] for way in ways))
            known = known | (ways[0][1] & ways[1][1])
        else:
            early |= names(statement, ast.Load) - known
            known |= names(statement, ast.Store)
    return early, known


def carried(loop: ast.For) -> set[str]:
    """Names that a turn of a loop may read as an earlier turn has set them."""
    early, _ = read_before_set(loop.body, names(loop.target, ast.Store))
    return early & set().union(*(names(statement, ast.Store) for statement in loop.body))


def plain_draw() -> tuple[int, int]:
    """Functions of ours that a draw calls, and how often the next one is in another file."""
    with mock.patch.object(linear_layers, "MKL_IS_SLOW", False):
        pipe = tiny_pipeline()
    pipe(1, generator=torch.Generator().manual_seed(0))
    calls = []

    def watch(frame, event, argument):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        # What stands in angle brackets, comprehensions for one, belongs to the function around it.
        if event == "call" and not name.startswith("<"):
            resolved = str(Path(path).resolve())
            if resolved.startswith(tuple(SOURCES)):
                calls.append((resolved, frame.f_code.co_firstlineno))

    generator = torch.Generator().manual_seed(0)
    sys.setprofile(watch)
    try:
        pipe(1, generator=generator)
    finally:
        sys.setprofile(None)
    return len(set(calls)), sum(call[0] != following[0] for call, following in zip(calls, calls[1:]))


def sizes() -> dict[str, int]:
    loop = tree_of(sample_scales)
    loops = [node for node in ast.walk(loop) if isinstance(node, ast.For)]
    options = inspect.signature(ScaleScheduler.__init__).parameters
    return {
        "lines of sample_scales": num_lines(loop),
        "branches of sample_scales": num_branches(loop),
        "values carried from turn to turn in sample_scales": max(len(carried(each)) for each in loops),
        "options of ScaleScheduler": len(options) - 1,
        **dict(zip(("functions in a plain draw", "changes of file in a plain draw"), plain_draw())),
    }


def test_the_sampling_run_stays_small():
    found = sizes()
    assert found.keys() == BOUNDS.keys()
    assert not {name: size for name, size in found.items() if size > BOUNDS[name]}


def test_what_a_loop_carries_is_found():
    source = "for x in y:\n a = b + a\n c = 1\n d = c\n if d:\n  e = 1\n print(e)\n for z in x:\n  b = z\n"
    assert carried(ast.parse(source).body[0]) == {"a", "b", "e"}


if __name__ == "__main__":
    for name, size in sizes().items():
        print(f"{size:4} (at most {BOUNDS[name]:2})  {name}")
