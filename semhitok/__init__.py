"""SemHiTok: a unified image tokenizer with a semantic-guided hierarchical codebook.

Each patch gets a semantic code i and a pixel sub-code j from the sub-codebook that i owns: one flat id i * m + j.

Importing this package needs only torch, and registers `torch.ops.semhitok.*`. The classes below, and the optional
libraries they use, are imported when they are first accessed.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which cannot see what __getattr__ returns
    from . import ops
    from .config import SemHiTokConfig
    from .quantizer import HierarchicalQuantizer, SemanticQuantizer
    from .tokenizer import SemHiTok
    from .vocabulary import Vocabulary

__version__ = "0.1.0"
__all__ = [
    "HierarchicalQuantizer",
    "SemHiTok",
    "SemHiTokConfig",
    "SemanticQuantizer",
    "Vocabulary",
    "__version__",
    "ops",
]

_HOME = {
    "SemHiTok": "tokenizer",
    "SemHiTokConfig": "config",
    "SemanticQuantizer": "quantizer",
    "HierarchicalQuantizer": "quantizer",
    "Vocabulary": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _is_command() -> bool:
    """Whether this process is `semhitok ...` or `python -m semhitok ...`. If in doubt, it is not.

    A command must be able to print its help without importing torch, which takes seconds. It loads the ops with the
    first module that uses them, as all of these import `semhitok.ops`.
    """
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":  # Python is still looking for the module; its name precedes the arguments on the command line
        return sys.orig_argv[-len(argv) :][:1] == ["semhitok"]
    # The script that pip installed, which is beside the interpreter that runs it.
    folder, name = os.path.split(os.path.realpath(argv[0]))
    return name in ("semhitok", "semhitok.exe") and folder == os.path.realpath(os.path.dirname(sys.executable))


if not _is_command():
    from . import ops
