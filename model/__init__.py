"""What is believed: gazes, patches, the deep belief network, clutter, and the Pyro program that joins them."""

from foveate.model import gaze
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates, extract, normalise
from foveate.model.rbm import BernoulliRBM, GaussianRBM

__all__ = [
    "AttentionModel",
    "BernoulliRBM",
    "ClutterModel",
    "DeepBeliefNet",
    "EllipticalDensity",
    "GaussianRBM",
    "InputError",
    "Pyramid",
    "density_coordinates",
    "extract",
    "gaze",
    "normalise",
]
