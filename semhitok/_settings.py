"""Dataclasses as settings: filled strictly from nested dicts, and changed by name=value."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from semhitok._optional import require

T = TypeVar("T")
_MAX_VALUES = 100_000  # in a YAML file

_shown = reprlib.Repr()  # for messages: a value from a file may be of any size
_shown.maxstring = _shown.maxother = _shown.maxlong = 100


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; tags that stand for Python objects are refused.

    Raises:
        ValueError: not YAML, or a value that aliases make too large; the message names the file.
        OSError: the file cannot be read.
    """
    text = path.read_bytes()
    try:
        data = require("yaml").safe_load(text)
    except ImportError:
        raise
    except Exception as error:  # a value that is none, such as a 13th month, raises one of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not YAML: {reason}") from None
    waiting, count = [data], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _MAX_VALUES:  # by aliases, or it contains itself: a copy of it would fill the memory
            raise ValueError(f"{path}: expected at most {_MAX_VALUES} values, got more")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return data


# Processes that read data for each training process. "auto" lets the machine decide when a run begins, see
# `semhitok.training.workers`, and the run keeps the number.
Workers = int | Literal["auto"]


def override(config: Any, assignment: str) -> None:
    """Set one field by a dotted path, such as `pixel.optimizer.lr=1e-3`; the value is YAML.

    Raises:
        ValueError: no such setting, or a value of a wrong type or out of range.
    """
    path, separator, text = assignment.partition("=")
    if not separator:
        raise ValueError(f"override: expected name=value, got {assignment!r}")
    *parents, name = path.strip().split(".")
    target = config
    for parent in parents:
        target = getattr(target, parent, None)
    hints = typing.get_type_hints(type(target)) if dataclasses.is_dataclass(target) else {}
    if name not in hints:
        raise ValueError(f"override: no such setting {path.strip()!r}")
    setattr(target, name, _convert(hints[name], require("yaml").safe_load(text), path.strip()))
    if hasattr(target, "__post_init__"):
        target.__post_init__()


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config", default: T | None = None) -> T:
    """Build a dataclass from nested dicts.

    Args:
        cls: the dataclass.
        data: settings by name.
        where: the path of `data`, for messages of errors.
        default: gives the values of missing keys; None leaves them to the defaults of `cls`.

    Raises:
        ValueError: an unknown key, a value of a wrong type or out of range.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {_shown.repr(data)}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints), key=str)
    if unknown:
        raise ValueError(f"{where}: unknown key {_shown.repr(unknown[0])}; expected {', '.join(hints)}")
    values: dict[str, Any] = {}
    for field_ in dataclasses.fields(typing.cast(Any, cls)):
        name = field_.name
        value = None
        if default is not None:
            value = values[name] = getattr(default, name)
        elif field_.default_factory is not dataclasses.MISSING:
            value = field_.default_factory()
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}", value)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """`value` as the annotated type `hint`, or ValueError. `default` gives what a dict leaves out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None else _convert(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):  # of a type and words that stand for a value of it
        words = typing.get_args(arguments[1])
        if isinstance(value, str) and value not in words:
            raise ValueError(f"{where}: expected {' or '.join([arguments[0].__name__, *words])}, got {value!r}")
        return value if isinstance(value, str) else _convert(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where, default)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {_shown.repr(value)}")
        return [_convert(arguments[0], v, f"{where}[{n}]") for n, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {_shown.repr(value)}")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads "1e-3" (no dot) as text
            return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {expected.__name__}, got {_shown.repr(value)}")
    return value


def check_workers(workers: Workers) -> None:
    """Raise ValueError unless `workers` is "auto" or a number of at least 0."""
    if workers != "auto" and (isinstance(workers, str) or workers < 0):
        raise ValueError(f"data.workers: expected auto or at least 0, got {workers!r}")
