"""Ten rounds in one session: neither the process that trains grows nor the one that asks."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import psutil
import pytest

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.control import Controls
from napari_convlora.session.process import Child
from napari_convlora.session.session import Session
from tests.conftest import CLASSES, make_scene, small_forests_here

_STEP = 0.5e6
"""Bytes by which a process may grow from one round to the next; one that stays takes ten times as
much."""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not given back at once")
def test_ten_rounds_take_no_more_memory_than_five() -> None:
    config = TrainConfig(max_steps=3, views=3, detail_steps=5, score_every=2, device="cpu")
    scene, _ = make_scene(256, 256)

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
        steps = [after - before for before, after in pairwise(bytes_[2:])]
        grew = statistics.median(steps)  # once in a while an allocator takes a larger piece
        assert grew < _STEP, f"{name}: {[round(b / 1e6, 1) for b in bytes_]} MB"
