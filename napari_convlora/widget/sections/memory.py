"""What training keeps for the next round, and what a step of the last one took."""

from __future__ import annotations

from qtpy.QtWidgets import QLabel, QPushButton, QVBoxLayout, QWidget

from napari_convlora.events import Planned
from napari_convlora.session.jobs import CacheUse
from napari_convlora.widget.engine.workflow import Workflow


class MemorySection(QWidget):
    """Sizes in words, and a button that empties the cache.

    Parameters
    ----------
    workflow
        The loop; while something runs, its cache stays.
    """

    def __init__(self, workflow: Workflow, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._workflow = workflow
        self._bytes = 0
        self.kept, self.taken = QLabel(), QLabel("A round says here what its steps take.")
        for label in (self.kept, self.taken):
            label.setWordWrap(True)
        self.empty_button = QPushButton("Empty cache")
        self.empty_button.setToolTip("Give memory and disk back; the next round starts slower.")
        self.empty_button.clicked.connect(workflow.empty_cache)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for part in (self.kept, self.empty_button, self.taken):
            layout.addWidget(part)
        workflow.kept.connect(self._on_kept)
        workflow.planned.connect(self._on_planned)
        workflow.changed.connect(self._refresh)
        self._on_kept(CacheUse(0, 0))

    def _on_kept(self, kept: CacheUse) -> None:
        self._bytes = kept.memory + kept.disk
        self.kept.setText(
            f"Features kept for the next round: {kept.memory / 1e6:,.1f} MB in memory, "
            f"{kept.disk / 1e6:,.1f} MB on disk."
        )
        self._refresh()

    def _on_planned(self, planned: Planned) -> None:
        self.taken.setText(
            f"Last round: {planned.seconds_per_step:.2g} s and up to "
            f"{planned.peak_memory / 1e9:.1f} GB per step."
        )

    def _refresh(self) -> None:
        self.empty_button.setEnabled(self._bytes > 0 and not self._workflow.running)
