"""The command line with a tiny random backbone and quick settings, to be run as a process."""

import sys

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.cli import parser, sources
from napari_convlora.config import TrainConfig
from napari_convlora.project import Settings
from napari_convlora.session import session
from tests.conftest import small_forests_here

QUICK = TrainConfig(views=4, detail_steps=15, score_every=2)

if __name__ == "__main__":
    small_forests_here()
    session.load_backbone = lambda name: random_backbone()
    sources.Settings = lambda: Settings(train=QUICK)
    sys.exit(parser.main(sys.argv[1:]))
