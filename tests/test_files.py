"""The helpers that many files share: JSON as it is written, text as it is printed, tensors put together."""

import json

import pytest
import torch

from semhitok._files import printable, write_json
from semhitok.distributed import whole_tensor


def test_json_is_indented_and_ends_with_a_line_end(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": None, "ü": "é"})
    assert path.read_bytes() == b'{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null,\n  "\\u00fc": "\\u00e9"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] is None and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b é", "a b é"), ("a\nb\t\x1b[31m", "a\\nb\\t\\x1b[31m"), ("\udcff\u2028", "\\udcff\\u2028"), ("", "")],
)
def test_printed_text_is_one_line_without_tricks(text, shown):
    assert printable(text) == shown


def test_a_tensor_that_is_whole_is_itself():
    class Sharded:
        def full_tensor(self):
            return tensor

    tensor = torch.ones(2)
    assert whole_tensor(tensor) is tensor and whole_tensor(Sharded()) is tensor
