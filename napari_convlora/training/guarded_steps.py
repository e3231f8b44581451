"""Steps that are measured at first, and taken again with less where memory runs out."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from napari_convlora.devices import available_memory, is_out_of_memory, peak_memory
from napari_convlora.events import Adjusted, Planned
from napari_convlora.training.memory_plan import kept_bytes
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.step import train_step
from napari_convlora.training.views import View

_MEASURED = 3
"""Steps that are measured before the round says what it takes."""

_RECENT = 10
"""Steps that tell what the next ones will take."""

_FREE_SHARE = 0.8
"""Share of the free memory that a step may keep for its gradient, which needs some itself."""

_TRIAL_SHARE = 0.05
"""A trial of the encoder may cost this share of its steps."""


class CarefulSteps:
    """The optimiser steps of a round.

    Parameters
    ----------
    run
        The round.
    optimiser, parameters
        As for `train_step`.
    decoder_steps
        How many steps at the start leave the encoder as it is; all of them if nothing adapts it.
    tiles_after
        How many tiles the round predicts after its last step.

    Attributes
    ----------
    end
        The step that is the last one, by what is known.
    """

    def __init__(
        self,
        run: RoundState,
        optimiser: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        decoder_steps: int,
        tiles_after: int = 0,
    ) -> None:
        self._run, self._optimiser, self._parameters = run, optimiser, parameters
        self._decoder_steps, self._tiles_after = decoder_steps, tiles_after
        self._done, self.end = 0, run.config.max_steps
        self._seconds = {kind: deque[float](maxlen=_RECENT) for kind in (True, False)}
        self._began = run.elapsed()
        self._stepping = 0.0
        self._told = False

    def try_encoder(self) -> Iterator[Adjusted]:
        """Compute a step that adapts the encoder without learning from it.

        So that what it takes is known long before the first of them. Nothing is tried where such
        steps come at once or are few, nor where time is limited.
        """
        run = self._run
        encoder_steps = run.config.max_steps - self._decoder_steps
        dear = encoder_steps * _TRIAL_SHARE < 1 or run.config.max_minutes is not None
        if dear or not self._decoder_steps or run.control.stopping:
            return
        views = run.views[: run.plan.batch]
        for view in views:  # these last
            run.features(view)
            if run.model.detail is not None:
                run.detail(view)
        counted = run.confusion.copy()
        still = torch.optim.SGD(self._parameters, lr=0)
        yield from self._step(views, run.config.seed, False, still)
        run.confusion[:] = counted

    def take(
        self, views: Sequence[View], seed: int, decoder_only: bool
    ) -> Generator[Planned | Adjusted, None, float]:
        """Take a step as `train_step` does, and return its loss.

        Yields
        ------
        Planned
            Once it is known.
        Adjusted
            Memory ran out, and less was enough.

        Raises
        ------
        MemoryError or RuntimeError
            Memory ran out, and there is nothing left to do without.
        """
        if not self._done:
            self._began = self._run.elapsed()
        loss = yield from self._step(views, seed, decoder_only, self._optimiser)
        self._done += 1
        self._stepping += self._seconds[decoder_only][-1]
        known = self._seconds[False] or self._decoder_steps == self._run.config.max_steps
        if not self._told and self._done >= _MEASURED and known:
            self._told = True
            yield self._planned()
        return loss

    def _step(
        self,
        views: Sequence[View],
        seed: int,
        decoder_only: bool,
        optimiser: torch.optim.Optimizer,
    ) -> Generator[Adjusted, None, float]:
        run = self._run
        while True:
            views = views[: run.plan.views(decoder_only)]
            arguments = run, views, optimiser, self._parameters, seed, decoder_only
            try:
                began = time.monotonic()
                if self._told:
                    loss = train_step(*arguments)
                else:
                    with (
                        peak_memory(run.device) as peak,
                        kept_bytes(run.model, self._limit(decoder_only)),
                    ):
                        loss = train_step(*arguments)
                    run.peak_memory = max(run.peak_memory, peak[0])
                self._seconds[decoder_only].append(time.monotonic() - began)
                return loss
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # which holds on to all that was computed
            yield self._adjust(decoder_only, failure)

    def _limit(self, decoder_only: bool) -> float:
        """Bytes that a step may keep; a GPU says itself when it has no more."""
        last = self._run.plan.smaller(decoder_only) is None
        on_cpu = self._run.device.type == "cpu"
        return _FREE_SHARE * available_memory() if on_cpu and not last else math.inf

    def _adjust(self, decoder_only: bool, failure: Exception) -> Adjusted:
        """Make do with less from now on; model and optimiser keep what they have learnt."""
        run = self._run
        found = run.plan.smaller(decoder_only)
        if found is None or run.team.size > 1:  # a team must not part
            raise failure
        run.model.eval()
        self._optimiser.zero_grad()
        run.plan, how = found
        if run.plan.checkpointing:
            run.model.checkpoint_blocks()
        if run.device.type == "cpu":
            run.cache.max_bytes //= 2
            run.cache.shrink()
            run.details.clear()
        if run.plan.device != run.device:
            run.move(run.plan.device)
            self._optimiser.load_state_dict(self._optimiser.state_dict())  # goes to its parameters
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._seconds[decoder_only].clear()
        return Adjusted(f"Memory ran out at step {self._done + 1}; the round goes on {how}.")

    def _planned(self) -> Planned:
        per_step = statistics.median(self._seconds[False] or self._seconds[True])
        return Planned(per_step, self._run.peak_memory, self.seconds_left() or 0.0)

    def seconds_left(self) -> float | None:
        """See `Step.seconds_left`."""
        if self._done < _MEASURED:
            return None
        run, config = self._run, self._run.config
        decoder_left = min(max(0, self._decoder_steps - self._done), self.end - self._done)
        encoder_left = self.end - self._done - decoder_left
        if encoder_left and not self._seconds[False]:  # which take many times as long
            return None
        decoder, encoder = (
            statistics.fmean(self._seconds[kind] or self._seconds[not kind])
            for kind in (True, False)
        )
        elapsed = run.elapsed()
        # Previews and scores go on between the steps as they did until now.
        between = max(1.0, (elapsed - self._began) / max(self._stepping, 1e-9))
        left = between * (decoder_left * decoder + encoder_left * encoder)
        if config.max_minutes is not None:
            left = min(left, max(0.0, 60 * config.max_minutes - elapsed))
        tiles = self._tiles_after + run.control.planes_after * run.tiles_per_plane
        return left + tiles * run.seconds_per_tile
