from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.benchmark import interactive
from napari_convlora.benchmark.interactive import Job
from napari_convlora.benchmark.records import Run, read_runs
from napari_convlora.cli import benchmark_interactive, parser

ONE = ["--rounds", "1", "--seeds", "0", "--max-steps", "2", "--device", "cpu", "--test-images", "1"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process would load the real backbone."""
    pytest.importorskip("matplotlib", reason="needs the extra [benchmark]")

    def runner(job: Job) -> Run:
        train = job.settings.train
        train = replace(train, detail_steps=min(20, train.detail_steps))
        job = replace(job, settings=replace(job.settings, train=train))
        return interactive.run_job(job, load=lambda name: random_backbone("tiny"))

    monkeypatch.setattr(interactive, "in_child", runner)


def main(arguments: list[str]) -> int:
    return parser.main(["benchmark", "interactive", *arguments])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_quick_run_leaves_tables_curves_and_a_file_to_resume_from(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "new" / "out"
    (data / "empty").mkdir()
    arguments = ["--data", str(data), "--out", str(out), "--quick", "--max-steps", "2"]
    arguments += ["--device", "cpu", "--systems"]
    assert main([*arguments, "conv_lora", "detail"]) == 0
    text = said(capsys)
    assert "Skipped: " in text
    assert "stripes finish conv_lora seed 0: mean IoU 0." in text
    keys = [run.key for run in read_runs(out / "results.json")[1]]
    assert len(keys) == 4
    assert "## Finish the annotated image" in (out / "results.md").read_text()
    assert (out / "curves.png").stat().st_size > 1000

    assert main([*arguments, "conv_lora", "detail", "forest"]) == 0
    assert "conv_lora" not in said(capsys).replace("results.md", "")
    assert [run.key for run in read_runs(out / "results.json")[1]][:4] == keys

    assert main(["--out", str(out), "--redraw"]) == 0
    assert main([*arguments, "forest", "--rounds", "3"]) == 1
    assert "rounds 2 against 3" in said(capsys)
    assert main([*arguments, "forest", "--no-keep-uncorrected"]) == 1
    assert "keep_uncorrected True against False" in said(capsys)


def test_a_failed_run_is_reported_and_the_rest_is_done(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "stripes" / "images" / "s2.png").write_bytes(b"no image")
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), *ONE, "--systems", "detail"]
    assert main(arguments) == 1
    text = said(capsys)
    assert "unseen detail seed 0: failed: 's2.png'" in text
    assert "finish detail seed 0: mean IoU" in text
    assert "Runs that failed" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--systems", "magic"], "Unknown system 'magic'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--test-images", "-1"], "--test-images must be at least 1"),
        (["--seeds", "-1"], "seed must not be negative"),
        (["--sets", "nowhere"], "No set in"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_runs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    assert main(["--data", str(data), "--out", str(tmp_path / "out"), *ONE, *extra]) == 1
    assert says in said(capsys)
    assert not (tmp_path / "out" / "results.json").exists()


def test_without_data_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NAPARI_CONVLORA_DATA", raising=False)
    assert main(["--out", str(tmp_path)]) == 1
    assert "--data" in said(capsys)


def test_a_missing_extra_is_named_before_hours_of_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        benchmark_interactive, "find_spec", lambda name: None if name == "monai" else object()
    )
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), *ONE]
    assert main([*arguments, "--systems", "unet"]) == 1
    assert 'pip install "napari-convlora[benchmark]"' in said(capsys)
    assert main([*arguments, "--systems", "detail", "--tasks", "finish"]) == 0


def test_results_hold_what_every_figure_needs(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), *ONE, "--systems", "decoder_only"]
    assert main([*arguments, "--tasks", "finish"]) == 0
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert run["key"] == {"set": "stripes", "task": "finish", "system": "decoder_only", "seed": 0}
    (own,) = run["rounds"]
    assert set(own["iou"]) == {"1", "2", "3"}
    assert len(own["confusion"]["s0"]) == 3
    assert own["previews"]
    assert own["strokes"] == 3
