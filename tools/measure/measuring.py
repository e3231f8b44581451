"""What the benchmarks share: a function in a process of its own, timed, with its peak memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from napari_convlora import devices


@dataclass
class Cost:
    """Best and median seconds of several calls, and the most memory above the start (bytes)."""

    best: float
    median: float
    memory: int


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the most resident bytes above those at its start.

    Memory taken and given back before the block does not count.
    """
    start, above = psutil.Process().memory_info().rss, [0]
    with devices.peak_memory(torch.device("cpu")) as peak:
        yield above
    above[0] = peak[0] - start


def cost(action: Callable[[], Any], repeats: int) -> Cost:
    """Call `action` once to warm up, with its memory measured, and then `repeats` times."""
    with peak_memory() as peak:
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return Cost(min(seconds), sorted(seconds)[len(seconds) // 2], peak[0])


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process, so that one leaves no memory to the next."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
