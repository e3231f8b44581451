"""Labels of a large image, written block by block so that a kill costs no finished block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.images.regions import BLOCK, Block, plan_blocks

IDENTITY_KEY = "napari_convlora"


class OnlyFiles(LocalStore):
    """A folder in which nothing but files is opened: of a pipe nobody would see the end."""

    def get_sync(self, key: str, **how: Any) -> Any:
        """Read a file of the folder."""
        self._check(key)
        return super().get_sync(key, **how)

    async def get(self, key: str, *args: Any, **how: Any) -> Any:
        """Read a file of the folder."""
        self._check(key)
        return await super().get(key, *args, **how)

    def _check(self, key: str) -> None:
        check_no_device(self.root / key)


@contextlib.contextmanager
def to_go_on(path: Path) -> Iterator[None]:
    """Raise what the disk says as an `InputError` that tells how to go on."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written ({error.strerror}); free some space and run the same "
            "command again to go on."
        ) from error


@dataclass(frozen=True)
class LabelStore:
    """Labels on disk, block by block; what is written survives a kill.

    A block is written whole or not at all, so those that exist are those that are done.

    Parameters
    ----------
    folder
        A zarr group; its array ``0`` has chunks of one block.
    shape
        (P, H, W).
    """

    folder: Path
    shape: tuple[int, int, int]

    @property
    def array(self) -> Any:
        """The zarr array (H, W), or (P, H, W) of several planes, uint8."""
        return zarr.open_array(OnlyFiles(self.folder / "0"), mode="r+")

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of `blocks` that are not written yet."""
        return [b for b in blocks if not self._chunk(b).exists()]

    def write(self, block: Block, labels: np.ndarray) -> None:
        """Write class ids (h, w) of a block, all of them 1 or more."""
        with to_go_on(self.folder):
            self.array[self._at(block)] = labels

    def read(self, block: Block) -> np.ndarray:
        """Class ids (h, w) of a block."""
        return self.array[self._at(block)]

    def drop_damaged(self) -> None:
        """Forget blocks that cannot be read: a power cut may leave empty files behind."""
        array = self.array
        for block in plan_blocks(self.shape):
            chunk = self._chunk(block)
            if chunk.exists():
                try:
                    whole = bool(array[self._at(block)].all())  # ids are 1 or more
                except Exception:  # decoders of damaged files raise nearly anything
                    whole = False
                if not whole:
                    chunk.unlink()

    def _at(self, block: Block) -> tuple[Any, ...]:
        plane = () if self.shape[0] == 1 else (block.plane,)
        return (*plane, block.rows, block.columns)

    def _chunk(self, block: Block) -> Path:
        plane = () if self.shape[0] == 1 else (block.plane,)
        where = (*plane, block.top // BLOCK, block.left // BLOCK)
        return self.folder.joinpath("0", "c", *map(str, where))


def open_labels(folder: Path, shape: Sequence[int], identity: str) -> LabelStore:
    """Create a store of labels (P, H, W), or go on with the one that an earlier run left behind.

    Parameters
    ----------
    folder
        Its place; the folder above must exist.
    shape
        (P, H, W).
    identity
        What the labels come from: image, adapter and settings, in words or hashes.

    Raises
    ------
    InputError
        The folder holds labels of another identity, or cannot be written.
    """
    store = LabelStore(folder, (shape[0], shape[1], shape[2]))
    try:
        if (folder / "0" / "zarr.json").exists():
            try:
                found = zarr.open_group(OnlyFiles(folder, read_only=True), mode="r").attrs.get(
                    IDENTITY_KEY
                )
                if found == identity:
                    store.drop_damaged()
            except Exception:  # parsers of damaged files raise nearly anything
                found = None
            if found != identity:
                raise InputError(
                    f"'{folder}' is damaged, or part of a prediction with another adapter, image "
                    "or setting; delete that folder, or choose another --out."
                )
            return store
        flat = store.shape[1:] if store.shape[0] == 1 else store.shape
        zarr.create_group(folder, attributes={IDENTITY_KEY: identity}, overwrite=True)
        create_array(folder / "0", flat)
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror}); choose a folder you may write to."
        ) from error
    return store


def create_array(path: Path, shape: tuple[int, ...]) -> Any:
    """Create a zarr array of uint8 with a chunk for each block."""
    return zarr.create_array(
        path,
        shape=shape,
        chunks=(*(1,) * (len(shape) - 2), BLOCK, BLOCK),
        dtype=np.uint8,
        dimension_names=axes_of(shape),
    )


def axes_of(shape: tuple[int, ...]) -> str:
    """Return the letters of the axes: ``yx`` or ``zyx``."""
    return "zyx"[-len(shape) :]
