from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.errors import ConvLoRAError, WeightsError
from napari_convlora.evaluation.gate import Verdict
from napari_convlora.events import Failed, Finished
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.iteration import Returning
from napari_convlora.session.session import Session, State
from tests.conftest import CLASSES, make_scene

QUICK = TrainConfig(max_steps=2, views=2, detail_steps=10, device="cpu")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    backbone = random_backbone()
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    return Session(train_config=QUICK)


def test_rounds_follow_each_other_and_the_last_adapter_predicts(session: Session) -> None:
    image, truth = make_scene()
    assert session.state is State.EMPTY
    for number in (1, 2):
        *_, last = session.run_round([image], CLASSES)
        assert isinstance(last, Finished)
        assert session.state is State.READY
        assert session.rounds[-1].number == number
        assert session.installed is last.adapter
    steps = Returning(session.predict(image.image))
    assert list(steps)
    assert steps.value.labels.shape == truth.shape


def test_what_was_learnt_from_erased_labels_is_no_hint(session: Session) -> None:
    image, _ = make_scene()
    at = np.argwhere(image.annotations != 0)

    def hinted(n_erased: int) -> bool:
        list(session.run_round([image], CLASSES))
        left = image.annotations.copy()
        left[tuple(at[:n_erased].T)] = 0
        *_, last = session.run_round([replace(image, annotations=left)], CLASSES)
        assert isinstance(last, Finished)
        return last.adapter.summary["hint"]

    assert hinted(1)  # retouched
    assert not hinted(len(at) // 3)


def test_only_the_last_and_the_installed_adapter_stay_in_memory(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = iter([True, False, False, True])
    monkeypatch.setattr(
        "napari_convlora.session.session.decide", lambda _: Verdict(next(better), "as it is")
    )
    kept = []
    for _ in range(4):
        list(session.run_round([make_scene()[0]], CLASSES))
        kept.append([own.number for own in session.rounds if own.adapter is not None])
    assert kept == [[1], [1, 2], [1, 3], [4]]
    assert [own.number for own in session.rounds] == [1, 2, 3, 4]


def test_the_cache_takes_a_quarter_of_the_free_memory_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, taken in ((4_000, 1_000), (10**12, 2 * 1024**3)):
        monkeypatch.setattr(
            "napari_convlora.session.session.available_memory", lambda free=free: free
        )
        assert Session().cache.max_bytes == taken


def test_a_failed_round_keeps_what_was_there(session: Session) -> None:
    image, _ = make_scene()
    list(session.run_round([image], CLASSES))
    kept = session.installed
    empty = LabelledImage(image.image, np.zeros_like(image.annotations))
    *_, last = session.run_round([empty], CLASSES)
    assert isinstance(last, Failed)
    assert session.state is State.FAILED
    assert session.installed is kept
    assert len(session.rounds) == 1


def test_a_backbone_that_cannot_be_loaded_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise WeightsError(f"{name} is not here; fetch it.")

    monkeypatch.setattr("napari_convlora.session.session.load_backbone", absent)
    session = Session(train_config=QUICK)
    (only,) = session.run_round([make_scene()[0]], CLASSES)
    assert only == Failed("litemedsam is not here; fetch it.")
    assert session.state is State.FAILED


def test_predicting_before_any_adapter_says_what_to_do(session: Session) -> None:
    with pytest.raises(ConvLoRAError, match="press Adapt or load"):
        list(session.predict(make_scene()[0].image))


def test_an_abandoned_round_does_not_stay_in_training(session: Session) -> None:
    events = session.run_round([make_scene()[0]], CLASSES)
    next(events)
    assert session.state is State.TRAINING
    events.close()
    assert session.state is State.FAILED


def test_frozen_features_serve_the_next_round(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = make_scene()
    list(session.run_round([image], CLASSES))
    known = len(session.cache)
    session.train_config = replace(QUICK)
    list(session.run_round([image], CLASSES))
    assert len(session.cache) == known > 0


def test_a_round_that_ran_elsewhere_is_accounted_for(session: Session) -> None:
    started, *_, finished = session.run_round([make_scene()[0]], CLASSES)
    assert isinstance(finished, Finished)
    elsewhere = Session()
    elsewhere.record(started)
    assert elsewhere.state is State.TRAINING
    elsewhere.record(Failed("It broke off."))
    assert elsewhere.state is State.FAILED
    assert elsewhere.rounds == []
    elsewhere.record(Failed("It broke off; what was learnt by step 1 is kept.", finished.adapter))
    assert elsewhere.state is State.READY
    assert elsewhere.installed is elsewhere.rounds[0].adapter is finished.adapter
    assert elsewhere.rounds[0].reason == "failed"


def test_a_session_beside_another_shares_its_backbone_and_nothing_else() -> None:
    session, other = Session(train_config=QUICK), random_backbone()
    loaded = Session(_backbone=("litemedsam", other))
    session.share_backbone(loaded)
    prompter = session.prompter()
    assert session.backbone() is other
    assert session.prompter() is prompter
    assert session.cache is not loaded.cache
    session.share_backbone(Session(_backbone=("vit_b", random_backbone("vit"))))  # not the chosen
    assert session.backbone() is other
    weights = dict(other.named_parameters())
    assert all(
        p.data_ptr() == weights[name].data_ptr() for name, p in prompter.backbone.named_parameters()
    )
