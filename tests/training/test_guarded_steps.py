"""What a round does when memory runs out, and what it says it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.control import RunControl
from napari_convlora.events import Adjusted, Failed, Finished, Planned, Step
from napari_convlora.model import feature_cache
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.iteration import Returning
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.training import adapt, detail_stage, guarded_steps, loop, round_state
from napari_convlora.training.memory_plan import MemoryPlan
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.versus_installed import Rival
from tests.training.rounds import CLASSES, QUICK, Scene, finished

CPU = torch.device("cpu")
SIX = replace(QUICK, max_steps=6, decoder_share=0.4, batch=4, decoder_batch=2)
TRIED = replace(QUICK, max_steps=40, decoder_share=0.4)
"""With enough steps of the encoder for one to be tried beforehand."""


def on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text.")


def in_numpy() -> None:
    np.ones(2**50)


def in_torch() -> None:
    torch.empty(2**50)


Fail = Callable[[], None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple]]:
    """Let chosen calls of a step run out of memory; returns what each was called with."""

    def break_at(fails: dict[int, Fail]) -> list[tuple]:
        train_step, calls = guarded_steps.train_step, []

        def broken(
            run: RoundState, views: list, optimiser: torch.optim.Optimizer, *more: object
        ) -> float:
            number = len(calls) + 1
            calls.append((len(views), run.plan, optimiser, run))
            if number in fails:
                run.model.train()
                fails[number]()
            return train_step(run, views, optimiser, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(guarded_steps, "train_step", broken)
        return calls

    return break_at


def test_less_is_given_up_step_by_step() -> None:
    plan, said = MemoryPlan(torch.device("cuda"), batch=4, decoder_batch=2), []
    for decoder_only in (True, False, False, False, False):
        found = plan.smaller(decoder_only)
        assert found is not None
        plan, how = found
        said.append(how)
    assert said == [
        "with 1 view per step",
        "with 2 views per step",
        "with 1 view per step",
        "computing the encoder's blocks twice, which is slower",
        "on the CPU, which is slower",
    ]
    assert plan == MemoryPlan(CPU, 1, 1, checkpointing=True)
    assert plan.smaller(True) is plan.smaller(False) is None


@pytest.mark.parametrize("fail", [on_the_gpu, in_numpy, in_torch])
def test_a_round_that_runs_out_of_memory_goes_on_with_less(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]], fail: Fail
) -> None:
    """Steps 1 to 3 train the decoder, 4 to 6 the encoder; calls 2, 5, 6 and 8 fail."""
    calls = steps(dict.fromkeys((2, 5, 6, 8), fail))
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=SIX))
    assert [e.step for e in events if isinstance(e, Step)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], Finished)
    assert [str(e) for e in events if isinstance(e, Adjusted)] == [
        "Memory ran out at step 2; the round goes on with 1 view per step.",
        "Memory ran out at step 4; the round goes on with 2 views per step.",
        "Memory ran out at step 4; the round goes on with 1 view per step.",
        "Memory ran out at step 5; the round goes on computing the encoder's blocks twice, "
        "which is slower.",
    ]
    assert [views for views, *_ in calls] == [2, 2, 1, 1, 4, 2, 1, 1, 1, 1]
    assert all(t.isfinite().all() for t in events[-1].adapter.state.values())
    for earlier, later in itertools.pairwise(events):
        if isinstance(earlier, Adjusted):
            assert isinstance(later, Adjusted | Step | Planned), "said before the step goes on"


def test_what_was_learnt_and_the_optimisers_memory_stay(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]]
) -> None:
    """A step that is taken again with the same views makes the round no other one."""
    config = replace(SIX, batch=1, decoder_batch=1, decoder_share=0.0)
    image, _ = scene()
    plain = finished(adapt(backbone, [image], CLASSES, config=config)).adapter.state
    calls = steps({4: in_torch})
    events = list(adapt(backbone, [image], CLASSES, config=config))
    assert len([e for e in events if isinstance(e, Adjusted)]) == 1
    found = finished(events).adapter.state
    optimiser = calls[-1][2]
    assert {float(state["step"]) for state in optimiser.state.values()} == {6.0}
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_gradients_of_half_a_step_are_thrown_away(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SIX, batch=1, decoder_batch=1, decoder_share=0.0)
    image, _ = scene()
    plain = finished(adapt(backbone, [image], CLASSES, config=config)).adapter.state
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def late(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # after the backward pass
            in_torch()
        return clip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", late)
    found = finished(adapt(backbone, [image], CLASSES, config=config)).adapter.state
    assert len(calls) == 7
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_if_nothing_is_left_to_give_up_the_round_fails(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]]
) -> None:
    steps(dict.fromkeys(range(5, 100), in_numpy))
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=SIX))
    assert [e.step for e in events if isinstance(e, Step)] == [1, 2, 3, 4]
    assert len([e for e in events if isinstance(e, Adjusted)]) == 3, "batch, batch, blocks"
    assert events[-1] == Failed(
        "The device ran out of memory; choose the fast preset, a smaller backbone or the CPU."
    )


def test_another_device_takes_over_with_the_optimisers_memory(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]]
) -> None:
    """A GPU is played by the CPU: only the plan knows of it."""
    moved: list[torch.device] = []

    def run_out() -> None:
        run = calls[-1][3]
        run.plan = replace(run.plan, device=torch.device("cuda"), batch=1, checkpointing=True)
        move = run.move
        run.move = lambda device: (moved.append(device), move(device))
        run.device = torch.device("cuda")
        in_torch()

    config = replace(SIX, batch=1, decoder_share=0.0)
    calls = steps({4: run_out})
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=config))
    assert moved == [CPU]
    assert [str(e) for e in events if isinstance(e, Adjusted)] == [
        "Memory ran out at step 4; the round goes on on the CPU, which is slower."
    ]
    finished(events)
    assert {float(state["step"]) for state in calls[-1][2].state.values()} == {6.0}


def test_a_step_that_would_fill_the_memory_is_broken_off_before_the_system_ends_the_process(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SIX, batch=1, decoder_share=0.0, preset="full")
    image, _ = scene()

    def adjusted(free: float) -> list[str]:
        monkeypatch.setattr(guarded_steps, "available_memory", lambda: free)
        events = list(adapt(backbone, [image], CLASSES, config=config))
        finished(events)
        return [str(e) for e in events if isinstance(e, Adjusted)]

    assert adjusted(1e9) == []
    (only,) = adjusted(5e6)
    assert only.startswith("Memory ran out at step 1; the round goes on computing")


def test_a_cache_gives_way_where_the_cpus_memory_is_short(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]]
) -> None:
    held: list[int] = []
    cache = FeatureCache(max_bytes=10**8)
    steps({3: lambda: (held.append(cache.nbytes), in_numpy())})
    config = replace(SIX, batch=1, decoder_share=0.0)
    events = adapt(backbone, [scene()[0]], CLASSES, config=config, cache=cache)
    held.extend(cache.nbytes for event in events if isinstance(event, Adjusted))
    assert held[0] > 0
    assert held[1] == 0
    assert cache.max_bytes == 5 * 10**7


def test_what_is_learnt_does_not_depend_on_what_had_to_go_to_disk(
    backbone: Backbone, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path))
    monkeypatch.setattr(feature_cache, "_WORTH", 0)
    image, _ = scene()
    caches = FeatureCache(), FeatureCache(max_bytes=40_000, max_disk_bytes=10**8)
    large, small = (
        finished(adapt(backbone, [image], CLASSES, config=SIX, cache=cache)).adapter.state
        for cache in caches
    )
    assert caches[1].disk_bytes > 0
    assert all(torch.equal(tensor, small[name]) for name, tensor in large.items())


def test_a_round_says_what_it_takes_after_three_steps(backbone: Backbone, scene: Scene) -> None:
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=TRIED))
    kinds = [type(e) for e in events if isinstance(e, Planned | Step)]
    assert kinds.count(Planned) == 1
    assert kinds.index(Planned) == 2, "known as soon as the third step is done"
    (plan,) = (e for e in events if isinstance(e, Planned))
    steps = [e for e in events if isinstance(e, Step)]
    taken = steps[-1].seconds - steps[2].seconds
    assert taken / 10 < plan.seconds_left < taken * 10
    assert 1e8 < plan.peak_memory < psutil.virtual_memory().total
    assert str(plan).startswith("A step takes ")
    assert finished(events).adapter.summary["peak_memory"] == plan.peak_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of the training that goes on only when it is told to."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    for module in (guarded_steps, detail_stage, loop, round_state):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_time_left_follows_steps_that_slow_down(
    backbone: Backbone, scene: Scene, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, train_step = [1.0] * 20 + [4.0] * 40, guarded_steps.train_step

    def slow(*arguments: object) -> float:
        clock.now += taken.pop(0)
        return train_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(guarded_steps, "train_step", slow)
    config = replace(QUICK, max_steps=60, decoder_share=0.0, patience=100)
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=config))
    left = {e.step: e.seconds_left for e in events if isinstance(e, Step)}
    assert left[1] is left[2] is None
    assert left[20] == pytest.approx(40)
    assert 40 < left[25] < 35 * 4
    assert left[40] == pytest.approx(20 * 4)
    assert left[60] == 0


def test_the_time_left_waits_for_the_first_step_of_the_encoder_and_hears_of_the_end(
    backbone: Backbone, scene: Scene, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = guarded_steps.train_step

    def slow(*arguments: object) -> float:
        clock.now += 0.2 if arguments[-1] else 8.0
        return train_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(guarded_steps, "train_step", slow)
    config = replace(QUICK, max_steps=60, decoder_share=0.5, max_minutes=60.0, patience=4)
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=config))
    left = {e.step: e.seconds_left for e in events if isinstance(e, Step)}
    assert left[20] is None, "steps that adapt the encoder take many times as long"
    assert left[31] == pytest.approx(29 * 8)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "plateau"
    assert left[max(left) - 2] == pytest.approx(2 * 8)


def test_the_time_left_knows_what_follows_the_last_step(
    backbone: Backbone, scene: Scene, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile takes 3 s, and the image is one of ten planes."""
    plane_logits = detail_stage.plane_logits

    def slow(*arguments: object, **more: object) -> Iterator[object]:
        steps = Returning(plane_logits(*arguments, **more))  # type: ignore[arg-type]
        for step in steps:
            tiles.append(step)
            clock.now += 3
            yield step
        return steps.value

    tiles: list[object] = []
    monkeypatch.setattr(detail_stage, "plane_logits", slow)
    control = RunControl()
    control.planes_after = 10
    image, truth = scene(160, 192)
    image = replace(image, annotations=truth)  # so many labels that some are held out
    first = finished(adapt(backbone, [image], CLASSES, config=QUICK)).adapter
    per_plane = len(tiles)
    rival = Rival(first, {"elsewhere": ((1, 2, 3), np.zeros(1, np.uint8))})
    for known, more in ((None, 0), (rival, 3 * 8)):
        rounds = adapt(backbone, [image], CLASSES, config=QUICK, control=control, rival=known)
        last = [e for e in rounds if isinstance(e, Step)][-1]
        assert last.seconds_left == pytest.approx(3 * per_plane * 10 + more)


