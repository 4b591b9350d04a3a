"""Captions: whatever a text file, JSON or a column holds becomes clean text, or nothing with a reason."""

import codecs
import json

import pytest

from semhitok.data.captions import NotText, caption_of, parse_json, sample_caption, text_caption


@pytest.mark.parametrize(
    "data, text, repaired",
    [
        ("héllo\n".encode(), "héllo", False),
        (codecs.BOM_UTF8 + b"a", "a", False),
        (codecs.BOM_UTF16_LE + "aé".encode("utf-16-le"), "aé", False),
        (codecs.BOM_UTF16_BE + "aé".encode("utf-16-be"), "aé", False),
        (codecs.BOM_UTF32_LE + "a".encode("utf-32-le"), "a", False),
        (b"caf\xe9", "caf\ufffd", True),
        (b"padded\0\0", "padded", False),
        (b"a\0b", "a\ufffdb", True),
        (b" \n", None, False),
        (b"", None, False),
    ],
)
def test_text_files(data, text, repaired):
    caption = text_caption(data)
    assert (caption.text, caption.repaired) == (text, repaired) and bool(caption.notes) == repaired


@pytest.mark.parametrize(
    "content, text, words",
    [
        ('{"caption": "nice \\ud83d"}', "nice \ufffd", "repaired"),
        ('{"caption": "nice \\ud83d\\ude00"}', "nice \U0001f600", ""),
        ('{"caption": "a", "caption": "b"}', None, "expected each key once, got 'caption' twice"),
        ('{"caption": "a", "size": NaN, "n": %s}' % ("9" * 5000), "a", ""),
        ('{"caption": null, "text": "a"}', "a", ""),
        ('{"caption": 7, "text": "a"}', "a", "expected text, got int"),
        ('{"caption": ["", "a", "b"]}', "a", ""),
        ('{"caption": [["a"]]}', None, "expected text, got a list"),
        ('{"caption": {"a": 1}}', None, "expected text, got dict"),
        ('"a"', "a", ""),
        ('["a", "b"]', "a", ""),
        ('[{"box": 1}]', None, ""),
        ('{"other": 1}', None, ""),
        ("{broken", None, "not JSON"),
        ("[" * 100_000, None, "nested too deeply"),
        ('{"caption": "two\nlines"}', "two\nlines", ""),
    ],
)
def test_json_files(content, text, words):
    caption = sample_caption([("json", content.encode())])
    assert caption.text == text
    assert words in " ".join(caption.notes) and bool(words) == bool(caption.notes)
    assert caption.left_out == ("left out" in " ".join(caption.notes))
    json.dumps(caption).encode()


def test_the_json_comes_first_and_the_text_file_replaces_a_bad_one():
    texts = [("txt", b"text"), ("json", b'{"caption": "json"}')]
    assert sample_caption(texts).text == "json"
    assert sample_caption(texts, ("other",)).text == "text" and sample_caption(texts, ("other",)).lacking
    bad = sample_caption([("txt", b"text"), ("json", b"{")])
    assert bad.text == "text" and bad.left_out


@pytest.mark.parametrize(
    "value, text, listed, left_out",
    [
        (None, None, False, False),
        (float("nan"), None, False, False),
        ("a", "a", False, False),
        (b"a", "a", False, False),
        (["a", "b"], "a", True, False),
        (["a"], "a", False, False),
        ([None, b"b"], "b", True, False),
        ([], None, False, False),
        (NotText(b"\xff"), None, False, True),
        ([NotText(b"\xff"), "a"], "a", True, True),
        (1.5, None, False, True),
    ],
)
def test_columns(value, text, listed, left_out):
    caption = caption_of(value)
    assert (caption.text, caption.listed, caption.left_out) == (text, listed, left_out)


def test_all_strings_of_json_are_clean():
    found = parse_json(b'{"a": ["\\ud800", {"b\\udfff": "\\u0000"}], "c": 1}')
    assert found == {"a": ["\ufffd", {"b\ufffd": "\ufffd"}], "c": 1}
    with pytest.raises(ValueError, match=r"^x: not JSON"):
        parse_json(b"", "x")


def test_a_key_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="x: not JSON: expected each key once, got 'caption' twice"):
        parse_json(b'{"id": 1, "caption": "a dog", "caption": "a cat"}', "x")
    assert sample_caption(((".json", b'{"caption": "a dog", "caption": "a cat"}'),), ("caption",)).left_out
