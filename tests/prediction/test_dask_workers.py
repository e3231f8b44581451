"""Several processes predict what one does, bit for bit, and a lost one costs nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zarr
from distributed import Client, LocalCluster, WorkerPlugin

from napari_convlora.backbones import Backbone
from napari_convlora.cli import commands, parser
from napari_convlora.control import RunControl
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.events import Progress
from napari_convlora.formats.opening import open_image
from napari_convlora.images.regions import plan_blocks
from napari_convlora.model.adapter import Adapter
from napari_convlora.prediction import dask_workers, to_file
from tests.conftest import make_scene

SHAPE = (530, 1040)
"""Six blocks, of which four are cut off by the image's end."""


class RandomBackbone(WorkerPlugin):
    """Gives workers what the tests' own process has: random weights, and one thread."""

    def setup(self, worker: object) -> None:
        import torch

        from napari_convlora.backbones.testing import random_backbone
        from napari_convlora.prediction import dask_workers

        torch.set_num_threads(1)
        dask_workers.load_backbone = lambda name: random_backbone()


@pytest.fixture(scope="module")
def workers() -> Iterator[LocalCluster]:
    """Two processes of one thread each."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as made,
        Client(made) as client,
    ):
        client.register_plugin(RandomBackbone())
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sparse: Adapter, backbone: Backbone) -> Path:
    """An adapter, an image as zarr, and what one process makes of it."""
    path = tmp_path_factory.mktemp("cluster")
    sparse.save(path / "a.safetensors")
    image = make_scene(*SHAPE)[0].image[0, ..., 0]
    zarr.create_array(path / "big.zarr", data=image, chunks=(300, 300))
    task = to_file.task(path / "a.safetensors", path / "big.zarr", "random_tiny", "cpu")
    image = open_image(path / "big.zarr")
    list(to_file.predict_file(task, sparse, backbone, image, path / "one.tif", RunControl()))
    return path


def predict(folder: Path, scheduler: str, name: str) -> Iterator[Progress]:
    task = to_file.task(folder / "a.safetensors", folder / "big.zarr", "random_tiny", "cpu")
    image = open_image(folder / "big.zarr")
    adapter = Adapter.load(folder / "a.safetensors")
    return to_file.predict_file(
        task, adapter, None, image, folder / name, RunControl(), scheduler=scheduler
    )


def test_two_workers_write_the_same_bytes(folder: Path, workers: LocalCluster, capsys) -> None:
    arguments = ["--images", str(folder / "big.zarr"), "--out", str(folder / "out")]
    address = workers.scheduler_address
    command = ["predict", str(folder / "a.safetensors"), *arguments, "--scheduler", address]
    assert parser.main([*command, "--device", "cpu"]) == commands.DONE, capsys.readouterr().err
    assert (folder / "out" / "big.tif").read_bytes() == (folder / "one.tif").read_bytes()


def test_blocks_of_a_lost_worker_are_predicted_again(folder: Path, workers: LocalCluster) -> None:
    with Client(workers) as client:
        pids = client.run(os.getpid)
    steps = predict(folder, workers.scheduler_address, "lost.tif")
    assert next(steps).total == len(plan_blocks((1, *SHAPE)))
    victim, other = sorted(pids.values())
    os.kill(victim, signal.SIGKILL)
    progress = list(steps)
    assert progress[-1].done == progress[-1].total
    assert (folder / "lost.tif").read_bytes() == (folder / "one.tif").read_bytes()
    end = time.monotonic() + 30  # the nanny starts another one, for the next test
    with Client(workers) as client:
        client.wait_for_workers(2, timeout=30)
        assert victim not in client.run(os.getpid).values()
        assert other in client.run(os.getpid).values()
    assert time.monotonic() < end


def test_stop_cancels_and_what_is_done_is_kept(folder: Path, workers: LocalCluster) -> None:
    control = RunControl()
    task = to_file.task(folder / "a.safetensors", folder / "big.zarr", "random_tiny", "cpu")
    blocks = plan_blocks((1, *SHAPE))
    steps = dask_workers.predict_on(workers.scheduler_address, task, blocks, control)
    seen = []
    for step in steps:
        seen.append(step)
        control.stop()
    assert 0 < len(seen) < len(blocks)


def test_what_is_wrong_on_a_worker_is_one_sentence(folder: Path, workers: LocalCluster) -> None:
    task = to_file.task(folder / "a.safetensors", folder / "one.tif", "random_tiny", "cpu")
    task = dask_workers.BlockTask(folder / "gone.safetensors", task.image, task.backbone, "cpu", "")
    with pytest.raises(ConvLoRAError, match=r"There is no adapter file .*\.$"):
        list(
            dask_workers.predict_on(
                workers.scheduler_address, task, plan_blocks((1, *SHAPE))[:1], RunControl()
            )
        )


def test_no_scheduler_and_no_workers_are_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_workers, "_CONNECT_SECONDS", 1)
    with pytest.raises(
        ConvLoRAError, match=r"^No dask scheduler answers at tcp://127.0.0.1:1;"
    ) as e:
        list(predict(folder, "tcp://127.0.0.1:1", "never.tif"))
    assert not isinstance(e.value, InputError), "that would spare the other images"
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        pytest.raises(ConvLoRAError, match=r"has no workers; start some"),
    ):
        list(predict(folder, empty.scheduler_address, "never.tif"))
