"""The paper's questions, answered by commands; `foveate.experiments.cli` lists them."""

import os

__all__ = []

# How long PyTorch's threads spin for each other before they sleep (GNU OpenMP; it reads this when PyTorch is imported).
# Its own 300000 turns are long enough to keep another program's thread from the processor: with both cores taken by two
# more trainings, a training's parts took about twice as long as with a tenth of it; alone as long, as far as was seen.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
