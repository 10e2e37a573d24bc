"""The paper's questions, answered by commands; `foveate.experiments.cli` lists them."""

__all__ = []
