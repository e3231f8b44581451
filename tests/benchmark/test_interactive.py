from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.benchmark import interactive
from napari_convlora.benchmark.interactive import Job, in_child, run_job, run_jobs
from napari_convlora.benchmark.records import (
    Key,
    RoundResult,
    Run,
    RunSettings,
    read_runs,
    write_runs,
)
from napari_convlora.config import TrainConfig
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.training import adapt

SETTINGS = RunSettings(
    train=TrainConfig(
        max_steps=4, views=4, detail_steps=60, preview_seconds=0.0, score_every=2, device="cpu"
    ),
    rounds=2,
    images=2,
    test_images=2,
    max_share=0.5,
)
tiny = partial(run_job, load=lambda name: random_backbone("tiny"))


def job(data: Path, task: str, system: str, seed: int = 0, **changes) -> Job:
    key = Key("stripes", task, system, seed)  # type: ignore[arg-type]
    return Job(key, data / "stripes", replace(SETTINGS, **changes))


def fake(job: Job) -> Run:
    own = RoundResult(
        1, 10, 0.1, 7.0 + job.key.seed, 1.0, 0.5, {"1": 0.5}, {"s0": [[1, 1], [1, 1]]}
    )
    return Run(job.key, ("a", "b"), (own, replace(own, learn_seconds=3.0)))


def test_systems_start_from_the_same_strokes_and_correct_their_own_mistakes(data: Path) -> None:
    runs = [tiny(job(data, "finish", system)) for system in ("conv_lora", "forest", "detail")]
    first = [run.rounds[0] for run in runs]
    assert len({(own.strokes, own.pixels) for own in first}) == 1
    assert first[0].strokes == 3
    for run in runs:
        assert run.classes == ("dark", "bright", "striped")
        assert len(run.rounds) == 2
        for own in run.rounds:
            assert own.mean_iou is not None
            assert 0 <= own.mean_iou <= 1
            # Void is never counted: 4 of the 48 rows.
            assert np.sum(own.confusion["s0"]) == 44 * 48
        assert run.rounds[1].strokes <= 3 + SETTINGS.corrections
        assert run.rounds[1].pixels >= run.rounds[0].pixels
        assert run.peak_bytes is None or run.peak_bytes > 1e7


def test_our_methods_tell_when_previews_came_and_how_good_they_were(data: Path) -> None:
    (first, _) = tiny(job(data, "finish", "decoder_only")).rounds
    seconds, stage, value = first.previews[0]
    assert stage == "detail"
    assert 0 < seconds < first.learn_seconds
    assert value is not None
    assert value > 0.3
    assert first.near_final_seconds is not None
    assert seconds <= first.near_final_seconds <= first.learn_seconds + first.predict_seconds + 0.02


