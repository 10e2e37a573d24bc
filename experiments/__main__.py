"""``python -m foveate.experiments`` is the command `foveate`."""

import sys

from foveate.experiments.cli import main

sys.exit(main())
