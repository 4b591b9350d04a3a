"""What a source's name stands for: the one table that all readers of sources use."""

from __future__ import annotations

import os
import re

from semhitok._optional import require

JSONL = "JSONL file"
IDS_FILE = "ids file"
PARQUET = "parquet file"
SHARDS = "webdataset shards"
FOLDER = "folder"  # of images, or a corpus of ids
IMAGE = "image file"  # any other file: an image may have any name

# The first that matches the name, in lower case, counts. What none matches is looked at by `kind_of`.
_SUFFIXES = {
    r"\.jsonl": JSONL,
    r"\.safetensors": IDS_FILE,
    r"\.parquet": PARQUET,
    r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz)": SHARDS,
}
_URL = re.compile(r"(pipe|file):|[a-z][a-z0-9+.-]*://")


def kind_of(name: str) -> str:
    """The kind of a source, one of the names above.

    Without one of the suffixes, URLs and patterns with braces are shards. An existing file may have braces in its name.
    """
    for suffix, kind in _SUFFIXES.items():
        if re.search(f"({suffix})$", name.lower()):
            return kind
    if is_url(name) or ("{" in name and not os.path.exists(name)):
        return SHARDS
    return FOLDER if os.path.isdir(name) else IMAGE


def is_url(name: str) -> bool:
    """Whether `name` is a URL or a command (pipe:...), and no path."""
    return bool(_URL.match(name))


def expand_braces(name: str) -> list[str]:
    """The names that a pattern such as "{000..123}.tar" stands for; an existing file's name stands for itself.

    Raises:
        ValueError: unbalanced braces.
        ImportError: braceexpand (of webdataset) is not installed.
    """
    if not is_url(name) and os.path.exists(name):
        return [name]
    return list(require("braceexpand", "train").braceexpand(name))
