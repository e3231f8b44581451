from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from napari_convlora import devices
from napari_convlora.devices import available_memory, mixed_precision, seed_draws


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\nslab 3\n")


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_a_container_bounds_what_is_free(tmp_path: Path, version: int, inside: bool) -> None:
    """The group is found where its path says, and at the mount where that is seen from outside."""
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "4:memory:/jobs/7" if version == 1 else "0::/jobs/7"
    (tmp_path / "proc/self/cgroup").write_text(f"9:cpu:/elsewhere\n{line}\n")
    mount = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    names = V1 if version == 1 else V2
    group(mount / "jobs/7" if inside else mount, names, "5000", 3000, 500)
    if inside and version == 2:
        group(mount / "jobs", names, "max", 9000, 0)
    assert list(devices._control_groups(tmp_path)) == [2500]


def test_without_control_groups_the_machine_is_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(devices._control_groups(tmp_path)) == []
    assert 0 < available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(devices, "_control_groups", lambda _: iter([7]))
    assert available_memory(torch.device("cpu")) == 7


def test_there_is_no_mixed_precision_on_the_cpu() -> None:
    with mixed_precision(torch.device("cpu")):
        assert (torch.rand(3, 3) @ torch.rand(3, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)
def test_the_same_seed_draws_the_same_on_a_device_and_on_the_cpu(device: str) -> None:
    drawn = []
    with torch.random.fork_rng():
        for seed in (1, 2, 1):
            seed_draws(seed, torch.device(device))
            drawn.append((torch.rand(5), torch.rand(5, device=device)))
    for first, other, again in zip(*drawn, strict=True):
        assert first.equal(again)
        assert not first.equal(other)
