"""What can be heard of the jobs."""

from __future__ import annotations

from qtpy.QtCore import QObject, Signal


class JobSignals(QObject):
    """What a workflow tells whoever listens.

    Signals
    -------
    changed
        Anything the panel shows may have changed: phase, layers, installed adapter.
    said
        What has just happened, or what went well, in one sentence.
    failed
        What went wrong, in one sentence, and whether it is our fault rather than the input's.
    found
        Classes that a layer or an adapter brings along.
    begun
        A round is asked for; what it learns from was copied just now.
    started, planned, stepped, scored, tiled
        Progress: (total steps, held out, bytes of the adapter), `Planned`, list of `Step`,
        `Scored`, `Tiles`.
    kept
        What the process keeps for the next round: `CacheUse`.
    learnt
        A round has ended: `Finished`, or `Failed` with the adapter of its last snapshot, then the
        snapshots of images that it learnt from, and its `RoundSettings`.
    predicted
        The image that was predicted, and what the model said (P, H, W).
    loaded
        An adapter was loaded; whether it is of a round of ours.
    interrupted
        The user took away what a job works on, which ends it.
    ready
        Titles of the backbones on this computer, by name.
    """

    changed = Signal()
    said = Signal(str)
    failed = Signal(str, bool)
    found = Signal(object)
    begun = Signal()
    started = Signal(int, bool, object)
    planned = Signal(object)
    stepped = Signal(list)
    scored = Signal(object)
    tiled = Signal(object)
    kept = Signal(object)
    learnt = Signal(object, list, object)
    predicted = Signal(object, object)
    loaded = Signal(bool)
    interrupted = Signal()
    ready = Signal(dict)
