"""Training on several devices of a machine: Lightning Fabric starts and connects the processes."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from napari_convlora.config import DeviceName, TrainConfig
from napari_convlora.devices import choose_device
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.training.processes import Team


@dataclass(frozen=True)
class FabricTeam(Team):
    """Processes connected by Fabric: NCCL between GPUs, gloo between CPU processes."""

    fabric: Any = None

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of all processes' values; raises `ConvLoRAError` if one has ended."""
        try:
            found = self.fabric.all_reduce(value.detach().clone(), reduce_op="sum")
        except RuntimeError as error:
            raise ConvLoRAError(
                "Another process of this training has ended, perhaps for want of memory; give "
                "--devices fewer."
            ) from error
        return found.to(value.device)


def launch(n_devices: int, device: DeviceName) -> FabricTeam:
    """Start this command once more for each further device, and connect all these processes.

    Raises
    ------
    InputError
        Fabric is not installed, or there are not as many devices.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise InputError(
            "Several devices need Lightning Fabric; install it with `pip install "
            '"napari-convlora[multi-gpu]"`.'
        ) from None
    kind = choose_device(device).type
    if kind == "mps":
        raise InputError("There is one mps device; leave out --devices.")
    if kind == "cuda" and n_devices > torch.cuda.device_count():
        raise InputError(
            f"This machine has {torch.cuda.device_count()} CUDA devices; give --devices that many "
            "or fewer."
        )
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")
    fabric = Fabric(accelerator=kind, devices=n_devices, strategy="ddp")
    fabric.launch()
    return FabricTeam(fabric.global_rank, fabric.world_size, fabric)


def enlarge_batches(config: TrainConfig, n_devices: int) -> TrainConfig:
    """Return settings whose batches have a view for each device at least."""
    return replace(
        config,
        batch=max(config.batch, n_devices),
        decoder_batch=max(config.decoder_batch, n_devices),
    )
