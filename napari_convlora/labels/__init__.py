"""What integers of a label image mean: classes, annotations, reviewed regions; no model."""

from napari_convlora.labels.annotations import (
    LabelledImage,
    check_annotations,
    check_images,
    known_only,
    merge_corrections,
    protect,
)
from napari_convlora.labels.classes import (
    DEFAULT_COLOURS,
    default_classes,
    find_background,
    parse_classes,
    read_classes,
    write_classes,
)

__all__ = [
    "DEFAULT_COLOURS",
    "LabelledImage",
    "check_annotations",
    "check_images",
    "default_classes",
    "find_background",
    "known_only",
    "merge_corrections",
    "parse_classes",
    "protect",
    "read_classes",
    "write_classes",
]