def test_a_time_limit_bounds_what_is_left(backbone: Backbone, scene: Scene) -> None:
    config = replace(TRIED, max_minutes=10, max_steps=10**6, decoder_share=0.0)
    control = RunControl()
    for event in adapt(backbone, [scene()[0]], CLASSES, config=config, control=control):
        if isinstance(event, Planned):
            assert 0 < event.seconds_left < 600
            control.stop()
    assert finished([event]).reason == "stopped"


@pytest.mark.parametrize("config", [TRIED, replace(TRIED, decoder_share=0.0), SIX])
def test_trying_and_measuring_teach_nothing(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch, config
) -> None:
    image, _ = scene()
    measured = finished(adapt(backbone, [image], CLASSES, config=config)).adapter
    monkeypatch.setattr(guarded_steps, "_MEASURED", 0)
    monkeypatch.setattr(guarded_steps.CarefulSteps, "try_encoder", lambda self: iter(()))
    plain = finished(adapt(backbone, [image], CLASSES, config=config)).adapter
    assert measured.summary["score"] == plain.summary["score"]
    for name, tensor in plain.state.items():
        assert torch.equal(measured.state[name], tensor), name


def test_an_encoder_that_does_not_fit_is_known_before_the_first_step(
    backbone: Backbone, scene: Scene, steps: Callable[..., list[tuple]]
) -> None:
    steps({1: in_torch})
    control, before = RunControl(), []
    for event in adapt(backbone, [scene()[0]], CLASSES, config=TRIED, control=control):
        if isinstance(event, Step):
            control.stop()
        elif isinstance(event, Adjusted):
            before.append(event.message)
    assert isinstance(event, Finished)
    assert before == [
        "Memory ran out at step 1; the round goes on computing the encoder's blocks twice, "
        "which is slower."
    ]


