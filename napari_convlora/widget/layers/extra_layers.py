"""Layers made from the prediction of one image, from which nothing is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from napari.layers import Image, Labels, Layer

from napari_convlora.config import ClassInfo
from napari_convlora.images.regions import Block
from napari_convlora.prediction.uncertain_places import Guide, Place
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.image_frame import ImageFrame
from napari_convlora.widget.layers.new_layer import placement

NOTHING_PREDICTED = "Nothing is predicted yet: press Adapt first, or load an adapter."
_MENDED = f"{class_colours.KEY} mended"
_LEAST_DISTANCE, _MOST_DISTANCE = 16, 64


class ExtraLayers:
    """Uncertainty, the prediction before the last round, and instances.

    Parameters
    ----------
    frame
        The image to which they belong.

    Attributes
    ----------
    scored
        Whether the uncertainty is known of the whole image; where it is not, it is 0.
    """

    def __init__(self, frame: ImageFrame) -> None:
        self._frame = frame
        self._name = frame.image.name
        self._layers: dict[str, Layer] = {}
        self.scored = False
        self._guide: Guide | None = None
        self._visited: list[Place] = []

    @property
    def uncertainty(self) -> np.ndarray | None:
        """(P, H, W) uint8 in per cent; None if it is not known, or its layer was removed."""
        layer = self._get("uncertainty")
        return None if layer is None else layer.data.reshape(self._frame.planes_shape)

    @property
    def instances(self) -> Labels | None:
        """The instances layer."""
        return self._get("instances")

    @property
    def companions(self) -> list[Layer]:
        """All layers in the viewer, instances that were mended and hidden among them."""
        tags = [self._tag(role) for role in ("previous", "uncertainty", "instances")]
        return [
            layer
            for layer in self._frame.viewer.layers
            if layer.metadata.get(class_colours.KEY) in tags
            and layer.data.shape == self._frame.shape
        ]

    def follow_name(self) -> None:
        """Take note that the image has another name, by which its layers are found."""
        layers, self._name = self.companions, self._frame.image.name
        for layer in layers:
            layer.metadata[class_colours.KEY]["image"] = self._name

    @property
    def previous(self) -> Labels | None:
        """The prediction before the last one."""
        return self._get("previous")

    @property
    def spacing(self) -> int:
        """Pixels between two places to look at."""
        side = min(self._frame.planes_shape[1:])
        return int(np.clip(side // 10, _LEAST_DISTANCE, _MOST_DISTANCE))

    @property
    def guide(self) -> Guide | None:
        """Where to look next; None if the uncertainty is not known."""
        uncertainty = self.uncertainty
        if self._guide is None and uncertainty is not None:
            self._guide = Guide(uncertainty, self.spacing)
            self._guide.visited.extend(self._visited)
        return self._guide if uncertainty is not None else None

    def show_uncertainty(self, uncertainty: np.ndarray | None) -> None:
        """Show (P, H, W) uint8 per cent as an image, hidden at first; None takes it away.

        Places that were visited are not suggested again.
        """
        layer = self._get("uncertainty")
        self._forget_guide()
        self.scored = uncertainty is not None
        if uncertainty is None:
            if layer is not None:
                self._frame.viewer.layers.remove(layer)
            return
        data = uncertainty.reshape(self._frame.shape)
        if layer is not None:
            layer.data = data
        else:
            self._add(
                "uncertainty",
                Image(
                    data,
                    colormap="inferno",
                    opacity=0.6,  # added up, it would be white on a bright image
                    contrast_limits=(0, 100),
                    visible=False,
                    **self._attributes("uncertainty"),
                ),
                above=self._frame.image,
            )

    def show_uncertain_parts(self, parts: Sequence[tuple[Block, np.ndarray]]) -> None:
        """Show per cent (h, w) of parts of a large image; the rest stays as it is."""
        if self.uncertainty is None:
            self.show_uncertainty(np.zeros(self._frame.planes_shape, np.uint8))
        self.scored = False
        self._forget_guide()
        layer = self._get("uncertainty")
        whole = layer.data.reshape(self._frame.planes_shape)
        for block, uncertainty in parts:
            whole[block.index] = uncertainty
        layer.refresh()

    def _forget_guide(self) -> None:
        if self._guide is not None:
            self._visited, self._guide = self._guide.visited, None

    def show_previous(self, labels: np.ndarray, classes: Sequence[ClassInfo]) -> None:
        """Have a prediction (P, H, W) that is to be compared with the next, hidden at first."""
        data = labels.astype(np.uint8).reshape(self._frame.shape)
        layer = self._get("previous")
        if layer is None:
            layer = Labels(data, visible=False, opacity=0.5, **self._attributes("previous"))
            self._add("previous", layer, above=self._frame.image)
        else:
            layer.data = data
        layer.editable = False  # a copy to look at; what is painted belongs on the other layers
        layer.colormap = class_colours.colormap(classes)
        layer.features = class_colours.features(classes)

    def show_instances(
        self, instances: np.ndarray, table: dict[str, np.ndarray], above: Layer | None = None
    ) -> str:
        """Show instances and their table as features of the layer.

        Parameters
        ----------
        instances : (P, H, W) int
            Numbers of the instances.
        table
            A column for every feature.
        above
            The layer over which they go; None: the image.

        Returns
        -------
        str
            Name of the layer there was before if the user has mended it: it is only hidden.
        """
        frame, mended = self._frame, ""
        # Instances are numbered anew, so the undo history of the old ones must not survive.
        layer = self._get("instances")
        if layer is not None and layer.metadata.get(_MENDED):
            layer.visible, mended = False, layer.name
        elif layer is not None:
            frame.viewer.layers.remove(layer)
        layer = Labels(
            instances.reshape(frame.shape),
            features=table,
            **self._attributes("instances"),
        )
        for event in (layer.events.paint, layer.events.data):
            event.connect(_on_mended)
        self._add("instances", layer, above=above or frame.image)
        return mended

    def put_away(self) -> None:
        """Take the layers away as another image takes this one's place.

        Instances may have been edited, and are in no project: they are only hidden.
        """
        for role in ("previous", "uncertainty"):
            layer = self._get(role)
            if layer is not None:
                self._frame.viewer.layers.remove(layer)
        for layer in self._frame.viewer.layers:
            if layer.metadata.get(class_colours.KEY) == self._tag("instances"):
                layer.visible = False

    def _get(self, role: str) -> Any:
        layers, shape = self._frame.viewer.layers, self._frame.shape
        if self._layers.get(role) in layers:
            return self._layers[role]
        # An earlier panel may have left one.
        tag = self._tag(role)
        alike = (layer for layer in layers if layer.metadata.get(class_colours.KEY) == tag)
        return next((layer for layer in alike if layer.data.shape == shape), None)

    def _tag(self, role: str) -> dict[str, str]:
        return {"role": role, "image": self._name}

    def _attributes(self, role: str) -> dict[str, Any]:
        frame = self._frame
        title = {"previous": "previous prediction"}.get(role, role)
        taken = any(layer.name == title for layer in frame.viewer.layers)
        return {
            "name": f"{title} of {frame.image.name}" if taken else title,
            "metadata": {class_colours.KEY: self._tag(role)},
            **placement(frame),
        }

    def _add(self, role: str, layer: Layer, above: Layer) -> None:
        layers = self._frame.viewer.layers
        active = layers.selection.active
        self._layers[role] = layer
        layers.insert(layers.index(above) + 1, layer)
        layers.selection.active = active  # the user may be painting on another layer


def _on_mended(event: Any) -> None:
    event.source.metadata[_MENDED] = True  # where another panel finds it
