"""What becomes of the panel when its dock is closed, and when it is opened again."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QObject, QTimer, Signal
from qtpy.QtWidgets import QDockWidget, QMainWindow, QWidget


class Docking(QObject):
    """Keeps a panel whose dock was closed hidden in the main window, and so ends it with that.

    napari deletes a dock that is closed, and only takes the parent of the widget in it away.

    Signals
    -------
    closed
        The dock was closed.
    opened
        The panel is in a dock.
    """

    closed = Signal()
    opened = Signal()

    def __init__(self, panel: QWidget) -> None:
        super().__init__(panel)
        self._panel = panel
        self._was_in_one = False
        # Not the window itself, which a panel that Python keeps would keep as well.
        self._window: Callable[[], QMainWindow | None] = lambda: None
        panel.installEventFilter(self)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Follow the panel's parent."""
        if event is not None and event.type() == QEvent.Type.ParentChange:
            self._was_in_one |= self._panel.parentWidget() is not None
            QTimer.singleShot(0, self._follow)  # a dock may not be in its window yet
        return False

    def _follow(self) -> None:
        above = [self._panel.parentWidget()]
        while above[-1] is not None:
            above.append(above[-1].parentWidget())
        if any(isinstance(one, QDockWidget) for one in above):
            self._window = next((ref(w) for w in above if isinstance(w, QMainWindow)), self._window)
            self.opened.emit()
        elif above[0] is None and self._was_in_one:
            window = self._window()
            if window is None or not isalive(window):
                self._panel.deleteLater()
                return
            self._panel.setParent(window)
            self._panel.hide()
            self.closed.emit()
