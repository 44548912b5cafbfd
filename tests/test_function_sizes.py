"""The size of functions, read from the sources of the package and the scripts."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 60  # from the first decorator to the last line, with the functions inside
MAX_PARAMETERS = 8  # positional, keyword-only, *args and **kwargs, without self and cls
FUNCTIONS = {
    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node
    for folder in ("warp_jax", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
}


def _num_lines(function):
    first = min(node.lineno for node in (function, *function.decorator_list))
    return function.end_lineno - first + 1


def _num_parameters(function):
    args = function.args
    parameters = (*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg)))
    return len([p for p in parameters if p.arg not in ("self", "cls")])


def test_no_function_is_long():
    """Fails when a function has more than 60 lines, or the sources are not where this test looks for them."""
    assert len(FUNCTIONS) > 400
    lengths = {name: _num_lines(function) for name, function in FUNCTIONS.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_has_many_parameters():
    """Fails when a function has more than 8 parameters: an object that holds some of them is missing."""
    counts = {name: _num_parameters(f) for name, f in FUNCTIONS.items() if f.name != "__init__"}
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}
