"""The paper's questions, answered by commands; `foveate.experiments.cli` lists them."""

import os

__all__ = []

# How long PyTorch's threads spin for each other before they sleep (GNU OpenMP; it reads this when PyTorch is imported).
# Its own 300000 turns are milliseconds, which another program's thread then waits for the processor in vain: with both
# cores taken by two more trainings, commands took twice as long as with a tenth of it; alone they take as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
