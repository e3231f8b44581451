"""Run the command line as ``python -m napari_convlora``."""

import sys

from napari_convlora.cli.parser import main

sys.exit(main())
