"""Run the command line as ``python -m napari_convlora``."""

import sys

from napari_convlora.cli import main

sys.exit(main())
