"""Texts that come with images: bytes, JSON and columns become clean text, or a reason why there is none.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. What is invalid in it, a byte or half a surrogate pair,
becomes U+FFFD, and the caption is reported as repaired. A caption that cannot be used is a note and no error: it does
not cost the image.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FIELDS = ("caption", "text")  # columns and fields that are captions, if no name is given
MAX_TEXT = 2**24  # bytes of a text or JSON file
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_INVALID = re.compile("[\ud800-\udfff\0]")
_INVALID_ESCAPE = re.compile(r"\\u(d[89a-f]|0000)", re.IGNORECASE)  # an escape in JSON that may be one of these
_LONG_NUMBER = 4000  # digits; Python refuses to convert more than 4300


class Caption(NamedTuple):
    """The caption of an image.

    text: the caption, clean, or None.
    notes: what was done to it, or why there is none, for the user.
    listed: it is the first of several.
    repaired: U+FFFD stands for what was invalid in it.
    left_out: something that should be a caption could not be used.
    lacking: there was JSON, but without the fields asked for.
    """

    text: str | None = None
    notes: tuple[str, ...] = ()
    listed: bool = False
    repaired: bool = False
    left_out: bool = False
    lacking: bool = False

    def but(self, *others: Caption) -> Caption:
        """This caption, with what is to be said of others that came before it."""
        notes = tuple(note for other in others for note in other.notes) + self.notes
        left_out, lacking = (any(getattr(c, name) for c in (self, *others)) for name in ("left_out", "lacking"))
        return self._replace(notes=notes, left_out=left_out, lacking=lacking)


def left_out(reason: str) -> Caption:
    """No caption, because the one that there is cannot be used."""
    return Caption(notes=(f"caption left out: {reason}",), left_out=True)


@dataclass(frozen=True)
class NotText:
    """The bytes of a value that is declared to be text but is not UTF-8."""

    data: bytes


def escaped(name: str) -> str:
    """A name as text that every file can hold: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decode_text(data: bytes) -> str:
    """The text of a file, see the module; without its byte order mark, and with U+FFFD for what is invalid."""
    mark, encoding = next((found for found in _MARKS if data.startswith(found[0])), (b"", "utf-8"))
    return data[len(mark) :].decode(encoding, "replace")


def parse_json(data: bytes, name: str = "") -> Any:
    """The value of a JSON file or line, whose strings are clean text.

    Raises:
        ValueError: not JSON, or nested too deeply; the message begins with `name` and says why.
    """
    where = f"{name}: " if name else ""
    text = decode_text(data)
    try:
        value = json.loads(text, parse_int=_integer, strict=False, object_pairs_hook=_once)
        return clean(value) if _INVALID_ESCAPE.search(text) or "\0" in text else value
    except RecursionError:
        raise ValueError(f"{where}not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError if it has a key twice: nobody knows which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"expected each key once, got {key!r:.80} twice")
            seen.add(key)
    return found


def clean(value: Any) -> Any:
    """`value` with U+FFFD for surrogates and NUL in all of its strings, however deep they are."""
    if isinstance(value, str):
        return _INVALID.sub("\ufffd", value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def caption_of(value: Any) -> Caption:
    """The caption that a column or a field holds: text, bytes, or the first usable one of a list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for null
        return Caption()
    if isinstance(value, list):
        found = [left_out("expected text, got a list") if isinstance(i, list) else caption_of(i) for i in value]
        return first_caption(found)._replace(listed=len(value) > 1 and any(caption.text for caption in found))
    if isinstance(value, NotText):
        return left_out(f"expected UTF-8 text, got {value.data[:40]!r}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = decode_text(bytes(value))
    if not isinstance(value, str):
        return left_out(f"expected text, got {type(value).__name__}")
    text = _INVALID.sub("\ufffd", value.strip("\0"))
    if not text.strip():
        return Caption()
    if "\ufffd" in text:
        return Caption(text, ("caption repaired: invalid text became U+FFFD",), repaired=True)
    return Caption(text)


def first_caption(captions: Iterable[Caption]) -> Caption:
    """The first caption that has text, with the notes of those before it; otherwise none, with all notes."""
    before: list[Caption] = []
    for caption in captions:
        if caption.text:
            return caption.but(*before)
        before.append(caption)
    return Caption().but(*before)


def text_caption(data: bytes) -> Caption:
    """The caption that is the content of a text file, stripped."""
    if len(data) > MAX_TEXT:
        return left_out(f"expected at most {MAX_TEXT} bytes, got more")
    found = caption_of(data)
    return found._replace(text=found.text and found.text.strip())


def json_caption(data: bytes, fields: Sequence[str]) -> Caption:
    """The caption in a JSON file, see `value_caption`."""
    try:
        return value_caption(parse_json(data), fields)
    except ValueError as error:
        return left_out(str(error))


def value_caption(content: Any, fields: Sequence[str]) -> Caption:
    """The caption in the content of a JSON file: the first of `fields` that has one, or the text or list it holds."""
    if isinstance(content, str) or (isinstance(content, list) and any(isinstance(item, str) for item in content)):
        return caption_of(content)
    if not isinstance(content, dict):
        return Caption(lacking=True)  # boxes, for example
    found = first_caption(caption_of(content.get(field)) for field in fields)
    return found._replace(lacking=not any(field in content for field in fields))


def sample_caption(texts: Sequence[tuple[str, bytes]], fields: Sequence[str] = FIELDS) -> Caption:
    """The caption among a sample's (suffix, content): that of its JSON, or else of its text file."""
    order = sorted(texts, key=lambda item: (not item[0].endswith("json"), item[0].count("."), item[0]))
    return first_caption(
        json_caption(data, fields) if suffix.endswith("json") else text_caption(data) for suffix, data in order
    )


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _LONG_NUMBER else float(digits)