def test_a_plain_method_does_without_what_we_add(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No detail branch shows first, and the encoder learns from the first step on."""
    asked = []
    monkeypatch.setattr(
        interactive, "adapt", lambda *given, **more: (asked.append(given), adapt(*given, **more))[1]
    )
    (first,) = tiny(job(data, "finish", "plain_lora", rounds=1)).rounds
    assert first.mean_iou is not None
    assert "detail" not in {stage for _, stage, _ in first.previews}
    ((_, _, _, model, train),) = asked
    assert (model.method, model.detail, model.plain_start) == ("lora", False, True)
    assert train.decoder_share == 0


def test_unseen_images_are_scored_whole_from_whole_images_or_from_strokes(data: Path) -> None:
    (whole,) = tiny(job(data, "unseen", "forest")).rounds
    assert whole.strokes == 0
    assert whole.pixels == 2 * 44 * 48
    assert set(whole.confusion) == {"s2", "s3"}
    assert whole.mean_iou is not None
    assert whole.mean_iou > 0.9
    few = tiny(job(data, "unseen", "forest", strokes=True)).rounds
    assert few[0].strokes == 2 * 3
    assert few[0].pixels < whole.pixels / 4
    assert few[1].strokes >= few[0].strokes


def test_another_seed_annotates_another_image(data: Path) -> None:
    names = [
        set(tiny(job(data, "finish", "forest", seed, rounds=1)).rounds[0].confusion)
        for seed in (0, 1, 2)
    ]
    assert names == [{"s0"}, {"s1"}, {"s0"}]


def test_a_run_in_a_child_is_the_run_itself(data: Path) -> None:
    own = job(data, "finish", "forest")
    ballast = np.ones(3 * 10**8, np.uint8)  # this process's memory is not the child's
    here, there = tiny(own), in_child(own)
    assert [r.confusion for r in there.rounds] == [r.confusion for r in here.rounds]
    if there.peak_bytes is not None:
        assert 5e7 < there.peak_bytes < here.peak_bytes - ballast.nbytes / 2


def test_what_goes_wrong_in_a_child_is_told_by_its_parent(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no folders images/"):
        in_child(replace(job(data, "finish", "forest"), folder=data))
    monkeypatch.setattr(interactive, "_send_run", _die)
    with pytest.raises(ConvLoRAError, match=r"killed \(exit code 9\)"):
        in_child(job(data, "finish", "forest"))


def _die(*_: object) -> None:
    os._exit(9)


def test_an_interrupted_benchmark_repeats_nothing_but_failures(tmp_path: Path) -> None:
    jobs = [
        Job(Key("a", "finish", system, seed), tmp_path, SETTINGS)
        for seed in (0, 1)
        for system in ("conv_lora", "forest", "unet")
    ]
    path, made, runs = tmp_path / "results.json", [], []

    def breaks_at(third: int, error: type[BaseException]):
        def runner(own: Job) -> Run:
            made.append(own.key)
            if len(made) == third:
                raise error("no")
            return fake(own)

        return runner

    def run_all(new: Iterator[Run]) -> None:
        for run in new:
            runs.append(run)
            write_runs(path, SETTINGS, runs)

    with pytest.raises(KeyboardInterrupt):
        run_all(run_jobs(jobs, [], breaks_at(3, KeyboardInterrupt)))
    stored = read_runs(path)[1]
    assert [run.key for run in stored] == [own.key for own in jobs[:2]]
    made.clear()
    run_all(run_jobs(jobs, stored, breaks_at(2, ValueError)))
    assert made == [own.key for own in jobs[2:]]
    stored = read_runs(path)[1]
    assert [run.key for run in stored if run.failed] == [jobs[3].key]
    made.clear()
    run_all(run_jobs(jobs, stored, breaks_at(0, ValueError)))
    assert made == [jobs[3].key]


def test_the_unet_gets_the_time_of_the_slowest_of_our_methods(tmp_path: Path) -> None:
    seen = {}

    def runner(own: Job) -> Run:
        seen[own.key.system, own.key.seed] = own.unet_seconds
        run = fake(own)
        slow = replace(run.rounds[1], learn_seconds=9.0)
        return replace(run, rounds=(run.rounds[0], slow)) if own.key.system == "lora" else run

    systems = ("forest", "unet", "conv_lora", "lora")
    jobs = [
        Job(Key("a", "finish", s, seed), tmp_path, SETTINGS) for seed in (0, 4) for s in systems
    ]
    list(run_jobs(jobs, [], runner))
    assert seen["unet", 0] == ()  # none of ours has run before it
    done = list(run_jobs([own for own in jobs if own.key.system != "unet"], [], runner))
    list(run_jobs(jobs, done, runner))
    assert seen["unet", 0] == (7.0, 9.0)
    assert seen["unet", 4] == (11.0, 9.0)


def test_a_failed_round_is_a_record_with_its_sentence(data: Path) -> None:
    (run,) = run_jobs([job(data, "finish", "no_such_method")], [], tiny)
    assert run.failed is not None
    assert "no_such_method" in run.failed
