from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from napari_convlora.benchmark.records import (
    Key,
    RoundResult,
    Run,
    RunSettings,
    check_same,
    read_runs,
    write_runs,
)
from napari_convlora.benchmark.report import markdown, write_report
from napari_convlora.config import TrainConfig
from napari_convlora.errors import InputError

SETTINGS = RunSettings()


def made(set_: str, system: str, seed: int, wrong: float, task: str = "unseen") -> Run:
    """A run of two rounds on four images of two classes, `wrong` of whose pixels are wrong."""
    rng = np.random.default_rng(seed)
    rounds = []
    for number in range(2):
        confusion = {}
        for image in range(4):
            errors = int(1000 * wrong * rng.uniform(0.9, 1.1) / (1 + number))
            confusion[f"i{image}"] = [[1000 - errors, errors], [errors, 1000 - errors]]
        hits, errors = np.sum([m[0] for m in confusion.values()], 0)
        iou = float(hits / (hits + 2 * errors))
        share = 0.01 * (number + 1)
        rounds.append(
            RoundResult(
                3, 100, share, 10.0 + number, 1.0, iou, {"1": iou, "2": iou}, confusion,
                [(2.0, "detail", iou)], 2.0,
            )
        )  # fmt: skip
    return Run(
        Key(set_, task, system, seed),  # type: ignore[arg-type]
        ("back|ground", "nucleus"),
        tuple(rounds),
        1.0,
        2 * 10**9,
        {"torch": "9.9"},
    )


RUNS = [
    made(set_, system, seed, wrong)
    for set_, rates in (("cells", (0.1, 0.2, 0.1)), ("grains", (0.2, 0.1, 0.2)))
    for system, wrong in zip(("conv_lora", "forest", "lora"), rates, strict=True)
    for seed in (0, 1)
]


def row(text: str, title: str, name: str) -> list[str]:
    """Cells of the first row called `name` after the line that contains `title`."""
    after = text[text.index(title) :].splitlines()
    line = next(line for line in after if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_wins_and_losses_are_marked_alike() -> None:
    text = markdown(SETTINGS.as_dict(), RUNS)
    title = "`conv_lora` minus"
    _, lora, forest = row(text, title, "cells")
    assert forest.startswith("+")
    assert forest.endswith("**win**")
    assert lora.endswith("*open*")  # the same matrices
    _, _, forest = row(text, title, "grains")
    assert forest.startswith("-")
    assert forest.endswith("**loss**")
    assert row(text, title, "won / lost / open")[2] == "1 / 1 / 0"
    assert row(text, title, "**mean**")[2].endswith("*open*")


def test_few_images_decide_nothing_and_many_sets_do() -> None:
    def small(set_: str, system: str, wrong: float) -> Run:
        run = made(set_, system, 0, wrong)
        return replace(
            run,
            rounds=[
                replace(own, confusion={k: own.confusion[k] for k in ("i0", "i1")})
                for own in run.rounds
            ],
        )

    runs = [
        small(f"set{i}", system, wrong)
        for i in range(6)
        for system, wrong in (("conv_lora", 0.1), ("forest", 0.2))
    ]
    text = markdown(SETTINGS.as_dict(), runs)
    _, forest = row(text, "`conv_lora` minus", "set0")
    assert forest.startswith("+")
    assert forest.endswith("*open*")
    assert row(text, "`conv_lora` minus", "**mean**")[1].endswith("**win**")


def test_the_best_is_bold_and_every_figure_is_there() -> None:
    text = markdown(SETTINGS.as_dict(), RUNS)
    points = 100 * np.mean([run.rounds[-1].mean_iou for run in RUNS[:2]])
    title = "Mean IoU after the last round"
    cells = row(text, title, "cells")
    assert cells[1].startswith(f"**{points:.1f}** ±")
    assert cells[2] == cells[1]  # lora ties
    assert not cells[3].startswith("**")
    assert row(text, title, "**mean of 2**")
    assert row(text, "Round by round", "mean of 2")[2].endswith("(1.0 %)")
    assert row(text, "What it costs", "forest")[1:] == ["10.5", "2.0", "2.0", "1.0", "2.00"]
    assert row(text, "IoU by class", "grains")[1] == "back/ground"
    assert "torch 9.9" in text


def test_means_use_only_sets_and_seeds_that_all_systems_finished() -> None:
    failed = Run(Key("grains", "unseen", "lora", 1), failed="It is too dark.")
    text = markdown(SETTINGS.as_dict(), [*RUNS[:-1], failed])
    assert "mean of" not in text.split("`conv_lora` minus")[0]
    assert row(text, "Runs that failed", "grains")[-1] == "It is too dark."


def test_one_image_gives_no_interval() -> None:
    def one(system: str, wrong: float) -> Run:
        run = made("cells", system, 0, wrong, "finish")
        rounds = [replace(own, confusion={"i0": own.confusion["i0"]}) for own in run.rounds]
        return replace(run, rounds=rounds)

    text = markdown(SETTINGS.as_dict(), [one("conv_lora", 0.1), one("forest", 0.2)])
    (_, forest) = row(text, "`conv_lora` minus", "cells")
    assert "[" not in forest
    assert float(forest) > 0


def test_tables_and_curves_are_redrawn_from_the_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [benchmark]")
    write_runs(tmp_path / "results.json", SETTINGS, RUNS)
    write_report(tmp_path)
    first = (tmp_path / "results.md").read_text()
    assert first == markdown(SETTINGS.as_dict(), RUNS)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    (tmp_path / "results.md").unlink()
    write_report(tmp_path)
    assert (tmp_path / "results.md").read_text() == first


def test_redrawing_does_not_wait_for_torch() -> None:
    code = "import napari_convlora.benchmark.report, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runs_survive_the_file_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_runs(path, SETTINGS, RUNS)
    stored, runs = read_runs(path)
    assert stored == SETTINGS.as_dict()
    assert markdown(stored, runs) == markdown(SETTINGS.as_dict(), RUNS)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="not a result"):
        read_runs(path)
    with pytest.raises(InputError, match="does not exist"):
        read_runs(tmp_path / "absent.json")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    check_same(SETTINGS, SETTINGS.as_dict(), tmp_path)
    other = replace(SETTINGS, images=2, train=TrainConfig(max_steps=7, preview_seconds=10.0))
    with pytest.raises(InputError, match=r"images 2 against 3, max_steps 7 against \d+") as error:
        check_same(SETTINGS, other.as_dict(), tmp_path)
    assert "train" not in str(error.value).split("(")[1].split(")")[0]
