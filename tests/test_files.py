"""Files as they are written."""

import json

import pytest

from semhitok._files import parse_json, read_object, write_json


def test_json_is_indented_and_ends_with_a_line_end(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": None, "ü": "é"})
    assert path.read_bytes() == b'{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null,\n  "\\u00fc": "\\u00e9"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] is None and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", [b"{", b"\xff{}", b"[" * 3000 + b"]" * 3000, b'{"a": ' * 3000, b"[1]", b"9" * 5000])
def test_what_is_no_json_object_is_refused_by_name(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json: expected (JSON, got|a JSON object, got list)"):
        read_object(path)


def test_nested_values_are_read_or_are_a_value_error():
    assert parse_json('{"a": [[1]]}') == {"a": [[1]]}
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 3000 + "]" * 3000)
