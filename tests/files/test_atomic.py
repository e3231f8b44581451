"""A file is never left half-written, and never replaces what it is made from."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from napari_convlora.errors import InputError
from napari_convlora.files.atomic import (
    atomic_write,
    check_apart,
    check_no_device,
    check_space,
    check_writable,
    rescued,
)


def assert_one_sentence(error: pytest.ExceptionInfo[InputError]) -> None:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text.removesuffix(".")


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), MemoryError()])
def test_failed_write_keeps_old_file_and_leaves_nothing_behind(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "work.bin"
    path.write_bytes(b"old work")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old work"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["body", "fsync", "replace"])
def test_full_disk_keeps_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "work.bin"
    path.write_bytes(b"old work")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place != "body":
        monkeypatch.setattr(os, place, full)

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            if place == "body":
                full()

    with pytest.raises(InputError, match="disk is full; free some space") as error:
        write()
    assert_one_sentence(error)
    assert path.read_bytes() == b"old work"
    assert list(tmp_path.iterdir()) == [path]


def test_write_replaces_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "work.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/inside.bin", "is a file"),
        ("absent/inside.bin", "create the folder"),
        ("", "a folder has that name"),
        ("x" * 300, "too long"),
    ],
)
def test_unwritable_places_are_explained(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=message) as error, atomic_write(tmp_path / name):
        pass
    assert_one_sentence(error)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")
def test_write_keeps_permissions_and_follows_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640
    with atomic_write(tmp_path / "fresh") as file:
        file.write(b"1")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "fresh").stat().st_mode == plain.stat().st_mode


def test_longest_possible_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".tif")
    with atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_a_result_may_not_replace_its_source_by_any_name(tmp_path: Path) -> None:
    source, link = tmp_path / "a.tif", tmp_path / "link.tif"
    source.touch()
    link.symlink_to(source)
    check_apart([tmp_path / "b.tif"], [source])
    for result in (source, link, tmp_path / "x" / ".." / "a.tif"):
        with pytest.raises(InputError, match="is read here"):
            check_apart([result], [source])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_neither_waited_for_nor_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    pipe, link, server = Path("pipe"), Path("link"), Path("socket")
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(server))
        places = {pipe: "pipe", link: "pipe", server: "socket", Path(os.devnull): "device"}
        for path, what in places.items():
            for use in (check_no_device, check_writable, lambda p: atomic_write(p).__enter__()):
                with pytest.raises(InputError, match=f"is a {what}") as error:
                    use(path)
                assert_one_sentence(error)
    assert pipe.is_fifo()
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        check_no_device(path)


def test_too_little_space_names_folder_and_need(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet" / "a.safetensors", 1)
    with pytest.raises(
        InputError, match=r"has [\d.]+ MB free, but about 1000000000000.0 MB"
    ) as error:
        check_space(tmp_path / "not" / "yet" / "a.safetensors", 10**18)
    assert f"'{tmp_path}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_result_that_does_not_fit_goes_where_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, temporary = tmp_path / "user", tmp_path / "temporary"
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(user))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    refuse: list[Path] = []

    def write(path: Path) -> None:
        if any(path.is_relative_to(folder) for folder in refuse):
            raise InputError("The disk is full.")
        path.write_bytes(b"work of an hour")

    for folder in (user, temporary):
        error = rescued(InputError("There is no room."), Path("a.safetensors"), write)
        (place,) = folder.rglob("a-*.safetensors")
        assert place.read_bytes() == b"work of an hour"
        assert str(error) == f"There is no room; what was learnt is in {place} instead."
        refuse.append(folder)
    error = rescued(InputError("There is no room."), Path("a.safetensors"), write)
    assert str(error) == "There is no room."
