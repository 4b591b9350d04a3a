"""Staged training: the semantic branch, then the pixel branch on top of it, frozen."""

from semhitok.training.loop import Interrupted
from semhitok.training.run import train

__all__ = ["Interrupted", "train"]
