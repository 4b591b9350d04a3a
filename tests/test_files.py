"""Files as they are written."""

import json

import pytest

from semhitok._files import write_json


def test_json_is_indented_and_ends_with_a_line_end(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": None, "ü": "é"})
    assert path.read_bytes() == b'{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null,\n  "\\u00fc": "\\u00e9"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] is None and list(tmp_path.iterdir()) == [path]
