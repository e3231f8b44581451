"""The paper's protocol on tiny backbones: what it reads, learns, selects, scores and writes."""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from napari_convlora import predict
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.benchmark import paper
from napari_convlora.benchmark.paper_data import Pairs, SegmentationTask, find_task, read_split
from napari_convlora.cli import benchmark_paper
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.formats.opening import read_image
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.iteration import Returning
from napari_convlora.training.losses import VOID

SIZE = 64


def write_set(folder: Path, n_classes: int = 2, sizes: dict[str, int] | None = None) -> Path:
    """Bright discs on a dark ground, one brightness per class; masks are 0 and 255."""
    (folder / "files").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (sizes or {"train": 5, "val": 2, "test": 3}).items():
        rows = []
        for i in range(count):
            truth = np.zeros((70, 90), np.uint8)
            y, x = np.mgrid[:70, :90]
            for c in range(1, n_classes):
                row, column = rng.uniform(25, 45), 90 * (c - 0.5) / (n_classes - 1)
                truth[(y - row) ** 2 + (x - column) ** 2 < (40 - 5 * n_classes) ** 2] = c
            image = 30 + 200 * truth / (n_classes - 1) + rng.normal(0, 4, truth.shape)
            name = f"files/{split}{i}"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("RGB").save(
                folder / f"{name}.png"
            )
            label = truth * 255 if n_classes == 2 else truth
            Image.fromarray(label).save(folder / f"{name}_label.png")
            rows.append([f"{name}.png", f"{name}_label.png"])
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "label"], *rows])
    return folder


