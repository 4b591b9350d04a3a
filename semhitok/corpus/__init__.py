"""Corpora of ids on disk: encoding images into one, reading it, and ids files.

The names below are imported when they are first accessed: importing this package needs neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which cannot see what __getattr__ returns
    from semhitok.corpus.config import EncodingConfig
    from semhitok.corpus.encode import encode_corpus
    from semhitok.corpus.format import verify
    from semhitok.corpus.ids_file import load_codes, save_codes
    from semhitok.corpus.reader import EncodedCorpus

__all__ = ["EncodedCorpus", "EncodingConfig", "encode_corpus", "load_codes", "save_codes", "verify"]
_HOME = {
    "EncodedCorpus": "reader",
    "EncodingConfig": "config",
    "encode_corpus": "encode",
    "load_codes": "ids_file",
    "save_codes": "ids_file",
    "verify": "format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
