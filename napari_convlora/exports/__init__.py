"""What the user takes away: masks, objects, measurements, histories; nothing is read back."""

from napari_convlora.exports.instances import Splitting, find_instances, save_instances
from napari_convlora.exports.measurements import region_table

__all__ = ["Splitting", "find_instances", "region_table", "save_instances"]