def options(data: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark_paper.add_paper_arguments(parser)
    quick = ["--size", str(SIZE), "--lr", "1e-2", "--device", "cpu", "--epochs", "2"]
    return parser.parse_args(["--data", str(data), "--out", str(out), *quick, *more])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command find a random backbone under any name."""
    monkeypatch.setattr(
        "napari_convlora.backbones.load_backbone", lambda name: random_backbone("tiny")
    )


def run(data: Path, out: Path, *more: str) -> dict:
    assert benchmark_paper.run_paper(options(data, out, *more)) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["conv_lora", "decoder_only"])
def test_masks_are_learnt_scored_and_written(tmp_path: Path, method: str) -> None:
    data, out = write_set(tmp_path / "set"), tmp_path / "out"
    flags = ["--method", method, "--metric", "iou", "--epochs", "12", "--seeds", "1", "2"]
    results = run(data, out, *flags)
    assert results["model"]["head"] == "mask_token"
    assert results["model"]["method_config"]["faithful"]
    for seed in ("1", "2"):
        history = results["seeds"][seed]["history"]
        assert history[-1]["loss"] < 0.7 * history[0]["loss"]
        best = max(history, key=lambda epoch: epoch["score"])
        assert (best["score"], best["number"]) == (history[-1]["best"], history[-1]["best_epoch"])
    for size in ("square", "native"):
        runs = [results["seeds"][seed]["test"][size] for seed in ("1", "2")]
        assert set(runs[0]) == {*paper.BINARY_METRICS, "dataset_iou"}
        assert all(0 <= value <= 1 for scores in runs for value in scores.values())
        assert min(scores["iou"] for scores in runs) > 0.5
        own, summary = [scores["dice"] for scores in runs], results["summary"][size]["dice"]
        assert summary["mean"] == pytest.approx(np.mean(own))
        assert summary["standard_error"] == pytest.approx(abs(own[0] - own[1]) / 2)
        with (out / "seed2.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["size"] == size]
        assert [Path(row["image"]).name for row in rows] == [f"test{i}.png" for i in range(3)]
        assert np.mean([float(row["iou"]) for row in rows]) == pytest.approx(runs[1]["iou"])
    # The adapter file predicts what the protocol scored, up to the aspect of the images.
    image = read_image(data / "files" / "test0.png")
    steps = Returning(
        predict(Adapter.load(out / "seed1.safetensors"), random_backbone("tiny"), image)
    )
    list(steps)
    truth = np.asarray(Image.open(data / "files" / "test0_label.png")) > 0
    found = steps.value.labels[0] == 2
    assert (found & truth).sum() / (found | truth).sum() > 0.4


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("head", "lr"), [("classification_branch", "3e-3"), ("class_tokens", "1e-2")]
)
def test_class_ids_are_learnt_with_background_in_the_mean(
    tmp_path: Path, head: str, lr: str
) -> None:
    data = write_set(tmp_path / "set", n_classes=3)
    flags = ["--head", head, "--lr", lr, "--method", "decoder_only", "--epochs", "25"]
    results = run(data, tmp_path / "out", *flags, "--no-native")
    assert results["model"]["plain_start"] == (head != "class_tokens")
    history = results["seeds"]["1"]["history"]
    assert history[-1]["loss"] < 0.98 * history[0]["loss"]
    assert list(results["summary"]) == ["square"]
    assert set(results["summary"]["square"]) == {"miou", "pixel_accuracy"}
    # The paper's queries start equal, and a few steps on random weights hardly part them.
    if head == "class_tokens":
        assert results["summary"]["square"]["miou"]["mean"] > 0.3
    assert results["summary"]["square"]["miou"]["standard_error"] is None
    assert len(Adapter.load(tmp_path / "out" / "seed1.safetensors").classes) == 3


@pytest.mark.usefixtures("tiny")
def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    runs = [
        run(data, tmp_path / str(i), "--seeds", seed, "--no-native")["seeds"][seed]
        for i, seed in enumerate(("3", "3", "4"))
    ]
    assert runs[0]["history"] == runs[1]["history"]
    assert runs[0]["test"] == runs[1]["test"]
    assert runs[0]["history"] != runs[2]["history"]


@pytest.mark.usefixtures("tiny")
def test_switches_reach_the_training(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    losses = {
        flags: run(data, tmp_path / "-".join(flags), *flags)["seeds"]["1"]["history"][0]["loss"]
        for flags in ((), ("--fixed-structure-loss",), ("--metric", "ber"))
    }
    assert len(set(losses.values())) == 3
    flags = ["--fixed-gate", "--max-images", "1", "--workers", "1"]
    results = run(data, tmp_path / "gate", *flags)
    assert not results["model"]["method_config"]["faithful"]
    assert results["images"] == {"train": 1, "val": 1, "test": 1}


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_leaves_its_finished_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, train = write_set(tmp_path / "set"), paper.train

    def interrupted(backbone, model_config, data, config, seed, device):
        if seed == 2:
            raise KeyboardInterrupt
        return train(backbone, model_config, data, config, seed, device)

    monkeypatch.setattr(paper, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark_paper.run_paper(options(data, tmp_path / "out", "--seeds", "1", "2"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["seeds"]) == ["1"]
    assert results["summary"]["native"]["iou"]["standard_error"] is None


def quick_data(folder: Path) -> paper.PaperData:
    splits = {name: read_split(folder, name) for name in ("train", "val", "test")}
    task, counts = find_task(splits["train"], None, None)
    return paper.PaperData(**splits, task=task, counts=counts)


def test_the_learning_rate_falls_linearly_and_patience_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = quick_data(write_set(tmp_path / "set"))
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a),
    )
    wanted = iter([0.5, 0.7, 0.6, 0.7, 0.1, 0.9])
    monkeypatch.setattr(
        paper,
        "evaluate_pairs",
        lambda *a: paper.Evaluated({"s_measure": next(wanted)}, []),
    )
    config = paper.PaperConfig(size=SIZE, epochs=8, patience=3, lr=1e-3)
    model_config = paper.ModelConfig(method="lora", first_block=0, head="mask_token", detail=False)
    epochs = Returning(
        paper.train(random_backbone("tiny"), model_config, data, config, 0, torch.device("cpu"))
    )
    assert [epoch.best_epoch for epoch in epochs] == [1, 2, 2, 2, 2]
    # Five images in batches of four make two steps an epoch, sixteen in all.
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(10) / 16))
    assert epochs.value.history[-1].best == 0.7


def test_biases_and_norms_are_not_decayed() -> None:
    model = paper.SemanticSAM(
        random_backbone("tiny"), paper.ModelConfig(head="mask_token", detail=False), 2
    )
    decayed, free = (group["params"] for group in paper._groups(model))
    assert {p.ndim for p in decayed} >= {2, 4}
    names = {id(p): name for name, p in model.trained().items()}
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed)
    assert len(decayed) + len(free) == len(names)


class FixedModel(torch.nn.Module):
    """Answers with given logits, whatever it sees."""

    def __init__(self, logits: list[torch.Tensor]) -> None:
        super().__init__()
        self.logits = iter(logits)

    def cached_prefix(self, pixels: torch.Tensor, cache: None) -> torch.Tensor:
        return pixels

    def suffix(self, features: torch.Tensor) -> paper.HeadOutput:
        return paper.HeadOutput(next(self.logits)[None])


def label_file(folder: Path, name: str, labels: np.ndarray) -> paper.Pair:
    Image.fromarray(labels.astype(np.uint8)).save(folder / name)
    return paper.Pair(folder / name, folder / name)


def test_scores_by_hand(tmp_path: Path) -> None:
    half, empty = np.zeros((32, 32)), np.zeros((32, 32))
    half[:, :16] = 255
    pairs = [label_file(tmp_path, "half.png", half), label_file(tmp_path, "empty.png", empty)]
    quarter = torch.full((32, 32), -9.0)
    quarter[:16, :16] = 9
    logits = [torch.stack([torch.zeros(32, 32), m]) for m in (quarter, torch.full((32, 32), -9.0))]
    config = paper.PaperConfig(size=32)
    found = paper.evaluate_pairs(
        FixedModel(logits), pairs, SegmentationTask(2, binary=True), config
    )
    first, second = found.images
    assert (first["iou"], first["dice"], first["ber"]) == pytest.approx((0.5, 2 / 3, 0.25))
    assert first["mae"] == pytest.approx(0.25, abs=1e-3)
    assert (second["iou"], second["dice"], second["ber"]) == (1, 1, 0)
    assert found.summary["iou"] == pytest.approx(0.75)
    assert found.summary["dataset_iou"] == pytest.approx(0.5)


def test_class_scores_come_from_summed_pixels_without_the_ignored_ones(tmp_path: Path) -> None:
    labels = np.zeros((32, 32))
    labels[:, :8], labels[:, 24:] = 1, 9
    pairs = [label_file(tmp_path, "a.png", labels)]
    model = FixedModel([torch.stack([torch.zeros(32, 32), torch.full((32, 32), -1.0)])])
    task = SegmentationTask(2, binary=False, ignore=9)
    found = paper.evaluate_pairs(model, pairs, task, paper.PaperConfig(size=32))
    assert found.summary["miou"] == pytest.approx((2 / 3 + 0) / 2)
    assert found.summary["pixel_accuracy"] == pytest.approx(2 / 3)


def test_native_scores_use_the_labels_own_pixels(tmp_path: Path) -> None:
    stripe = np.zeros((64, 48))
    stripe[::2] = 255  # nearest neighbour at half the size sees one parity only
    pair = label_file(tmp_path, "stripe.png", stripe)
    model = FixedModel([torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])])
    found = paper.evaluate_pairs(
        model, [pair], SegmentationTask(2, True), paper.PaperConfig(size=32), native=True
    )
    assert found.summary["iou"] == pytest.approx(0.5)


def test_images_are_squeezed_into_a_square_with_labels_that_stay_ids(tmp_path: Path) -> None:
    pairs = read_split(write_set(tmp_path / "set", n_classes=4), "train", 2)
    task, counts = find_task(pairs, None, None)
    assert (task, len(counts)) == (SegmentationTask(4, binary=False), 4)
    assert counts.sum() == 2 * 70 * 90
    pixels, target = Pairs(pairs, task, 32)[1]
    assert pixels.shape == (3, 32, 32)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert set(target.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("suffix", "high"),  # a JPEG cannot tell 0 from 1
    [(".png", 1), (".png", 38), (".png", 255), (".jpg", 38), (".jpg", 255)],
)
def test_masks_of_any_brightness_and_jpegs_are_read(tmp_path: Path, high: int, suffix: str) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[8:24, 16:32] = high
    Image.fromarray(mask).save(tmp_path / f"m{suffix}", quality=90)
    pair = paper.Pair(tmp_path / f"m{suffix}", tmp_path / f"m{suffix}")
    task, _ = find_task([pair], None, None)
    np.testing.assert_array_equal(task.read(pair.label), mask > 0)
    faint = label_file(tmp_path, "empty.png", np.eye(9) * 3)
    assert not task.read(faint.label).any()


def test_ignored_ids_are_void_and_unknown_ones_are_named(tmp_path: Path) -> None:
    pair = label_file(tmp_path, "a.png", np.array([[0, 1], [2, 255]]))
    with pytest.raises(InputError, match="--ignore 255"):
        find_task([pair], None, None)
    task, _ = find_task([pair], None, 255)
    assert task.read(pair.label).tolist() == [[0, 1], [2, VOID]]
    with pytest.raises(InputError, match="class 7"):
        task.read(label_file(tmp_path, "b.png", np.array([[0, 7]])).label)
    two, _ = find_task([label_file(tmp_path, "c.png", np.array([[0, 1, 255]]))], None, 255)
    assert two == SegmentationTask(2, binary=False, ignore=255)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "cannot be read; write a csv"),
        ("image,label\n", "lists no images"),
        ("picture,label\na.png,b.png\n", "columns image and label"),
        ("image,label\na.png,b.png\n", "a.png, which is no file"),
    ],
)
def test_tables_that_cannot_be_used_are_explained(
    tmp_path: Path, table: str | None, message: str
) -> None:
    if table is not None:
        (tmp_path / "train.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        read_split(tmp_path, "train")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "magic"], "Unknown method 'magic'"),
        (["--metric", "miou"], "does not fit these labels"),
        (["--task", "binary", "--ignore", "3"], "drop --ignore"),
    ],
)
def test_settings_that_do_not_fit_are_explained(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ConvLoRAError, match=message):
        benchmark_paper.run_paper(options(write_set(tmp_path / "set"), tmp_path / "out", *flags))


def test_mean_and_standard_error() -> None:
    summary = paper.mean_and_error([{"iou": 0.2}, {"iou": 0.4}, {"iou": 0.6}])
    assert summary["iou"]["mean"] == pytest.approx(0.4)
    assert summary["iou"]["standard_error"] == pytest.approx(0.2 / math.sqrt(3))


def test_declaring_the_command_does_not_wait_for_torch() -> None:
    code = "import sys, napari_convlora.cli.benchmark_paper; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
