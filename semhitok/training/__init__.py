"""Staged training: the semantic branch, then the pixel branch on top of it, frozen; the decoder alone if asked."""

from semhitok.training.loop import Interrupted
from semhitok.training.run import train

__all__ = ["Interrupted", "train"]
