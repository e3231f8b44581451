from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_convlora.backbones import REGISTRY, Backbone
from napari_convlora.backbones.sam import build_vit
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ModelConfig, TrainConfig
from napari_convlora.errors import AdapterError, InputError
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.iteration import Returning
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.prediction.predict import predict

QUICK = TrainConfig(max_steps=2, views=2, detail_steps=10, device="cpu")
LIMIT = 20_000_000


@pytest.fixture(scope="module")
def content(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return adapter.save(tmp_path_factory.mktemp("adapter") / "a.safetensors").read_bytes()


def probabilities(adapter: Adapter, backbone: Backbone) -> np.ndarray:
    image = np.random.default_rng(1).random((1, 70, 90, 1)).astype(np.float32)
    steps = Returning(predict(adapter, backbone, image, probabilities=True, device="cpu"))
    for _ in steps:
        pass
    assert steps.value is not None
    return steps.value.probabilities


def test_a_loaded_adapter_predicts_the_same(
    adapter: Adapter, backbone: Backbone, tmp_path: Path
) -> None:
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    assert loaded == replace(adapter, state=loaded.state)
    np.testing.assert_array_equal(probabilities(adapter, backbone), probabilities(loaded, backbone))


def saved_without_statistics(adapter: Adapter, path: Path) -> Path:
    """Write an adapter file as they were before they held how pixels were normalised."""
    adapter.save(path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["napari_convlora"])
    del header["backbone"]["pixel_mean"], header["backbone"]["pixel_std"]
    safetensors.torch.save_file(adapter.state, path, {"napari_convlora": json.dumps(header)})
    return path


def test_an_adapter_keeps_the_statistics_of_pixels_that_it_was_trained_with(
    adapter: Adapter, backbone: Backbone, tmp_path: Path
) -> None:
    spec = backbone.spec
    assert (adapter.pixel_mean, adapter.pixel_std) == (spec.pixel_mean, spec.pixel_std)
    expected = probabilities(adapter, backbone)
    today = backbone.normalised_by(REGISTRY["vit_b"].pixel_mean, REGISTRY["vit_b"].pixel_std)
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(probabilities(loaded, today), expected)
    of_today = replace(adapter, pixel_mean=today.spec.pixel_mean, pixel_std=today.spec.pixel_std)
    assert not np.array_equal(probabilities(of_today, backbone), expected), "it matters"


def test_an_old_adapter_of_a_medsam_file_predicts_as_it_did(
    adapter: Adapter, backbone: Backbone, tmp_path: Path
) -> None:
    """Then every ViT-B file was called `vit_b` and normalised as SAM is."""
    plain, sam = REGISTRY["medsam"], REGISTRY["vit_b"]
    then = backbone.normalised_by(sam.pixel_mean, sam.pixel_std)
    now = backbone.normalised_by(plain.pixel_mean, plain.pixel_std)
    then.checkpoint_sha256 = now.checkpoint_sha256 = "a" * 64
    then.spec, now.spec = replace(then.spec, name="vit_b"), replace(now.spec, name="medsam")
    old = replace(adapter, backbone_name="vit_b", backbone_sha256="a" * 64)
    expected = probabilities(replace(old, pixel_mean=None, pixel_std=None), then)
    loaded = Adapter.load(saved_without_statistics(old, tmp_path / "old.safetensors"))
    np.testing.assert_array_equal(probabilities(loaded, now), expected)


def test_features_of_pixels_normalised_otherwise_are_not_taken_for_each_other(
    adapter: Adapter, backbone: Backbone
) -> None:
    sam = REGISTRY["vit_b"]
    other = replace(adapter, pixel_mean=sam.pixel_mean, pixel_std=sam.pixel_std)
    pixels, cache = torch.rand(3, 64, 64), FeatureCache()
    for first in (adapter, other):
        model = first.build(backbone)
        torch.testing.assert_close(
            model.cached_prefix(pixels, cache), model.prefix(pixels[None])[0], rtol=0, atol=0
        )


def test_the_header_tells_what_a_person_wants_to_know(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        header = json.loads(file.metadata()["napari_convlora"])
    assert header["format"] == 1
    assert [c["name"] for c in header["classes"]] == [c.name for c in default_classes(3)]
    assert header["summary"]["steps"] == 4
    assert {"backbone", "model", "normalizer", "pixel_scale", "package"} <= set(header)


def test_another_backbone_is_refused(adapter: Adapter) -> None:
    with pytest.raises(AdapterError, match="trained on"):
        adapter.build(random_backbone("vit"))
    other = random_backbone()
    other.checkpoint_sha256 = "f" * 64
    with pytest.raises(AdapterError, match="ffffffffffff"):
        replace(adapter, backbone_sha256="e" * 64).build(other)


def test_a_newer_format_asks_for_an_update(
    adapter: Adapter, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "new.safetensors"
    safetensors.torch.save_file(adapter.state, path, {"napari_convlora": '{"format": 2}'})
    with pytest.raises(AdapterError, match="pip install --upgrade"):
        Adapter.load(path)


@pytest.mark.parametrize(
    "header", ["", "[]", "{}", '{"format": 1}', '{"format": "x"}', "[" * 100_000, "{" + " " * 2**20]
)
def test_a_damaged_header_is_one_sentence(header: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"napari_convlora": header})
    with pytest.raises(AdapterError, match="header"):
        Adapter.load(path)


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize(
    "junk",
    [None, "x", "9" * 5000, -1, 0, 1.5, 2**63, math.inf, math.nan, 300, 10**9, True, [], {}, [[]]],
    ids=lambda junk: repr(junk)[:12],
)
def test_a_header_that_lies_is_one_sentence_or_harmless(
    junk: object, adapter: Adapter, backbone: Backbone, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        text = file.metadata()["napari_convlora"]
    image = np.random.default_rng(1).random((1, 30, 40, 1))
    refusals, tried = [], []
    for place in places(json.loads(text)):
        header = inner = json.loads(text)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = junk
        safetensors.torch.save_file(adapter.state, path, {"napari_convlora": json.dumps(header)})
        try:
            loaded = replace(Adapter.load(path), state={}, summary={})
            if loaded not in tried:
                tried.append(loaded)
                list(predict(Adapter.load(path), backbone, image, device="cpu"))
        except (AdapterError, InputError) as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not [text for text in refusals if "\n" in text or len(text) > 400]


def test_experts_that_the_file_cannot_hold_are_refused(
    adapter: Adapter, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["napari_convlora"])
    header["model"]["method_config"] |= {"rank": 1024, "scales": [1] * 64}
    safetensors.torch.save_file(
        {"x": torch.zeros(9)}, path, {"napari_convlora": json.dumps(header)}
    )
    with pytest.raises(AdapterError, match="more than the file holds"):
        Adapter.load(path)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_values_that_are_no_numbers_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    name = next(iter(adapter.state))
    broken = torch.full_like(adapter.state[name], torch.nan)
    replace(adapter, state=adapter.state | {name: broken}).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="values that are no numbers"):
        Adapter.load(tmp_path / "a.safetensors")


def test_class_names_that_could_mislead_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    classes = tuple(replace(c, name=f"{c.name}\x1b[2J") for c in adapter.classes)
    replace(adapter, classes=classes).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="control characters"):
        Adapter.load(tmp_path / "a.safetensors")


def test_a_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    for name, dump in (("a.safetensors", pickle.dumps), ("b.pth", None)):
        path = tmp_path / name
        if dump is not None:
            path.write_bytes(dump(Evil(marker)))
        else:
            torch.save({"x": Evil(marker)}, path)
        with pytest.raises(AdapterError, match="not an adapter"):
            Adapter.load(path)
    assert not marker.exists()


def test_other_tensors_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="no napari-convlora adapter"):
        Adapter.load(tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="no adapter file"):
        Adapter.load(tmp_path / "absent.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_cut_or_altered_file_never_crashes(
    data: st.DataObject, content: bytes, backbone: Backbone, tmp_path: Path
) -> None:
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 3000))
    cut = data.draw(st.booleans())
    damaged = content[:at] if cut else content[:at] + b"\xff" + content[at + 1 :]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    refused = ""
    try:
        Adapter.load(path).build(backbone)
    except AdapterError as error:
        refused = str(error)
    assert "\n" not in refused
    assert refused or not cut, "a cut file was taken for a whole one"


