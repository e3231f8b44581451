"""Tables, intervals and curves, from the records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.benchmark.bootstrap import bootstrap_differences, bootstrap_mean
from napari_convlora.benchmark.records import BASELINES, RoundResult, Run, read_runs
from napari_convlora.evaluation.metrics import mean_ious
from napari_convlora.files.atomic import atomic_write
from napari_convlora.labels.classes import DEFAULT_COLOURS

REFERENCE = "conv_lora"
"""The system that the others are compared with."""

_LEVELS = (2.5, 97.5)
_FEWEST = 6
"""Images or sets that can decide: below, even a unanimous sign test stays above 5 per cent."""

_TASKS = {
    "finish": "Finish the annotated image",
    "unseen": "Segment unseen images of the same kind",
}


Results = dict[str, dict[str, list[Run]]]
"""By set, then by system, then by seed."""

Curve = list[tuple[float, float, float]]
"""By round: seconds since the first strokes, annotated per cent, mean IoU in points."""


def write_report(folder: Path) -> None:
    """Write ``results.md`` and ``curves.png`` from ``results.json``, all in `folder`.

    Raises
    ------
    InputError
        ``results.json`` is absent or damaged.
    """
    settings, runs = read_runs(folder / "results.json")
    with atomic_write(folder / "results.md") as file:
        file.write(markdown(settings, runs).encode())
    with atomic_write(folder / "curves.png") as file:
        figure(runs).savefig(file, format="png", dpi=110)


def markdown(settings: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Render all tables."""
    parts = ["# Few strokes: Conv-LoRA and its peers", _made_with(settings, runs)]
    for task, title in _TASKS.items():
        results = _by_set([run for run in runs if run.key.task == task and run.failed is None])
        if results:
            parts += [f"## {title} (`{task}`)", *_task(results)]
    failed = [run for run in runs if run.failed is not None]
    if failed:
        rows = [[*map(str, astuple(run.key)), str(run.failed)] for run in failed]
        parts += ["## Runs that failed", _table(["set", "task", "system", "seed", "why"], rows)]
    return "\n\n".join(parts) + "\n"


def _by_set(runs: Sequence[Run]) -> Results:
    systems = sorted({run.key.system for run in runs}, key=_order)
    results: Results = {name: {} for name in sorted({run.key.set for run in runs})}
    for system in systems:
        for run in sorted(runs, key=lambda run: run.key.seed):
            if run.key.system == system:
                results[run.key.set].setdefault(system, []).append(run)
    return results


def _order(system: str) -> tuple[bool, bool, str]:
    return system != REFERENCE, system in BASELINES, system


def _systems(results: Results) -> list[str]:
    return sorted({system for own in results.values() for system in own}, key=_order)


def _complete(results: Results) -> Results:
    """Keep the sets on which every system has run, from the same seeds: those a mean may use."""
    systems = _systems(results)
    return {
        name: own
        for name, own in results.items()
        if len(own) == len(systems)
        and len({tuple(run.key.seed for run in runs) for runs in own.values()}) == 1
    }


def _task(results: Results) -> list[str]:
    parts = [
        "Mean IoU after the last round, in points of 100: mean over seeds, with their standard "
        "deviation where there are several. Best in bold.",
        _scores_table(results),
    ]
    others = [system for system in _systems(results) if system != REFERENCE]
    if others and any(REFERENCE in own for own in results.values()):
        parts += [
            f"`{REFERENCE}` minus the other system, in points, with a 95 % interval: paired "
            "bootstrap over seeds and scored images within each set, and over sets as well for "
            "the mean. **win** and **loss** exclude 0; *open* does not, or rests on fewer than "
            f"{_FEWEST} images or sets, of which an interval is too narrow.",
            _differences_table(results, others),
        ]
    if max(len(run.rounds) for run in _runs(results)) > 1:
        parts += ["Round by round: mean IoU, and annotated pixels.", _rounds_table(results)]
    return [
        *parts,
        "What it costs, mean over sets, seeds and rounds. Near final: until a preview is within 2 "
        "points of the round's result. Memory: the most a process held.",
        _cost_table(results),
        "IoU by class after the last round, mean over seeds.",
        _classes_table(results),
    ]


def _runs(results: Results) -> list[Run]:
    return [run for own in results.values() for runs in own.values() for run in runs]


def _final(runs: Sequence[Run]) -> np.ndarray:
    """Mean IoU of every seed after the last round, in points; NaN where there is none."""
    return np.array([_points(run.rounds[-1].mean_iou) for run in runs])


