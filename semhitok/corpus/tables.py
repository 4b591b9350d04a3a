"""Parquet files as Hugging Face datasets writes them: `image` is struct{bytes, path} or the bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semhitok._optional import require
from semhitok.corpus.items import Item, Note
from semhitok.data.captions import NotText, caption_of, clean, escaped, first_caption, left_out
from semhitok.data.kinds import expand_braces

_KEYS = ("__key__", "key", "id")  # columns that are keys
_BINARY = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view", "is_null")
_ROWS = 16  # read at once


def parquet_files(name: str) -> list[str]:
    """The files of a pattern; FileNotFoundError if one does not exist."""
    found = expand_braces(name)
    for path in found:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such parquet file (URLs of parquet files are not read)")
    return found


def check_columns(path: str, caption: str | None) -> None:
    """ValueError unless a file has images and, if it is named, the column of captions. Damage is not reported here."""
    try:
        schema = require("pyarrow.parquet", "corpus").read_schema(path)
    except Exception:  # as in `read_table`, which reports it
        return
    _check(path, schema)
    if caption and caption not in schema.names:
        raise ValueError(f"{path}: expected a column {caption} of captions, got {_listed(schema.names)}")


def first_key(path: str) -> str | None:
    """The key of the first row; None if it has none of its own, or cannot be read."""
    try:
        with require("pyarrow.parquet", "corpus").ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [name for name in _KEYS if name in names] or ["image.path"]
            for batch in file.iter_batches(1, columns=columns, use_threads=False):
                row = {name: _value(batch.column(name)[0]) for name in batch.schema.names}
                found = [_key(row.get(name)) for name in _KEYS] + [_key((row.get("image") or {}).get("path"))]
                return next((key for key in found if key), None)
    except Exception:  # as in `read_table`, which reports it
        return None
    return None


def read_table(path: str, fields: Sequence[str], source: str = "") -> Iterator[Item | Note]:
    """The rows of a file, in order; a row group whose images cannot be read is an item with a problem.

    A row's key is in the column `__key__`, `key` or `id`, or else it is the image's path, or else the row's number.

    source: what is put before the number of a row; empty for the number alone.
    fields: columns that hold the caption; the first one that has one counts.
    """
    pq = require("pyarrow.parquet", "corpus")
    count = 0
    try:
        # Without a buffer, a whole row group would be in memory, often hundreds of MB.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _check(path, file.schema_arrow)
            keys, texts = ([name for name in wanted if name in names] for wanted in (_KEYS, fields))
            for group in range(file.num_row_groups):
                first, end = count, count + file.metadata.row_group(group).num_rows
                broken: dict[str, str] = {}
                while count < end:
                    columns = [c for c in dict.fromkeys(["image", *keys, *texts]) if c not in broken]
                    problem = ""
                    try:
                        for number, cells in enumerate(_cells(file, group, columns), start=first):
                            if number == count:  # others were given before a column turned out to be broken
                                row = dict(zip(columns, map(_value, cells), strict=True))
                                yield _row(path, number, row, keys, texts, source, broken)
                                count += 1
                        break
                    except Exception as error:  # pyarrow's errors are of many kinds
                        problem = f"{path}: cannot read rows {count} to {end - 1}: {_reason(error)}"
                    found = _broken(file, group, columns)  # here, where the error holds no memory any more
                    broken |= found
                    for column in found.keys() & set(keys):
                        yield Note(f"{path}: rows {count} to {end - 1} have no key: {found[column]}")
                    if not found:
                        yield Item("", path, problem=problem)
                        count = end
                count = end
    except Exception as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        yield Item("", path, problem=f"{path}: cannot read the file after {count} rows: {reason}")


def _cells(file: Any, group: int, columns: Sequence[str]) -> Iterator[list[Any]]:
    """The cells of each row of a row group."""
    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
        for n in range(batch.num_rows):
            yield [column[n] for column in batch.columns]


def _broken(file: Any, group: int, columns: Sequence[str]) -> dict[str, str]:
    """The columns of a row group that cannot be read, with the reason: text that is stored once for many rows, say.

    Empty if the first column, that of the images, is one: the others do not matter then, and reading them takes memory.
    """
    found: dict[str, str] = {}
    for column in columns:
        try:
            for _ in _cells(file, group, [column]):
                pass
        except Exception as error:  # as in `read_table`
            found[column] = f"cannot read column {column}: {_reason(error)}"
        if found and column == columns[0]:
            return {}
    return found


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check(path: str, schema: Any) -> None:
    """ValueError unless there is a column of images."""
    pa = require("pyarrow", "corpus")
    if "image" not in schema.names:
        raise ValueError(f"{path}: expected a column image (struct with bytes, or binary), got {_listed(schema.names)}")
    found = kind = schema.field("image").type
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(getattr(pa.types, name)(kind) for name in _BINARY if hasattr(pa.types, name)):
        raise ValueError(f"{path}: expected column image as a struct with bytes, or binary, got {found}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _value(scalar: Any) -> Any:
    """A cell as Python has it; `NotText` for what is declared to be text and is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if hasattr(scalar, "as_buffer"):
            return NotText(scalar.as_buffer().to_pybytes())
        if hasattr(scalar, "keys"):  # a struct
            return {name: _value(scalar[name]) for name in scalar}
        inner = scalar.values if hasattr(scalar, "values") else None
        return _value(scalar.value) if inner is None else [_value(item) for item in inner]


def _row(
    path: str,
    number: int,
    row: dict[str, Any],
    keys: Sequence[str],
    texts: Sequence[str],
    source: str,
    broken: Mapping[str, str],
) -> Item:
    image = row["image"]
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    found = [_key(row[column]) for column in keys if column not in broken]
    if not keys:  # the path is a key only where no column is
        found = [_key(name)]
    key = next((text for text in found if text), "")
    if not key:
        # Where other rows have keys, the number of this one may be the key of another.
        source = source or (escaped(os.path.basename(path)) if keys else "")
        key = f"{source}/{number}" if source else str(number)
    problem = "" if isinstance(data, bytes) and data else f"{path}: row {number}: no image in it"
    if problem and name:
        problem += f", only the name {_key(name)}"
    caption = first_caption(left_out(broken[x]) if x in broken else caption_of(row[x]) for x in texts)
    return Item(key, f"{path}: row {number}", data or b"", caption=caption, problem=problem)


def _key(value: Any) -> str:
    """A key as text; empty if there is none."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, NotText):
        value = value.data
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return clean(escaped(value)) if isinstance(value, str) else str(value)
