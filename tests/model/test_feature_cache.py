from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from napari_convlora.model import feature_cache
from napari_convlora.model.feature_cache import FeatureCache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user's caches are."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def precious(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked for in vain is taken to have cost a lot."""
    monkeypatch.setattr(feature_cache, "_WORTH", 0)


def fill(cache: FeatureCache, *names: str, size: int = 10) -> None:
    for value, name in enumerate(names):
        assert cache.get(name) is None
        cache.put(name, torch.full((size,), float(value)))


def test_cache_returns_what_was_put() -> None:
    cache = FeatureCache()
    features = torch.randn(3, 4)
    cache.put("a", features)
    assert torch.equal(cache.get("a"), features)
    assert cache.get("b") is None
    assert len(cache) == 1
    assert cache.nbytes == 48


def test_cache_drops_the_least_recently_used_within_its_bound() -> None:
    cache = FeatureCache(max_bytes=3 * 40)
    for key in "abc":
        cache.put(key, torch.zeros(10))
    cache.get("a")
    cache.put("d", torch.zeros(10))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("a", torch.zeros(20))
    assert cache.nbytes <= 120


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=30))
def test_cache_never_exceeds_its_bound(sizes: list[tuple[int, int]]) -> None:
    cache = FeatureCache(max_bytes=100)
    for key, size in sizes:
        cache.put(key, torch.zeros(size))
        held = [entry for k in range(6) if (entry := cache.get(k)) is not None]
        assert cache.nbytes == sum(entry.nbytes for entry in held) <= 100


def test_an_entry_that_cannot_fit_drives_nothing_out() -> None:
    cache = FeatureCache(max_bytes=100)
    cache.put("a", torch.zeros(10))
    cache.put("huge", torch.zeros(1000))
    assert cache.get("huge") is None
    assert cache.get("a") is not None


def test_cached_features_do_not_follow_later_changes_of_grad() -> None:
    cache = FeatureCache()
    cache.put("a", torch.ones(2, requires_grad=True) * 2)
    assert not cache.get("a").requires_grad


def test_a_view_does_not_keep_all_that_it_is_a_part_of() -> None:
    cache, batch = FeatureCache(), torch.rand(100, 8)
    cache.put("a", batch[3])
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found, batch[3])
    assert found.untyped_storage().nbytes() == cache.nbytes == 32


def test_what_no_longer_fits_in_memory_is_read_from_disk(precious: None) -> None:
    cache = FeatureCache(max_bytes=80, max_disk_bytes=1000)
    fill(cache, "a", "b", "c", "d")
    assert (len(cache), cache.nbytes, cache.disk_bytes) == (2, 80, 80)
    for value, name in enumerate("abcd"):
        found = cache.get(name)
        assert found is not None
        assert torch.equal(found, torch.full((10,), float(value)))
    assert cache.nbytes == 80
    assert cache.disk_bytes == 160, "what was read stays there; it need not be written again"


@pytest.mark.parametrize(
    "features",
    [
        torch.rand(4, 6, 5).permute(2, 0, 1),
        torch.rand(1, 3, 4, 5).contiguous(memory_format=torch.channels_last)[0],
        torch.rand(3, 4).bfloat16(),
        torch.rand(8, 8)[::2, 1:4],
        torch.tensor(3.5),
        torch.empty(0, 4),
    ],
)
def test_what_was_on_disk_has_the_same_bits_in_the_same_order(
    precious: None, features: torch.Tensor
) -> None:
    cache = FeatureCache(max_disk_bytes=10_000)
    cache.get("a")
    cache.put("a", features)
    before = cache.get("a")
    assert before is not None
    cache.shrink()
    assert len(cache) == 0 or not features.numel()
    after = cache.get("a")
    assert after is not None
    assert (after.dtype, after.shape, after.stride()) == (
        before.dtype,
        before.shape,
        before.stride(),
    )
    assert torch.equal(after, features)


def test_only_what_takes_longer_to_compute_than_to_read_goes_to_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(feature_cache.time, "perf_counter", lambda: now[0])
    cache = FeatureCache(max_bytes=4_000_000, max_disk_bytes=10**9)
    for name, seconds in (("cheap", 0.01), ("dear", 1.0), ("unasked", 0.0), ("last", 0.0)):
        if seconds:
            cache.get(name)
            now[0] += seconds
        cache.put(name, torch.zeros(1_000_000))
    assert cache.get("cheap") is None
    assert cache.get("unasked") is None
    assert cache.get("dear") is not None


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30), st.booleans()), max_size=60))
@example(asked=[(2, 0, False), (0, 1, False), (1, 25, False), (2, 0, False)])
def test_the_disk_is_bounded_and_never_gives_what_was_not_put(
    precious: None, asked: list[tuple[int, int, bool]]
) -> None:
    """Entries come, go and change their sizes while the ring goes round and round."""
    cache = FeatureCache(max_bytes=100, max_disk_bytes=400)
    known: dict[int, torch.Tensor] = {}
    for number, (key, size, again) in enumerate(asked):
        found = cache.get(key)
        if found is not None:
            assert torch.equal(found, known[key])
        if found is None or again:
            known[key] = torch.full((size,), float(number))
            cache.put(key, known[key])
        assert cache.nbytes <= 100
        assert cache.disk_bytes <= 400
    cache.clear()
    assert (len(cache), cache.nbytes, cache.disk_bytes) == (0, 0, 0)
    assert all(cache.get(key) is None for key in known)


def test_dropping_and_replacing_reaches_the_disk(precious: None) -> None:
    cache = FeatureCache(max_disk_bytes=1000)
    fill(cache, "a", "b")
    cache.shrink()
    cache.drop("a")
    cache.put("b", torch.ones(3))
    cache.shrink()
    assert cache.get("a") is None
    assert cache.get("b") is None, "never what was there before"


def test_a_full_disk_or_no_folder_costs_what_would_have_been_there_and_nothing_else(
    precious: None, folder: Path
) -> None:
    folder.write_text("a file, no folder")
    cache = FeatureCache(max_bytes=40, max_disk_bytes=1000)
    fill(cache, "a", "b")
    assert cache.get("a") is None
    assert cache.get("b") is not None
    assert cache.disk_bytes == 0


def test_no_more_than_a_quarter_of_the_free_disk_is_taken(
    precious: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 400

    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: Usage)
    cache = FeatureCache(max_bytes=40, max_disk_bytes=10**9)
    fill(cache, *"abcdef")
    assert cache.disk_bytes == 80


SCRIPT = """
    import os, signal, sys
    import platformdirs
    platformdirs.user_cache_dir = lambda *_: sys.argv[1]
    import torch
    from napari_convlora.model import feature_cache
    feature_cache._WORTH = 0
    cache = feature_cache.FeatureCache(max_bytes=4_000, max_disk_bytes=10**8)
    for name in range(3):
        cache.get(name)
        cache.put(name, torch.zeros(1_000))
    assert cache.disk_bytes == 8_000, cache.disk_bytes
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_process_that_is_killed_leaves_nothing_on_the_disk(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)])
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(folder) == []
