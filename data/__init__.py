"""Where scenes come from: folders, published collections of faces, and faces composed into photographs."""

from foveate.data.compose import (
    TwoFaceScenes,
    compose_scenes,
    orl_clutter,
    orl_scenes,
    photographs,
    two_face_scenes,
)
from foveate.data.faces import caltech_faces, lfw, multi_pie, orl_faces, webfaces
from foveate.data.joining import in_one_convention, label_difference
from foveate.data.scenes import Scene, Scenes, UnlabelledScene, UnlabelledScenes

__all__ = [
    "Scene",
    "Scenes",
    "TwoFaceScenes",
    "UnlabelledScene",
    "UnlabelledScenes",
    "caltech_faces",
    "compose_scenes",
    "in_one_convention",
    "label_difference",
    "lfw",
    "multi_pie",
    "orl_clutter",
    "orl_faces",
    "orl_scenes",
    "photographs",
    "two_face_scenes",
    "webfaces",
]
