"""Blocks predicted by the workers of a dask cluster, each of which loads the model once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from napari_convlora.backbones import load_backbone
from napari_convlora.config import DeviceName
from napari_convlora.control import RunControl
from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import Progress
from napari_convlora.formats.opening import open_image
from napari_convlora.images.regions import Block
from napari_convlora.model.adapter import Adapter
from napari_convlora.prediction.predict import BlockPrediction, predict_blocks, ready_scorer
from napari_convlora.prediction.region_scorer import Scorer

_CONNECT_SECONDS = 10
_LOOK_SECONDS = 0.2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class BlockTask:
    """What a worker predicts; every worker must find the files under the same paths.

    Parameters
    ----------
    adapter, image
        Absolute paths.
    backbone
        Name or path of the adapter's backbone.
    device
        Where each worker computes.
    version
        Differs when the files have changed, so that they are read again.
    """

    adapter: Path
    image: Path
    backbone: str
    device: DeviceName
    version: str


def predict_on(
    address: str, task: BlockTask, blocks: Sequence[Block], control: RunControl
) -> Iterator[Progress | BlockPrediction]:
    """Predict `blocks` on a cluster; yields each as it arrives, in any order.

    The blocks of a worker that is lost are predicted by others. Labels are the same bit for bit as
    those of one process on such a machine with as many threads as a worker.

    Parameters
    ----------
    address
        Of the scheduler, such as ``tcp://host:8786``.
    task
        What to predict.
    blocks
        Which parts, neighbours one after another.
    control
        Its `stop` ends the generator and cancels what has not begun.

    Raises
    ------
    ConvLoRAError
        dask.distributed is not installed, no scheduler answers, it has no workers, or a worker
        cannot predict.
    """
    if not blocks:
        return
    with _connect(address) as client:
        workers = sorted(client.nthreads())
        if not workers:
            raise ConvLoRAError(
                f"{address} has no workers; start some with: dask worker {address}."
            )
        finished: SimpleQueue[Any] = SimpleQueue()
        waiting = {}
        for i, block in enumerate(blocks):
            # Neighbours share tiles, so each worker gets a stretch of them; others may help.
            worker = workers[i * len(workers) // len(blocks)]
            future = client.submit(
                _predict_block, task, block, workers=[worker], allow_other_workers=True, pure=False
            )
            future.add_done_callback(finished.put)
            waiting[future] = block
        while waiting:
            try:
                future = finished.get(timeout=_LOOK_SECONDS)
            except Empty:
                future = None
            if control.stopping:
                client.cancel(list(waiting), force=True)
                return
            if future is not None:
                block = waiting.pop(future)
                yield BlockPrediction(block, _result(future))
                yield Progress(len(blocks) - len(waiting), len(blocks))


def _connect(address: str) -> Any:
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise ConvLoRAError(
            "--scheduler needs dask.distributed; run: pip install 'napari-convlora[distributed]'."
        ) from error
    try:
        return distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:  # timeouts are OSErrors
        raise ConvLoRAError(
            f"No dask scheduler answers at {address}; start one with: dask scheduler."
        ) from error


def _result(future: Any) -> np.ndarray:
    try:
        return future.result()
    except ConvLoRAError:
        raise
    except Exception as error:  # whatever a worker may raise, a cancelled future included
        raise ConvLoRAError(
            f"The cluster could not go on ({type(error).__name__}: {str(error)[:200]}); blocks "
            "finished so far are kept, so run the same command again."
        ) from error


def _predict_block(task: BlockTask, block: Block) -> np.ndarray:
    """Labels (h, w) uint8 of a block; runs on a worker."""
    # One block at a time takes all threads of the worker. Their number matters to the last bit, and
    # torch keeps it per thread.
    n_threads = importlib.import_module("distributed").get_worker().state.nthreads
    with _one_at_a_time:
        torch.set_num_threads(n_threads)
        scorer, adapter = _load(task)
        *_, last = predict_blocks(scorer, adapter, [block], keep_tiles=True)
    assert isinstance(last, BlockPrediction)
    return last.labels


@functools.lru_cache(maxsize=1)
def _load(task: BlockTask) -> tuple[Scorer, Adapter]:
    _keep_freed_memory()
    adapter = Adapter.load(task.adapter)
    image = open_image(task.image)
    return ready_scorer(adapter, load_backbone(task.backbone), image, device=task.device), adapter


def _keep_freed_memory() -> None:
    """Have the C library reuse memory, as it does by itself outside of dask.

    dask's nannies set MALLOC_TRIM_THRESHOLD_, so that every array is mapped anew and page faults
    take as long as the computation.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc
            library.mallopt(_M_TRIM_THRESHOLD, 256 * 1024**2)
            library.mallopt(_M_MMAP_THRESHOLD, 32 * 1024**2)
