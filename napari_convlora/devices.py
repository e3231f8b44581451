"""Which device a round runs on, and how many cores it may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from napari_convlora.config import DeviceName, InputError


def choose_device(name: DeviceName = "auto") -> torch.device:
    """Pick the device called `name`; ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises
    ------
    InputError
        If the device is asked for by name and absent.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((d for d, there in present.items() if there), "cpu"))
    if name != "cpu" and not present.get(name, False):
        raise InputError(
            f"Device {name} is not available with torch {torch.__version__} on this machine; "
            "use --device cpu, or install a torch build for it (see `napari-convlora doctor`)."
        )
    return torch.device(name)


def leave_a_core() -> None:
    """Limit torch to all cores but one, so that a window beside it keeps answering."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out; for a CPU's torch has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while, as sums depend on it in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(count, 4 * (os.cpu_count() or 1))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
