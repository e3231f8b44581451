"""Which image, which annotations, which backbone: combos that follow the viewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from magicgui.widgets import ComboBox
from napari.layers import Image, Labels
from qtpy.QtCore import QObject, Signal

from napari_convlora.widget.form import Form
from napari_convlora.widget.layers.class_colours import is_output

_FILE, _MEDSAM_FILE, _PLANES, _NEW = "\0file", "\0medsam file", "\0planes", "\0new"

# None cannot be chosen: magicgui takes it for no choice at all, and says nothing.
_MOST_CHANNELS = 64
"""Of an axis that may be chosen; a longer one is more likely a side of the image."""

_MEDSAM = "medsam:"
"""Before the path of a file: its pixels are normalised as MedSAM's."""

_DEFAULT = {"litemedsam": "LiteMedSAM (TinyViT, 256 px)"}


class SourceForm(QObject):
    """The choices at the top of the panel.

    Parameters
    ----------
    viewer
        Whose layers can be chosen.
    fits
        Whether a Labels layer can hold annotations of the chosen image.

    Signals
    -------
    image_chosen
        Another image or channel axis.
    annotations_chosen
        A Labels layer to use as annotations; None asks for a new one.
    file_asked
        The user wants to choose a checkpoint file; with what to put before its path.
    """

    image_chosen = Signal()
    annotations_chosen = Signal(object)
    file_asked = Signal(str)

    def __init__(
        self, viewer: Any, fits: Callable[[Labels], bool], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._viewer, self._fits = viewer, fits
        self._backbones = dict(_DEFAULT)
        self._files: dict[str, str] = {}
        self._last_backbone = "litemedsam"
        self._quiet = False
        self._axis_of_project: int | None = None
        self.image_combo = ComboBox(
            label="Image", choices=self._images, tooltip="The image to annotate and to predict."
        )
        self.channels_combo = ComboBox(
            label="Channels",
            choices=self._axes,
            tooltip="Which axis of the image holds channels rather than planes.",
        )
        self.annotations_combo = ComboBox(
            label="Annotations",
            choices=self._labels,
            tooltip="The Labels layer you paint on: 0 is unlabelled, 1 and up are classes.",
        )
        self.backbone_combo = ComboBox(
            label="Backbone",
            choices=self._backbone_choices,
            tooltip="The frozen Segment Anything model that is adapted.",
        )
        combos = [
            self.image_combo,
            self.channels_combo,
            self.annotations_combo,
            self.backbone_combo,
        ]
        self.native = Form(combos)
        for combo in combos:
            # A long layer name must not make the whole panel wide.
            combo.native.setMinimumContentsLength(8)
            combo.native.setSizeAdjustPolicy(
                combo.native.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
            )
        self.image_combo.changed.connect(self._on_image)
        self.channels_combo.changed.connect(self._on_axis)
        self.annotations_combo.changed.connect(self._on_annotations)
        self.backbone_combo.changed.connect(self._on_backbone)
        self.refresh()

    @property
    def image(self) -> Image | None:
        """The chosen image layer."""
        return self.image_combo.value

    @property
    def channel_axis(self) -> int | None:
        """The chosen channel axis; None if there are only planes."""
        axis = self.channels_combo.value
        return axis if isinstance(axis, int) else None

    @property
    def backbone(self) -> str:
        """Name or checkpoint path of the chosen backbone."""
        return self._last_backbone

    def refresh(self, annotations: Labels | None = None) -> None:
        """Follow the viewer's layers; show `annotations` as chosen."""
        before = self.image, self.channel_axis
        self._quiet = True
        try:
            self.image_combo.reset_choices()
            self.channels_combo.reset_choices()
            self._show_axes()
            self.annotations_combo.reset_choices()
            known = annotations in self.annotations_combo.choices
            self.annotations_combo.value = annotations if known else _NEW
        finally:
            self._quiet = False
        if before != (self.image, self.channel_axis):
            self.image_chosen.emit()

    def choose(self, image: Image, channel_axis: int | None) -> None:
        """Choose an image of the viewer."""
        self._axis_of_project = channel_axis
        self.refresh()
        self.image_combo.value = image
        self.channels_combo.value = _PLANES if channel_axis is None else channel_axis

    def set_backbones(self, titles: dict[str, str]) -> None:
        """Offer these backbones, by name, and files."""
        self._backbones = dict(titles) or dict(_DEFAULT)
        if self._last_backbone not in {**self._backbones, **self._files}:
            self._last_backbone = next(iter(self._backbones))
        self._show_backbone()

    def choose_backbone(self, name_or_path: str) -> None:
        """Choose a backbone by name, or a checkpoint by path, if need be with a name before it."""
        if name_or_path not in self._backbones:
            said = _MEDSAM if name_or_path.startswith(_MEDSAM) else ""
            self._files[name_or_path] = said + Path(name_or_path.removeprefix(said)).name
        self._last_backbone = name_or_path
        self._show_backbone()

    def _show_axes(self) -> None:
        self.native.show_row(self.channels_combo, len(self.channels_combo.choices) > 1)

    def _show_backbone(self) -> None:
        self._quiet = True
        try:
            self.backbone_combo.reset_choices()
            self.backbone_combo.value = self._last_backbone
        finally:
            self._quiet = False

    def _images(self, _: Any = None) -> list[tuple[str, Image]]:
        return [
            (layer.name, layer)
            for layer in self._viewer.layers
            if isinstance(layer, Image) and not is_output(layer)
        ]

    def _axes(self, _: Any = None) -> list[tuple[str, int | str]]:
        image = self.image
        choices: list[tuple[str, int | str]] = [("none, only planes", _PLANES)]
        if image is None or image.rgb or image.ndim < 3:
            return choices
        shape = (image.data[0] if image.multiscale else image.data).shape
        return choices + [
            (f"axis {a} ({n} channels)", a)
            for a, n in enumerate(shape)
            if n <= _MOST_CHANNELS or a == self._axis_of_project
        ]

    def _labels(self, _: Any = None) -> list[tuple[str, Labels | str]]:
        choices: list[tuple[str, Labels | str]] = [("new layer", _NEW)]
        if self.image is None:
            return choices
        return choices + [
            (layer.name, layer)
            for layer in self._viewer.layers
            if isinstance(layer, Labels) and not is_output(layer) and self._fits(layer)
        ]

    def _backbone_choices(self, _: Any = None) -> list[tuple[str, str]]:
        known = [(title, name) for name, title in {**self._backbones, **self._files}.items()]
        return [
            *known,
            ("checkpoint file…", _FILE),
            ("checkpoint file tuned from MedSAM…", _MEDSAM_FILE),
        ]

    def _on_image(self) -> None:
        if not self._quiet:
            self._quiet = True
            self.channels_combo.reset_choices()
            self._show_axes()
            self._quiet = False
            self.image_chosen.emit()

    def _on_axis(self) -> None:
        if not self._quiet:
            self.image_chosen.emit()

    def _on_annotations(self, layer: Any) -> None:
        if not self._quiet and layer is not None:
            self.annotations_chosen.emit(None if layer == _NEW else layer)

    def _on_backbone(self, name: Any) -> None:
        if self._quiet or name is None:
            return
        if name in (_FILE, _MEDSAM_FILE):
            self._show_backbone()  # until a file is really chosen
            self.file_asked.emit(_MEDSAM if name == _MEDSAM_FILE else "")
        else:
            self._last_backbone = name
