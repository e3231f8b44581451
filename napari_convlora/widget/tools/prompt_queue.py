"""The objects that SAM is still to find, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from napari_convlora.prediction.prompts import Prompt
from napari_convlora.session.process import Job
from napari_convlora.session.prompt_jobs import Question
from napari_convlora.widget.engine.runner import Runner
from napari_convlora.widget.tools.prompted_object import PromptedObject


class PromptQueue:
    """Asks about one object at a time, and again where more was said meanwhile.

    Parameters
    ----------
    runner
        Runs the jobs; its callbacks are taken.
    job
        Makes a job of a question.

    Attributes
    ----------
    waiting
        Objects without an answer, or with one to an earlier prompt.
    asked
        The object that was asked about last, and its prompt then.
    on_asked, on_answer, on_error
        Called as a job begins, with an object and its mask (H, W), and with an object and what
        went wrong.
    """

    def __init__(self, runner: Runner, job: Callable[[Question], Job]) -> None:
        self._runner, self._job = runner, job
        self.waiting: list[PromptedObject] = []
        self.asked: tuple[PromptedObject, Prompt] | None = None
        self.on_asked: Callable[[], None] = lambda: None
        self.on_answer: Callable[[PromptedObject, np.ndarray], None] = lambda thing, mask: None
        self.on_error: Callable[[PromptedObject, Exception], None] = lambda thing, error: None
        runner.on_messages = self._on_messages
        runner.on_error = self._on_error
        runner.on_end = self._go_on

    def ask(self, thing: PromptedObject) -> None:
        """Ask about an object as soon as those before it are answered."""
        if thing not in self.waiting:
            self.waiting.append(thing)
        self._go_on()

    def _go_on(self) -> None:
        if self.waiting and not self._runner.busy:
            self.on_asked()
            thing = self.waiting[0]
            self.asked = thing, thing.prompt
            self._runner.start(self._job(thing.question()))

    def _on_messages(self, messages: list[Any]) -> None:
        for message in messages:
            assert self.asked is not None
            thing, prompt = self.asked
            if thing not in self.waiting:
                continue  # cancelled meanwhile
            thing.window = message.window
            self.on_answer(thing, message.mask)
            if thing.prompt is prompt:  # or more was said meanwhile
                self.waiting.remove(thing)

    def _on_error(self, error: Exception) -> None:
        assert self.asked is not None
        thing, _ = self.asked
        if thing in self.waiting:
            self.waiting.remove(thing)
        self.on_error(thing, error)
