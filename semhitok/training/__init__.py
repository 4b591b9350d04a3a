"""Staged training: the semantic branch, then the pixel branch on top of it; optionally the decoder alone."""

from semhitok.training.loop import Interrupted
from semhitok.training.run import train

__all__ = ["Interrupted", "train"]