def _points(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _mean(values: Iterable[float | None]) -> float:
    """Mean of those that are there, else NaN."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _scores_table(results: Results) -> str:
    systems, rows = _systems(results), []
    for name, own in results.items():
        values = [_final(own[s]) if s in own else np.array([math.nan]) for s in systems]
        spreads = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
        rows.append([name, *_with_best([v.mean() for v in values], spreads)])
    complete = _complete(results)
    if len(complete) > 1:
        means = [_mean(_final(own[s]).mean() for own in complete.values()) for s in systems]
        rows.append([f"**mean of {len(complete)}**", *_with_best(means)])
    return _table(["set", *systems], rows)


def _with_best(means: Sequence[float], spreads: Sequence[float] = ()) -> list[str]:
    best = max((m for m in means if not math.isnan(m)), default=math.nan)
    cells = [f"**{_number(m)}**" if m == best else _number(m) for m in means]
    if not any(spread > 0 for spread in spreads):
        return cells
    return [f"{cell} ± {_number(s)}" for cell, s in zip(cells, spreads, strict=True)]


def _differences_table(results: Results, others: Sequence[str]) -> str:
    rows = []
    draws: dict[str, list[tuple[float, np.ndarray]]] = {system: [] for system in others}
    verdicts: dict[str, list[str]] = {system: [] for system in others}
    for number, (name, own) in enumerate(results.items()):
        cells = []
        for system in others:
            pair = _paired(own, system)
            if pair is None:
                cells.append("-")
                continue
            ours, theirs = pair
            value = float((mean_ious(ours.sum(1)) - mean_ious(theirs.sum(1))).mean())
            drawn = bootstrap_differences(ours, theirs, seed=number)
            draws[system].append((value, drawn))
            cell, verdict = _difference(value, drawn, ours.shape[0] * ours.shape[1])
            cells.append(cell)
            verdicts[system].append(verdict)
        rows.append([name, *cells])
    if len(results) > 1:
        mean = ["**mean**"]
        for system in others:
            if not draws[system]:
                mean.append("-")
                continue
            value = _mean(value for value, _ in draws[system])
            drawn_sets = [drawn for _, drawn in draws[system]]
            mean.append(_difference(value, bootstrap_mean(drawn_sets), len(drawn_sets))[0])
        rows.append(mean)
        rows.append(
            ["won / lost / open"]
            + [
                " / ".join(str(verdicts[s].count(v)) for v in ("win", "loss", "open"))
                for s in others
            ]
        )
    return _table(["set", *others], rows)


def _paired(own: Mapping[str, Sequence[Run]], system: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return final matrices (S, I, K, K) of the reference and `system`, by seeds both ran."""
    both = [{run.key.seed: run for run in own.get(s, ())} for s in (REFERENCE, system)]
    seeds = sorted(both[0].keys() & both[1].keys())
    if not seeds:
        return None
    ours, theirs = (
        np.array([list(runs[seed].rounds[-1].confusion.values()) for seed in seeds], np.float64)
        for runs in both
    )
    return ours, theirs


def _difference(value: float, drawn: np.ndarray, units: int) -> tuple[str, str]:
    """Return cell and verdict of a difference; of one image or set nothing can be drawn."""
    if units == 1:
        return f"{100 * value:+.1f}", "open"
    low, high = 100 * np.nanpercentile(drawn, _LEVELS)
    verdict = "open"
    if units >= _FEWEST and (low > 0 or high < 0):
        verdict = "win" if low > 0 else "loss"
    shown = "*open*" if verdict == "open" else f"**{verdict}**"
    return f"{100 * value:+.1f} [{low:+.1f}, {high:+.1f}] {shown}", verdict


def _curve(runs: Sequence[Run]) -> Curve:
    curves = []
    for run in runs:
        seconds = np.cumsum([own.learn_seconds + own.predict_seconds for own in run.rounds])
        rounds = zip(seconds, run.rounds, strict=True)
        curves.append([(when, 100 * own.share, _points(own.mean_iou)) for when, own in rounds])
    return _mean_curve(curves)


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    return [
        (_mean(seconds), _mean(shares), _mean(points))
        for seconds, shares, points in (zip(*own, strict=True) for own in zip(*curves, strict=True))
    ]


def _curves(results: Results) -> dict[str, dict[str, Curve]]:
    """Curves by set and system; the first set is the mean, where there are several."""
    curves = {
        name: {system: _curve(own[system]) for system in sorted(own, key=_order)}
        for name, own in results.items()
    }
    complete = list(_complete(results))
    if len(complete) < 2:
        return curves
    mean = {s: _mean_curve([curves[name][s] for name in complete]) for s in _systems(results)}
    return {f"mean of {len(complete)}": mean, **curves}


def _rounds_table(results: Results) -> str:
    rows = [
        [name, system, *(f"{_number(points)} ({share:.1f} %)" for _, share, points in curve)]
        for name, systems in _curves(results).items()
        for system, curve in systems.items()
    ]
    rounds = max(map(len, rows)) - 2
    return _table(["set", "system", *(f"round {i + 1}" for i in range(rounds))], rows)


def _cost_table(results: Results) -> str:
    rows = []
    for system in _systems(results):
        runs = [run for run in _runs(results) if run.key.system == system]
        rounds: list[RoundResult] = [own for run in runs for own in run.rounds]
        peak = max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None)
        seconds = (
            _mean(own.learn_seconds for own in rounds),
            _mean(own.previews[0][0] if own.previews else None for own in rounds),
            _mean(own.near_final_seconds for own in rounds),
            _mean(own.predict_seconds for own in rounds),
        )
        memory = "-" if peak is None else f"{peak / 1e9:.2f}"
        rows.append([system, *map(_number, seconds), memory])
    head = ["learning, s", "first preview, s", "near final, s", "predicting an image, s"]
    return _table(["system", *head, "memory, GB"], rows)


