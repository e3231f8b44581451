"""What the status line says of a job once it is over."""

from __future__ import annotations

import pytest

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.events import Failed
from napari_convlora.widget.engine import sentences
from napari_convlora.widget.engine.running_job import Outcome, RunningJob
from napari_convlora.widget.threads import JobError


@pytest.mark.parametrize(
    ("job", "outcome", "sentence"),
    [
        (RunningJob(), Outcome.NOTHING, ""),
        (RunningJob(loaded=True), Outcome.LOADED, "The adapter is loaded; "),
        (RunningJob(loaded=True, predicted=True), Outcome.PREDICTED, "The prediction is ready. "),
        (RunningJob(loaded=True, cancelled=True), Outcome.LOADED, "The adapter is loaded; "),
        (RunningJob(cancelled=True), Outcome.CANCELLED, "The prediction was stopped; the adapter"),
        (RunningJob(emptied=True), Outcome.EMPTIED, "The cache is empty; "),
        (RunningJob(failed=Failed("No.")), Outcome.FAILED, "No."),
        (
            RunningJob(interrupted="its image was removed", failed=Failed("No.")),
            Outcome.INTERRUPTED,
            "Stopped because its image was removed; what was learnt and painted is kept.",
        ),
        (
            RunningJob(error=InputError("It has two axes."), failed=Failed("No.")),
            Outcome.BROKEN,
            "It has two axes.",
        ),
    ],
)
def test_a_job_ends_in_the_words_of_what_it_came_to(job, outcome, sentence):
    assert job.outcome is outcome
    assert sentences.at_the_end(job, here=True).startswith(sentence)
    assert bool(sentence) or not sentences.at_the_end(job, here=True)


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ("training", "Stopped; nothing has changed."),
        ("predicting", "The prediction was stopped: what was done by then is shown"),
    ],
)
def test_a_job_that_is_stopped_says_what_that_leaves(phase, sentence):
    job = RunningJob(phase=phase)
    job.controls.stop()
    assert sentences.at_the_end(job, here=True).startswith(sentence)


def test_only_what_broke_is_our_fault_whatever_an_error_is_called():
    named_alike = type("JobError", (ConvLoRAError,), {})
    assert not sentences.is_our_fault(named_alike("Choose another file."))
    assert sentences.broken(named_alike("Choose another file.")) == "Choose another file."
    for ours in (JobError("shape [1]\nat line 3"), ValueError("shape [1]")):
        assert sentences.is_our_fault(ours)
        assert sentences.broken(ours).startswith("It broke off: shape [1]. What is painted is kept")
