"""Predicting an image of any size into a file, with a kill or Ctrl-C costing no finished block."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator
from pathlib import Path

from napari_convlora import __version__
from napari_convlora.backbones import Backbone
from napari_convlora.config import DeviceName
from napari_convlora.control import RunControl
from napari_convlora.events import Progress
from napari_convlora.exports.masks import write_table_beside
from napari_convlora.formats import label_store, ome_zarr, tiff
from napari_convlora.images.planes import Planes
from napari_convlora.images.regions import BLOCK, plan_blocks
from napari_convlora.model.adapter import Adapter
from napari_convlora.prediction.dask_workers import BlockTask, predict_on
from napari_convlora.prediction.predict import predict_blocks, ready_scorer


def task(adapter: Path, image: Path, backbone: str, device: DeviceName = "auto") -> BlockTask:
    """Describe a prediction, so that a later run knows whether it may go on with this one.

    Parameters
    ----------
    adapter, image
        Their files.
    backbone
        Name or path of the adapter's backbone.
    device
        Where to compute.
    """
    version = {
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "image": [str(image.resolve()), _state(image)],
        "block": BLOCK,
        "version": __version__,
    }
    return BlockTask(adapter.resolve(), image.resolve(), backbone, device, json.dumps(version))


def _state(image: Path) -> str:
    """Return a hash that differs once a file, or any in a folder, was written to."""
    files = sorted(p for p in image.rglob("*") if p.is_file()) if image.is_dir() else [image]
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace"))
    return digest.hexdigest()


def predict_file(
    task: BlockTask,
    adapter: Adapter,
    backbone: Backbone | None,
    image: Planes,
    path: Path,
    control: RunControl,
    scheduler: str | None = None,
) -> Generator[Progress, None, Path | None]:
    """Predict the blocks that are still missing, and write the whole once none is.

    Until then the blocks are in a hidden folder beside `path`. A run that was killed or stopped is
    resumed by calling this again.

    Parameters
    ----------
    task
        What is predicted.
    adapter, backbone, image
        What `task` names, loaded; `backbone` may be None where workers load it.
    path
        ``.tif`` for a tiled TIFF, ``.zarr`` for an OME-Zarr.
    control
        Its `stop` ends the generator.
    scheduler
        Address of a dask scheduler whose workers predict, instead of this process.

    Yields
    ------
    Progress
        Of what was missing, in tiles, or in blocks on a cluster.

    Returns
    -------
    table
        Where the class table of the file is; None if it is not written yet.

    Raises
    ------
    ConvLoRAError
        Unfinished blocks there are of something else, the image cannot be used, a file cannot be
        written, or the cluster cannot go on.
    """
    if path.suffix == ".zarr":
        ome_zarr.check_replaceable(path)
    folder = path.with_name(f".{path.name}.unfinished")
    store = label_store.open_labels(folder, image.shape, task.version)
    blocks = store.missing(plan_blocks(image.shape))
    if scheduler is not None:
        steps = predict_on(scheduler, task, blocks, control)
    else:
        assert backbone is not None
        scorer = ready_scorer(adapter, backbone, image, device=task.device)
        steps = predict_blocks(scorer, adapter, blocks, control=control)
    for step in steps:
        if isinstance(step, Progress):
            yield step
        else:
            store.write(step.block, step.labels)
    if store.missing(blocks):
        return None
    if path.suffix == ".zarr":
        ome_zarr.save_zarr(store, path, adapter.classes)
        return write_table_beside(path, adapter.classes)
    tiff.save_tiff(store, path, adapter.classes)
    table = write_table_beside(path, adapter.classes)
    shutil.rmtree(store.folder, ignore_errors=True)  # the mask is there, which is what counts
    return table
