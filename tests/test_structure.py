"""What CONTRIBUTING promises of the shape of the package."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import napari_convlora

PACKAGE = Path(napari_convlora.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


NAMES = {name_of(path): path for path in MODULES}


def test_the_top_is_small_enough_to_be_seen_at_once() -> None:
    folders = [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len([p for p in PACKAGE.iterdir() if p.suffix == ".py"]) <= 8
    assert len(folders) <= 16


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=name_of)
def test_every_folder_says_in_one_line_what_lives_there(path: Path) -> None:
    text = ast.get_docstring(TREES[path])
    assert text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_too_long_to_be_read_at_once(path: Path) -> None:
    tree, long = TREES[path], []
    if len(path.read_text(encoding="utf-8").splitlines()) > 420:
        long.append("the module")
    for node in ast.walk(tree):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and (node.end_lineno or 0) - body[0].lineno + 1 > 60:
                long.append(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, Function)]
            if (node.end_lineno or 0) - node.lineno + 1 > 300 or len(methods) > 25:
                long.append(node.name)
    assert not long


def test_no_two_public_things_have_one_name() -> None:
    count = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in count.items() if times > 1] == []


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, for types alone or when it runs, too."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(NAMES)


def test_no_modules_import_each_other_directly_or_round_about() -> None:
    left = {name: imported(path) - {name} for name, path in NAMES.items()}
    while True:
        free = {name for name, others in left.items() if not others & set(left)}
        if not free:
            break
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


def test_the_command_line_alone_knows_argparse() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(a.name == "argparse" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "argparse")
    }
    assert users == {"cli"}
