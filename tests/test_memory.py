"""Ten rounds in one session: neither the process that trains grows nor the one that asks."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.control import Controls
from napari_convlora.session.process import Child
from napari_convlora.session.session import Session
from tests.conftest import CLASSES, make_scene, small_forests_here

_NOISE = 8e6
"""Bytes that the sizes may differ by; a round that stayed would be there five times."""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not given back at once")
def test_ten_rounds_take_no_more_memory_than_five() -> None:
    config = TrainConfig(max_steps=3, views=3, detail_steps=5, score_every=2, device="cpu")
    scene, _ = make_scene(400, 400)

    def job(session: Callable[[], Session], controls: Controls) -> Iterator[Any]:
        small_forests_here()
        state = session()
        state._backbone, state.train_config = ("litemedsam", random_backbone()), config
        yield from state.run_round([scene], CLASSES, controls.training)
        yield state.cache.nbytes

    child, session = Child(), Session()
    sizes: list[tuple[int, int]] = []
    cached: list[int] = []
    try:
        for _ in range(10):
            for messages in child.run(job, Controls(), session.installed):
                for message in messages:
                    if isinstance(message, int):
                        cached.append(message)
                    session.record(message)
            both = psutil.Process(child.pid), psutil.Process()
            sizes.append(tuple(process.memory_info().rss for process in both))
    finally:
        child.close()
    assert len(session.rounds) == 10
    assert len(set(cached[1:])) == 1, "the same views, looked up; from the second on, compared"
    for name, bytes_ in zip(("child", "parent"), zip(*sizes, strict=True), strict=True):
        growth = statistics.median(bytes_[-3:]) - statistics.median(bytes_[2:5])
        assert growth < _NOISE, f"{name}: {[round(b / 1e6) for b in bytes_]} MB"
