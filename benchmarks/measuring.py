"""What the benchmarks share: a function in a process of its own, timed, with its peak memory."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass
class Cost:
    """Best and median seconds of several calls, and the most memory above the start (bytes)."""

    best: float
    median: float
    memory: int


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the most resident bytes above those at its start.

    Sampled every 2 ms, so that memory taken and given back before the block does not count.
    """
    process = psutil.Process()
    start, done, peak = process.memory_info().rss, threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


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
