"""How Sphinx builds the site: `make docs`.

The README is the front page. The Python pages are made from what is there, the public names of the
package and one page for each folder of modules, so that nothing is listed by hand. Nothing is
fetched from the network, neither here nor by a reader's browser.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")  # the window's modules are imported

import napari_convlora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "napari_convlora"
REPOSITORY = "https://github.com/napari-convlora/napari-convlora"
AT_ROOT = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages of the site that are files at the repository's root."""

project = "napari-convlora"
author = "The napari-convlora developers"
copyright = author  # noqa: A001
release = version = napari_convlora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["*.py"]
myst_heading_anchors = 3
default_role = "literal"  # single backticks are code, as in Markdown
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes are documented where they are defined as well
napoleon_custom_sections = [("Signals", "params_style")]
suppress_warnings = ["ref.python"]  # attributes of several classes may share a name
autodoc_default_options = {"members": True, "ignore-module-all": True, "member-order": "bysource"}

html_title = project
html_theme = "pydata_sphinx_theme"
html_show_sourcelink = False
html_theme_options = {
    "github_url": REPOSITORY,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}


def setup(app: Any) -> None:
    """Tell Sphinx what is to be done when."""
    app.connect("builder-inited", make_python_pages)
    app.connect("source-read", read_from_root)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_foreign)


def make_python_pages(app: Any) -> None:
    """Write `docs/python`, anew: an index of public names, and a page for each folder."""
    folder = Path(app.srcdir) / "python"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    packages = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    for package in packages:
        (folder / f"{_dotted(package)}.rst").write_text(_modules(package), encoding="utf-8")
    (folder / "index.rst").write_text(_public_names(packages), encoding="utf-8")


def read_from_root(app: Any, page: str, source: list[str]) -> None:
    """Put a file of the repository's root before what its page says, with links that hold."""
    if page in AT_ROOT:
        text = (ROOT / AT_ROOT[page]).read_text(encoding="utf-8").replace("](docs/", "](")
        for target, name in AT_ROOT.items():
            text = text.replace(f"]({name}", f"]({target}.md")
        text = re.sub(r"\]\(([A-Z_]+(\.\w+)?)\)", rf"]({REPOSITORY}/blob/main/\1)", text)
        source[0] = f"{text}\n{source[0]}"


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _public_names(packages: list[Path]) -> str:
    lines = [*_heading("Python", "="), "What `from napari_convlora import ...` offers:", ""]
    for name in napari_convlora.__all__:
        if not name.startswith("_"):
            thing = getattr(napari_convlora, name)
            lines.append(f"* :py:obj:`{name} <{thing.__module__}.{thing.__qualname__}>`")
    lines += ["", "Every module, folder by folder:", "", ".. toctree::", "   :maxdepth: 1", ""]
    return "\n".join([*lines, *(f"   {_dotted(package)}" for package in packages), ""])


def _modules(package: Path) -> str:
    name = _dotted(package)
    lines = [*_heading(name, "="), f".. automodule:: {name}", ""]
    for path in sorted(package.glob("[!_]*.py")):
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            lines += [*_heading(path.stem, "-"), f".. automodule:: {_dotted(path)}", ""]
    return "\n".join(lines)


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Leave the bars of a magnitude alone; to docutils they enclose a name to be replaced."""
    lines[:] = [re.sub(r"(?<!`)\|(\w+)\|", r"\|\1\|", line) for line in lines]


def skip_foreign(
    app: Any, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out aliases of types, and functions that only come from elsewhere."""
    foreign = isinstance(thing, types.BuiltinFunctionType | types.GenericAlias)
    return True if foreign else None
