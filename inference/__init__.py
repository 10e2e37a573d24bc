"""How it is computed: the guide, the samplers, attention to pictures, learning, and what is kept of it."""

from foveate.inference.ais import exact_log_z, log_z
from foveate.inference.attend import attend, attend_batches
from foveate.inference.checkpoint import Run, load, save
from foveate.inference.evaluate import evaluate
from foveate.inference.fit import fit
from foveate.inference.guide import GazeGuide
from foveate.inference.hmc import BatchedHMC, sample_batch
from foveate.inference.learn import learn
from foveate.inference.posterior import Posterior
from foveate.inference.potential import GazePotential

__all__ = [
    "BatchedHMC",
    "GazeGuide",
    "GazePotential",
    "Posterior",
    "Run",
    "attend",
    "attend_batches",
    "evaluate",
    "exact_log_z",
    "fit",
    "learn",
    "load",
    "log_z",
    "sample_batch",
    "save",
]
