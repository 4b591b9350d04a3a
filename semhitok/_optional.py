"""Optional packages and files that they ship, with an error that says what to install."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any


def require(module: str, extra: str = "models") -> Any:
    """Import and return `module` of the dependencies `extra`; ImportError with the command that installs them."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is installed, but one that it needs is not, which the original message names
        package = error.name.partition(".")[0]
        raise _missing(package, extra) from None


def packaged_file(package: str, name: str, sha256: str, extra: str) -> bytes:
    """The bytes of file `name` in the folder of an installed package, which is not imported: that would run its code.

    Raises:
        ImportError: the package is not installed.
        OSError: the file cannot be read, or its SHA-256 differs.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, extra)
    path = Path(spec.submodule_search_locations[0]) / name
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise OSError(f"{path}: expected SHA-256 {sha256[:12]}, got {found[:12]}")
    return data


def _missing(package: str, extra: str) -> ImportError:
    return ImportError(f'{package} is not installed: pip install "semhitok[{extra}]"', name=package)