def _classes_table(results: Results) -> str:
    systems, rows = _systems(results), []
    for name, own in results.items():
        for number, label in enumerate(next(iter(own.values()))[0].classes, 1):
            found = [
                _mean(_points(run.rounds[-1].iou[str(number)]) for run in own.get(system, ()))
                for system in systems
            ]
            rows.append([name, label, *_with_best(found)])
    return _table(["set", "class", *systems], rows)


def _made_with(settings: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Say what the figures were made with."""
    train = settings["train"]
    unseen = "strokes" if settings["strokes"] else "whole images"
    crop = f", centres of {settings['crop']} px only" if settings["crop"] else ""
    places = sorted({", ".join(f"{k} {v}" for k, v in r.environment.items()) for r in runs} - {""})
    return (
        f"Backbone {settings['backbone']}, preset {train['preset']}, at most "
        f"{train['max_steps']} steps a round. `finish`: {settings['rounds']} rounds, "
        f"{settings['corrections']} corrections a round. `unseen`: {settings['images']} annotated "
        f"images ({unseen}), at most {settings['test_images']} scored{crop}.\n\n"
        + "\n".join(f"Made with {place}." for place in places)
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in line) + " |" for line in lines)


def figure(runs: Sequence[Run]) -> Any:
    """Draw mean IoU over time and over annotated pixels, one row per set.

    Parameters
    ----------
    runs
        Those that failed are left out.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    tasks = {
        task: _curves(_by_set([r for r in runs if r.key.task == task and r.failed is None]))
        for task in _TASKS
    }
    panels = []
    for task, curves in tasks.items():
        longest = max((len(c) for own in curves.values() for c in own.values()), default=0)
        # A single round has one amount of annotation: nothing to draw a curve over.
        panels += [(task, curves, axis) for axis in (0, 1)[: min(longest, 2)]]
    names = sorted({name for curves in tasks.values() for name in curves}, key=_mean_first)
    systems = sorted({run.key.system for run in runs if run.failed is None}, key=_order)
    colours = dict(zip(systems, DEFAULT_COLOURS[1:] * (1 + len(systems)), strict=False))
    drawing = Figure(
        figsize=(4.5 * max(1, len(panels)), 0.8 + 2.6 * max(1, len(names))), layout="constrained"
    )
    grid = drawing.subplots(max(1, len(names)), max(1, len(panels)), squeeze=False)
    for row, name in zip(grid, names, strict=False):
        for axes, (task, curves, axis) in zip(row, panels, strict=True):
            for system, curve in curves.get(name, {}).items():
                axes.plot(
                    [point[axis] for point in curve],
                    [point[2] for point in curve],
                    marker="o",
                    markersize=4,
                    linewidth=2.4 if system == REFERENCE else 1.2,
                    color=colours[system],
                    label=system,
                )
            if axis == 0:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{name}, {task}", fontsize=9)
            axes.set_xlabel("seconds since the first strokes" if axis == 0 else "annotated, %")
            axes.set_ylabel("mean IoU, points")
            axes.grid(alpha=0.3)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    if handles:
        drawing.legend(
            [handles[s] for s in systems], systems, loc="outside upper center", ncols=len(systems)
        )
    return drawing


def _mean_first(name: str) -> tuple[bool, str]:
    return not name.startswith("mean of "), name
