"""Section of the panel: from classes to single objects, as a layer, a table and files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from magicgui.widgets import CheckBox, ComboBox, SpinBox
from qtpy.QtWidgets import QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.exports.instances import Splitting, find_instances, save_instances
from napari_convlora.exports.measurements import region_table
from napari_convlora.labels.classes import find_background
from napari_convlora.widget import dialogs
from napari_convlora.widget.form import Form
from napari_convlora.widget.layers.extra_layers import NOTHING_PREDICTED
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.threads import in_thread

if TYPE_CHECKING:
    from napari_convlora.widget.engine.workflow import Workflow

_ALL, _SELECTED = "all but background", "the selected class"


class InstancesSection(QWidget):
    """Method, minimum size, Make, Export.

    Parameters
    ----------
    workflow
        Whose current image is meant.
    selected_class
        Returns the id of the class chosen in the table; 0 if there is none.
    """

    def __init__(
        self,
        workflow: Workflow,
        selected_class: Callable[[], int],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._flow, self._selected_class = workflow, selected_class
        self._making: ImageLayers | None = None
        self.classes = ComboBox(
            label="Of",
            choices=[_ALL, _SELECTED],
            tooltip="Which classes consist of objects. Background is the class in italics.",
        )
        self.method = ComboBox(
            label="Method",
            choices=get_args(Splitting),
            tooltip="components: what touches is one object. watershed: cut where it is narrow.",
        )
        self.min_size = SpinBox(
            label="Minimum size",
            min=1,
            max=1_000_000,
            value=20,
            tooltip="In pixels. Smaller objects are left out.",
        )
        self.join_planes = CheckBox(
            label="Planes",
            tooltip="For a z-stack; leave it off where the planes are times or separate images.",
        )
        # magicgui warns if it is given along with a label
        self.join_planes.text = "objects go on in the next plane"
        self.make_button = QPushButton("Make instances")
        self.make_button.setToolTip("Number the objects of the prediction, annotations on top.")
        self.export_button = QPushButton("Export instances…")
        self.export_button.setToolTip("A TIFF of instance numbers and a CSV table, or the table.")
        self._form = Form([self.classes, self.method, self.min_size, self.join_planes])
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self.empty = QLabel(NOTHING_PREDICTED)
        self.empty.setWordWrap(True)
        layout.addWidget(self.empty)
        layout.addWidget(self._form)
        buttons = QHBoxLayout()
        buttons.addWidget(self.make_button)
        buttons.addWidget(self.export_button)
        layout.addLayout(buttons)
        workflow.changed.connect(self.refresh)
        self.make_button.clicked.connect(lambda: self._try(self.make))
        self.export_button.clicked.connect(
            lambda: dialogs.with_instances(self, lambda path: self._try(self.export, path))
        )
        self.refresh()

    def refresh(self) -> None:
        """Derive what is enabled from the state."""
        record = self._flow.images.current
        predicted = record is not None and record.predicted
        self.empty.setVisible(not predicted)
        self.make_button.setEnabled(predicted and self._making is None)
        self.export_button.setEnabled(record is not None and record.extra.instances is not None)
        stack = record is not None and predicted and record.planes_shape[0] > 1
        self._form.show_row(self.join_planes, stack)

    def make(self) -> None:
        """Make the instances layer from the prediction with the annotations on top.

        It takes seconds on a large image, so it is done in a thread.
        """
        images = self._flow.images
        record = images.need()
        labels = record.predicted_labels()
        background = find_background(images.classes)
        chosen = [info.id for info in images.classes if info.id != background]
        if self.classes.value == _SELECTED:
            chosen = [self._selected_class()]
        find = partial(
            find_instances,
            method=self.method.value,
            min_size=self.min_size.value,
            join_planes=self.join_planes.value and len(labels) > 1,
        )
        uncertainty = record.extra.uncertainty
        describe = partial(region_table, classes=images.classes, uncertainty=uncertainty)
        self._making = record
        self._flow.said.emit("Making instances…")
        self.refresh()
        in_thread(_make, find, describe, labels, chosen, then=self._show, failed=self._complain)

    def export(self, path: str | Path) -> None:
        """Write the instances, as they are in the layer, and their table."""
        images = self._flow.images
        record = images.need()
        layer = record.extra.instances
        if layer is None:
            raise InputError("There are no instances yet; press Make instances first.")
        # The user may have mended instances since, so the table is made anew; their classes
        # are those of Make, as the prediction may be another by now.
        instances = layer.data.reshape(record.planes_shape)
        known = layer.features
        ids = np.zeros(max(int(instances.max()), int(known["index"].max())) + 1, np.int64)
        ids[known["index"]] = known["class_id"]
        table = region_table(instances, ids[instances], images.classes, record.extra.uncertainty)
        save_instances(instances, table, path)
        self._flow.said.emit(f"Instances written to {Path(path).name}, their table as CSV.")

    def _show(self, made: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
        record, self._making = self._making, None
        count = len(made[1]["index"])
        if not count:
            sentence = "There is no object of this size; lower the minimum size."
            self._flow.failed.emit(sentence, False)
        elif record is not None and record.predicted:  # not removed meanwhile
            mended = record.extra.show_instances(*made, above=record.prediction)
            stay = f" Those you have mended stay in '{mended}'." if mended else ""
            self._flow.said.emit(f"{count:,} instances; hover over one to see its row.{stay}")
        self._flow.changed.emit()

    def _complain(self, error: Exception) -> None:
        self._making = None
        self.refresh()
        self._flow.failed.emit(f"It broke off: {error}", True)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except ConvLoRAError as error:
            self._flow.failed.emit(str(error), False)


def _make(
    find: Callable[..., np.ndarray],
    describe: Callable[..., dict[str, np.ndarray]],
    labels: np.ndarray,
    class_ids: list[int],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    instances = find(labels, class_ids)
    return instances, describe(instances, labels)
