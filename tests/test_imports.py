"""The architecture, read from the imports: a module may import only what lies below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "warp_jax"
LEVELS = {
    0: {
        *("types", "files", "cli", "units", "coefficients", "pareto", "tokenizer", "progress", "optimizers"),
        *("math_answers", "reasoning", "hlo", "chips"),
    },
    1: {
        *("hosts", "trees", "kernels", "weight_files", "objective", "metrics", "plots", "chat", "corpus", "harness"),
        *("models", "models.rope", "models.gguf_tokenizer"),
    },
    2: {"merging", "merge_inputs", "sharding", "gold", "freezing", "models.gguf_import"},
    3: {"prompts", "sampling", "scoring", "rewards", "checkpoint", "merge_files", "models.attention"},
    4: {"loop", "evaluate", "models.transformer"},
    5: {"train", "supervised", "models.functions", "models.published", "models.huggingface_rope"},
    6: {"roofline", "answers", "side_by_side", "models.huggingface_config"},
    7: {"models.huggingface"},
    8: {"pretrained"},
    9: {"architecture"},
    10: {"stages", "export"},
    11: {"prepare", "programs"},
    12: {"points", "validation"},
    13: {"warp", "aot"},
    14: {"fit", "summary"},
    15: {"report"},
    16: {"jobs"},
    17: {"main"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
SIBLINGS = {("models.transformer", "models.rope")}


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def _imported(tree):
    for module, names in _import_statements(tree):
        root, _, inside = module.partition(".")
        if root in ("configs", "scripts"):
            yield module
        if root == "warp_jax":
            for name in names or [""]:
                full = f"{inside}.{name}".strip(".")
                yield full if full in LEVEL_OF else inside


def _import_statements(tree):
    """Pairs of a module and the names taken from it, for both kinds of import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


@pytest.mark.parametrize(("name", "tree"), _modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_downwards(name, tree):
    """Fails when any module imports a sibling or one above it, or configs or scripts."""
    for other in _imported(tree):
        assert LEVEL_OF.get(other, 99) < LEVEL_OF[name] or (name, other) in SIBLINGS, f"{name} imports {other}"


@pytest.mark.parametrize(("name", "tree"), _modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_only_the_upper_levels_see_a_config(name, tree):
    """Fails when a pure module takes a ConfigDict or reads absl flags."""
    roots = {module.split(".")[0] for module, _ in _import_statements(tree)}
    if LEVEL_OF[name] <= LEVEL_OF["pretrained"]:
        assert "ml_collections" not in roots
    if name not in ("main", "cli"):
        assert "absl" not in roots