def test_the_summary_says_how_much_is_kept(backbone: Backbone, scene: Scene) -> None:
    cache = FeatureCache()
    found = finished(adapt(backbone, [scene()[0]], CLASSES, config=QUICK, cache=cache)).adapter
    assert found.summary["cache"] == {"memory": cache.nbytes, "disk": 0}
    assert cache.nbytes > 0


def test_mixed_precision_fits_every_part_of_a_step(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, with the types that the CPU's autocast gives; slow, so on two steps."""
    inside: list[bool] = []
    suffix = SemanticSAM.suffix

    def watched(model: SemanticSAM, features: torch.Tensor) -> object:
        inside.append(torch.is_autocast_enabled("cpu"))
        return suffix(model, features)

    monkeypatch.setattr(SemanticSAM, "suffix", watched)
    monkeypatch.setattr(
        "napari_convlora.training.step.mixed_precision",
        lambda _: torch.autocast("cpu", torch.bfloat16),
    )
    config = replace(QUICK, max_steps=2, decoder_share=0.0)
    cache = FeatureCache()
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=config, cache=cache))
    assert all(np.isfinite(e.loss) for e in events if isinstance(e, Step))
    assert all(t.dtype == torch.float32 for t in finished(events).adapter.state.values())
    assert inside.count(True) == 2
    kept = [entry.features.dtype for entry in cache._entries.values()]
    assert set(kept) == {torch.float32}, "frozen features serve predictions as well"