def test_a_failed_save_keeps_the_old_file(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter.save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="disk is full"):
        replace(adapter, pixel_scale=2.0).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_bit_is_noticed(content: bytes, tmp_path: Path) -> None:
    """Also those of weights and class names, after which the file still looks like an adapter."""
    path = tmp_path / "a.safetensors"
    begin = content.index(b"background")  # a class name, and then the weights
    places = [begin, *np.random.default_rng(0).integers(0, len(content), 40)]
    accepted = []
    for place in map(int, places):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with suppress(AdapterError):
            accepted.append(Adapter.load(path).remark)
    assert all(accepted)  # without the name of the hash there is none to compare with
    assert len(accepted) < 3


def test_an_adapter_without_hash_loads_with_a_remark(
    adapter: Adapter, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(content)
    assert Adapter.load(path).remark == ""
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()["napari_convlora"]
    safetensors.torch.save_file(adapter.state, path, {"napari_convlora": header})
    loaded = Adapter.load(path)
    assert loaded.remark.startswith("old.safetensors holds no SHA-256")
    assert [record.getMessage() for record in caplog.records] == [loaded.remark]
    again = Adapter.load(loaded.save(path))
    assert again.remark == ""
    assert {n: t.tolist() for n, t in again.state.items()} == {
        n: t.tolist() for n, t in adapter.state.items()
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(30)
def test_a_pipe_is_no_adapter(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="is a pipe"):
        Adapter.load(tmp_path / "a.safetensors")


def size(model: SemanticSAM) -> int:
    return sum(t.numel() * t.element_size() for t in model.adapter_state().values())


def test_the_file_stays_small_for_vit_b() -> None:
    with torch.device("meta"):
        parts = build_vit("vit_b")
    # Only what is trained is counted, so the frozen encoder may stay without memory.
    parts.mask_decoder.to_empty(device="cpu")
    model = SemanticSAM(Backbone(REGISTRY["vit_b"], parts), ModelConfig(first_block=0), 12)
    trained = sum(p.numel() * 4 for p in model.trained().values())
    assert trained < LIMIT


def test_the_file_stays_small_for_litemedsam(litemedsam: Backbone) -> None:
    assert size(SemanticSAM(litemedsam, ModelConfig(first_block=0), 12)) < LIMIT
