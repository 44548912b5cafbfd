"""The architecture, read from the imports: a folder imports only what its row names, and none imports in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "warp_jax"
MAY_IMPORT = {  # folder, or file at the top: the folders and files that it may import beside itself
    **{name: set() for name in ("__init__", "naming", "exit_codes", "progress", "settings")},
    "types": {"exit_codes"},
    "files": {"exit_codes"},
    "cli": {"files", "exit_codes"},
    "trees": set(),
    "parallel": {"files", "cli"},
    "data": {"types", "files"},
    "storage": {"parallel", "files", "naming", "types"},
    "models": {"parallel", "trees", "naming", "types"},
    "merging": {"storage", "trees", "naming", "types", "files", "progress"},
    "pretrained": {"models", "storage", "data", "trees", "naming", "types", "files"},
    "rewards": {"settings", "pretrained", "models", "data", "parallel", "types", "files", "exit_codes"},
    "generation": {"models", "parallel", "trees", "types"},
    "training": {
        *("settings", "generation", "rewards", "merging", "models", "data", "storage", "parallel"),
        *("trees", "types", "files", "exit_codes"),
    },
    "evaluation": {"settings", "generation", "training", "merging", "data", "parallel", "trees", "types", "files"},
    "report": {"settings", "evaluation", "training", "data", "types", "files"},
    "benchmarks": {"evaluation", "generation", "training", "rewards", "models", "data", "parallel", "types", "files"},
}
MAY_IMPORT["experiment"] = {name for name in MAY_IMPORT if name != "benchmarks"}
MAY_IMPORT["tpu_fit"] = {*MAY_IMPORT["experiment"], "experiment"}
MAY_IMPORT["diagnosis"] = {*MAY_IMPORT["tpu_fit"]}
MAY_IMPORT["main"] = {*MAY_IMPORT["tpu_fit"], "diagnosis"}
MAY_IMPORT["commands"] = {*MAY_IMPORT["main"], "tpu_fit", "benchmarks"}
ONLY = {("merging", "storage"): {"on_disk", "chunking"}, ("merging", "progress"): {"on_disk"}}  # files of a folder
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _imported(tree):
    """Modules of the package that a module imports, wherever the import stands; of scripts and configs, their name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, inside = name.partition(".")
            if root in ("configs", "scripts", "tests"):
                yield name
            while root == "warp_jax" and inside and not {inside, f"{inside}.__init__"} & MODULES.keys():
                inside = inside.rpartition(".")[0]
            if inside and root == "warp_jax":
                yield inside


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_imports_only_what_its_row_names(name):
    """Fails when any module imports from a folder above its own, or from configs, scripts or tests."""
    folder, _, file = name.partition(".")
    for other in _imported(MODULES[name]):
        target = other.partition(".")[0]
        assert target in {folder, *MAY_IMPORT[folder]}, f"{name} imports {other}"
        assert file in ONLY.get((folder, target), {file}), f"{name} imports {other}"


def test_no_import_goes_in_a_circle():
    """Fails when two folders, or two modules of one folder, import each other by way of any others."""
    modules = {name: set(_imported(tree)) - {name} for name, tree in MODULES.items()}
    folders: dict[str, set[str]] = {}
    for name, others in modules.items():
        folder = name.partition(".")[0]
        folders.setdefault(folder, set()).update({other.partition(".")[0] for other in others} - {folder})
    for graph in (modules, folders):
        graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_package_is_easy_to_look_through():
    """Fails when the top holds more than 8 files, or a folder more than 12."""
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and not path.is_symlink())):
        count = len(list(folder.glob("*.py")))
        assert count <= (8 if folder == PACKAGE else 12), f"{folder} holds {count} files"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_upper_levels_see_a_config(name):
    """Fails when a pure module takes a ConfigDict or reads absl flags; commands may do both."""
    roots = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    if name.partition(".")[0] not in ("main", "cli", "commands", "tpu_fit"):
        assert "ml_collections" not in roots
    if name.partition(".")[0] not in ("main", "cli", "commands"):
        assert "absl" not in roots
