"""The command line with a tiny random backbone and quick settings, to be run as a process."""

import sys

from napari_convlora import cli, project_commands, session
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.project import Settings

QUICK = TrainConfig(views=4, detail_steps=15, score_every=2)

if __name__ == "__main__":
    session.load_backbone = lambda name: random_backbone()
    project_commands.Settings = lambda: Settings(train=QUICK)
    sys.exit(cli.main(sys.argv[1:]))
