"""Imports of optional packages, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str = "models") -> Any:
    """Import and return `module` of the dependencies `extra`; ImportError with the command that installs them."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is installed, but one that it needs is not, which the original message names
        package = error.name.partition(".")[0]
        raise ImportError(f'{package} is not installed: pip install "semhitok[{extra}]"', name=package) from None
