"""SemHiTok: a unified image tokenizer with a semantic-guided hierarchical codebook.

Every patch gets a semantic code i, then a pixel sub-code j inside the sub-codebook that i owns: one flat id i * m + j.
Importing this package needs torch alone; the classes below bring in the rest when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the compiled module resolves its symbols through it)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"semhitok's compiled ops could not be loaded ({error}): build them with `pip install -e .` in the repository"
    ) from error

from . import ops

if TYPE_CHECKING:
    from .config import SemHiTokConfig
    from .quantizer import HierarchicalQuantizer, SemanticQuantizer
    from .tokenizer import SemHiTok
    from .vocabulary import Vocabulary

__version__: str = _C.build_info()["version"]
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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
