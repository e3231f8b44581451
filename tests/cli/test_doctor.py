"""The report on a machine names what to do about what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from napari_convlora.cli import doctor


@pytest.mark.parametrize(
    ("smi", "driver", "build", "remedy"),
    [
        (None, False, None, "with an NVIDIA GPU install"),
        ("/usr/bin/nvidia-smi", False, None, "torch is a CPU build; install a CUDA build"),
        (None, True, None, "torch is a CPU build; install a CUDA build"),
        (None, True, "12.6", "cannot use it.*update the driver"),
    ],
)
def test_a_card_that_is_not_used_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    smi: str | None,
    driver: bool,
    build: str | None,
    remedy: str,
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: smi)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (device,) = (finding for finding in doctor.report() if finding.what == "device")
    assert (device.found, device.ok) == ("cpu", False)
    assert re.search(remedy, device.remedy)
    assert "\n" not in device.remedy
