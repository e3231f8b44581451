"""Which device a round runs on, and how many cores it may take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import joblib
import psutil
import torch

from napari_convlora.config import DeviceName
from napari_convlora.errors import InputError

_SECONDS_BETWEEN_LOOKS = 0.005


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
    torch.set_num_threads(max(1, joblib.cpu_count() - 1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out; for a CPU's torch has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def available_memory(device: torch.device | None = None) -> int:
    """Bytes that may still be taken on `device`; on the CPU within the limits of a container."""
    if device is not None and device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min([psutil.virtual_memory().available, *_control_groups(Path("/"))])


def _control_groups(root: Path) -> Iterator[int]:
    """Bytes left in each of the control groups of Linux (version 2 or 1) that bound this process.

    Files that the system has read count as used there, but it gives them up where memory is short.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            if controllers == "memory":
                mount /= "memory"
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            elif controllers:
                continue
            group = mount / path.lstrip("/")
            # In a container the path may be that outside; then the mount itself is the group.
            for folder in {group, *(p for p in group.parents if p.is_relative_to(mount)), mount}:
                with suppress(OSError, ValueError):
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    stat = (folder / "memory.stat").read_text().split()
                    files = dict(zip(stat[::2], stat[1::2], strict=True)).get(names[2], "0")
                    yield max(0, limit - used + int(files))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the most bytes in use at a time during it.

    On CUDA those of tensors, elsewhere those of the process, looked at every few milliseconds.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if done.wait(_SECONDS_BETWEEN_LOOKS):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Compute in bfloat16 where CUDA has it; nowhere else, as it can be far slower there."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what is drawn for a computation on `device`, as `torch.manual_seed` does.

    Without a GPU that function writes out the call stack for each kind of device that is absent,
    which is dear for small steps.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while, as sums depend on it in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(count, 4 * joblib.cpu_count())))
    try:
        yield
    finally:
        torch.set_num_threads(before)
