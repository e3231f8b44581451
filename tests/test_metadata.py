"""What the project says of itself outside the package: versions, pins and workflows agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import napari_convlora

ROOT = Path(__file__).parents[1]
YAML = [
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]
PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
)


def test_every_yaml_file_of_the_project_can_be_read() -> None:
    assert len(YAML) > 5
    for path in YAML:
        assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict), path


def test_the_version_to_cite_is_that_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == napari_convlora.__version__


def test_the_newest_release_of_the_changelog_is_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, date = headings[1]
    assert version == napari_convlora.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["date-released"] == date


def test_a_commit_is_checked_with_the_pinned_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    asked = re.findall(r"(ruff|npe2)==([\d.]+)", str(hooks))
    assert {name for name, _ in asked} == {"ruff", "npe2"}
    assert all(PINS[name] == version for name, version in asked)


def test_what_is_tested_is_what_is_promised() -> None:
    """The Pythons of the workflow are those that pip and the index are told."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    tested = workflow["jobs"]["newest"]["strategy"]["matrix"]["python"]
    promised = [name.rsplit(" ", 1)[1] for name in project["classifiers"] if ":: 3." in name]
    assert tested == promised
    assert project["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("extra", ["dev", "docs", "codecs"])
def test_what_make_installs_is_pinned(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"][extra]
    pinned = {_canonical(name) for name in PINS}
    names = {_canonical(re.match(r"[\w.-]+", line)[0]) for line in wanted}
    assert names - {"napari-convlora"} <= pinned


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
