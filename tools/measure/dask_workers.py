"""One process against two dask workers, one thread each: seconds, ratio, and whether bytes agree.

    OMP_NUM_THREADS=1 python tools/measure/dask_workers.py --side 4096

A tiny random backbone predicts an image of random uint8 into a tiled TIFF. Workers run already, and
have predicted the image once before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common_large import save_adapter, save_image
from distributed import Client, LocalCluster, WorkerPlugin

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.control import RunControl
from napari_convlora.formats.opening import open_image
from napari_convlora.model.adapter import Adapter
from napari_convlora.prediction import to_file


class RandomBackbone(WorkerPlugin):
    """Gives every worker the random weights."""

    def setup(self, worker: object) -> None:
        """Replace what loads a checkpoint."""
        from napari_convlora.prediction import dask_workers

        torch.set_num_threads(1)
        # Where `setattr` hides from the type checker that another function takes its place.
        setattr(dask_workers, "load_backbone", lambda name: random_backbone())  # noqa: B010


def seconds(folder: Path, name: str, scheduler: str | None = None) -> float:
    """Predict the image into a file and return how long it took."""
    paths = folder / "a.safetensors", folder / "image.zarr"
    task = to_file.task(*paths, "random_tiny", "cpu")
    adapter, image = Adapter.load(paths[0]), open_image(paths[1])
    start = time.perf_counter()
    list(
        to_file.predict_file(
            task, adapter, random_backbone(), image, folder / name, RunControl(), scheduler
        )
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096, help="of the image, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| one process, s | two workers, s | ratio | same bytes |")
    print("|---|---|---|---|", flush=True)
    with (
        tempfile.TemporaryDirectory() as name,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(RandomBackbone())
        folder = Path(name)
        save_adapter(folder / "a.safetensors")
        save_image(folder / "image.zarr", options.side)
        seconds(folder, "warm.tif", cluster.scheduler_address)
        for _ in range(options.repeats):
            one = seconds(folder, "one.tif")
            two = seconds(folder, "two.tif", cluster.scheduler_address)
            same = (folder / "one.tif").read_bytes() == (folder / "two.tif").read_bytes()
            print(f"| {one:.1f} | {two:.1f} | {one / two:.2f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
