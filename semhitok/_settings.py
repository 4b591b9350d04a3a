"""Dataclasses as settings: filled strictly from nested dicts, changed by name=value, and every number in its range."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

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


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be: from `low` to `high`, with the ends that have a square bracket."""

    low: float
    high: float
    ends: str = "[]"

    def problem(self, value: float) -> str:
        """What is wrong with a number, or empty."""
        got = _shown.repr(value)  # an integer may have any number of digits
        if value != value:
            return f"expected a number from {self.low:g} to {self.high:g}, got {got}"
        if value < self.low or (self.ends[0] == "(" and value == self.low):
            return f"expected {'at least' if self.ends[0] == '[' else 'more than'} {self.low:g}, got {got}"
        if value > self.high or (self.ends[1] == ")" and value == self.high):
            return f"expected {'at most' if self.ends[1] == ']' else 'less than'} {self.high:g}, got {got}"
        return ""


Count = Annotated[int, Range(1, 10**9)]
Natural = Annotated[int, Range(0, 10**9)]
Size = Annotated[int, Range(1, 2**16)]  # of a layer, or in pixels
Index = Annotated[int, Range(-1000, 1000)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, "[)")]
Weight = Annotated[float, Range(0, 10**12)]
Positive = Annotated[float, Range(0, 10**12, "(]")]
# Processes that read data for each training process. "auto" lets the machine decide when a run begins, see
# `semhitok.training.workers`, and the run keeps the number.
Workers = Annotated[int, Range(0, 1024)] | Literal["auto"]


class Settings:
    """A dataclass whose numbers have ranges: the fields are annotated with one of the types above, or a `Range`.

    Raises:
        ValueError: a number is out of its range or of another type; the message names the field.
    """

    def __post_init__(self) -> None:
        for name, hint in _ranged(cast(Any, type(self))).items():
            _check(hint, getattr(self, name), name)


@functools.cache
def _ranged(cls: type) -> dict[str, Any]:
    """The fields of a class that hold numbers."""
    return {name: hint for name, hint in typing.get_type_hints(cls, include_extras=True).items() if ranges_of(hint)}


def ranges_of(hint: Any) -> list[Range]:
    """The ranges in an annotation, in order."""
    if typing.get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Range)]
    return [found for part in typing.get_args(hint) for found in ranges_of(part)]


def _check(hint: Any, value: Any, name: str) -> None:
    """ValueError if a number in a field, or in the tuple or list that it holds, is out of range."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is Annotated:
        kind, number = arguments[0], type(value) in (int, float)
        if not number or (kind is int and type(value) is not int):
            expected = "an integer" if kind is int else "a number"
            raise ValueError(f"{name}: expected {expected}, got {_shown.repr(value)}")
        for range_ in ranges_of(hint):
            if problem := range_.problem(value):
                raise ValueError(f"{name}: {problem}")
    elif origin in (typing.Union, types.UnionType):  # with None, or with a word
        words = [word for part in arguments[1:] for word in typing.get_args(part)]
        if not (value is None and type(None) in arguments) and value not in words:
            _check(arguments[0], value, name)
    elif origin is list:
        for n, item in enumerate(value):
            _check(arguments[0], item, f"{name}[{n}]")
    elif origin is tuple:
        for n, (part, item) in enumerate(zip(arguments, value, strict=True)):
            _check(part, item, f"{name}[{n}]")


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
        with _inside(".".join(parents)):
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
        elif default is None and value is None and field_.default is dataclasses.MISSING:
            raise ValueError(f"{where}: expected {name}, got none")
    with _inside(where):
        return cls(**values)


@contextlib.contextmanager
def _inside(where: str) -> Iterator[None]:
    """Errors that name a setting get the path of what it is in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


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
