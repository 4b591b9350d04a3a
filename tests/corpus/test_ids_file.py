"""Ids files: round trips, and every way of damaging one."""

import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from semhitok.corpus.ids_file import load_codes, save_codes
from semhitok.vocabulary import Vocabulary

HASH = "0123456789abcdef" * 4
VOCABULARY = Vocabulary(256, 8, codebook_hash=HASH)
NAMES = ["a/b.png", 'ä\U0001f600 ".jpg']


def random_codes(shape=(2, 3, 4)):
    return torch.randint(0, 2048, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_codes(path, random_codes(), NAMES, VOCABULARY)
    return path


def write(path, codes=None, **metadata):
    """An ids file with some metadata changed, or left out where None."""
    fields = {
        "format": "semhitok-codes",
        "version": "1",
        "shape": "[2, 3, 4]",
        "num_codes": "256",
        "num_sub_codes": "8",
        "codebook_hash": HASH,
        "names": '["a", "b"]',
        **metadata,
    }
    tensors = codes if isinstance(codes, dict) else {"codes": random_codes().int()}
    if isinstance(codes, torch.Tensor):
        tensors = {"codes": codes}
    fields = {key: value for key, value in fields.items() if value is not None}
    path.write_bytes(safetensors.torch.save(tensors, fields))


def test_round_trip(path):
    file = load_codes(path)
    assert file.codes.dtype == torch.int64
    assert torch.equal(file.codes, random_codes())
    assert file.names == NAMES
    assert file.vocabulary == VOCABULARY
    assert os.listdir(path.parent) == [path.name]


def test_round_trip_of_sizes(tmp_path):
    uneven = Vocabulary(4, 3, codebook_hash=HASH, offsets=(0, 1, 6, 8, 12))
    path, codes = tmp_path / "ids.safetensors", random_codes() % 12
    save_codes(path, codes, NAMES, uneven)
    file = load_codes(path)
    assert torch.equal(file.codes, codes) and file.vocabulary == uneven
    sizes = {"num_codes": "4", "num_sub_codes": "3"}
    for offsets in (torch.tensor([0, 1, 6, 12]), torch.tensor([0, 1, 6, 8, 12]).int(), torch.arange(5)):
        write(path, {"codes": codes.int(), "offsets": offsets}, **sizes)
        with pytest.raises(ValueError, match="offsets: expected"):
            load_codes(path)


def test_same_ids_same_bytes(path, tmp_path):
    again = tmp_path / "again.safetensors"
    for _ in range(8):
        save_codes(again, random_codes(), NAMES, VOCABULARY)
        assert again.read_bytes() == path.read_bytes()


def test_names_that_are_not_unicode_survive(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), "line\nend"]
    save_codes(tmp_path / "x.safetensors", random_codes(), names, VOCABULARY)
    assert load_codes(tmp_path / "x.safetensors").names == names


def test_no_images(tmp_path):
    save_codes(tmp_path / "x.safetensors", random_codes((0, 3, 4)), [], VOCABULARY)
    assert load_codes(tmp_path / "x.safetensors").codes.shape == (0, 3, 4)


@pytest.mark.parametrize(("num_codes", "dtype"), [(2**31, torch.int32), (2**31 + 1, torch.int64), (256, torch.int32)])
def test_smallest_dtype_that_holds_the_vocabulary(tmp_path, num_codes, dtype):
    codes = torch.full((1, 1, 2), num_codes - 1)
    path = tmp_path / "x.safetensors"
    save_codes(path, codes, ["x"], Vocabulary(num_codes, 1, codebook_hash=HASH))
    assert safetensors.torch.load_file(path)["codes"].dtype == dtype
    assert torch.equal(load_codes(path).codes, codes)


@pytest.mark.parametrize(
    ("codes", "names", "vocabulary", "words"),
    [
        (random_codes((3, 4)), ["x"], VOCABULARY, r"codes: expected \[N, h, w\]"),
        (random_codes(), ["x"], VOCABULARY, "names: expected 2"),
        (random_codes(), NAMES, Vocabulary(256, 8), "codebook_hash"),
        (random_codes() + 2048, NAMES, VOCABULARY, r"codes: expected ids in \[0, 2048\)"),
        (random_codes().float(), NAMES, VOCABULARY, "codes: expected integers"),
    ],
)
def test_bad_codes_are_not_saved(tmp_path, codes, names, vocabulary, words):
    with pytest.raises(ValueError, match=words):
        save_codes(tmp_path / "x.safetensors", codes, names, vocabulary)
    assert not os.listdir(tmp_path)


def assert_refused(path):
    """Loading raises ValueError in one line that names the file."""
    with pytest.raises(ValueError) as error:
        load_codes(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": None}, "not an ids file"),
        ({"format": "pt"}, "not an ids file"),
        ({"version": None}, "no version"),
        ({"version": "2"}, "version: expected 1, got 2"),
        ({"shape": "[2, 3, 5]"}, "shape"),
        ({"shape": "[2, 3"}, "shape: expected JSON"),
        ({"num_codes": None}, "no num_codes"),
        ({"num_codes": "-1"}, "num_codes"),
        ({"num_codes": "0"}, "num_codes"),
        ({"num_codes": "9" * 18, "num_sub_codes": "9" * 18}, "int64"),
        ({"num_codes": "100"}, "codes: expected ids in [0, 800)"),
        ({"num_sub_codes": "eight"}, "num_sub_codes"),
        ({"codebook_hash": "abc"}, "codebook_hash"),
        ({"names": '["a"]'}, "names: expected 2"),
        ({"names": '["a", 1]'}, "names: expected a list of strings"),
        ({"names": '{"a": 1, "b": 2}'}, "names: expected a list of strings"),
        ({"names": "[" * 100_000}, "names: expected JSON"),
        ({"codes": random_codes().float()}, "int32 or int64"),
        ({"codes": random_codes((6, 4))}, "int32 or int64 [N, h, w]"),
        ({"codes": random_codes() - 2048}, "codes: expected ids in [0, 2048)"),
        ({"codes": {"other": random_codes()}}, "one tensor named codes"),
        ({"codes": {}}, "one tensor named codes"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    write(path)
    load_codes(path)  # sound before the change
    write(path, **change)
    assert words in assert_refused(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"hello world, this is text\n" * 100])
def test_text_is_not_an_ids_file(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "not an ids file" in assert_refused(path)


def test_other_safetensors_are_not_ids_files(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert "not an ids file" in assert_refused(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_codes(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        load_codes(tmp_path)


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert_refused(path)


def test_bit_flips_in_the_header_never_crash(path):
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(header):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                # Harmless: in a name, say, or a hash, which decoding then refuses.
                assert load_codes(path).codes.shape == (2, 3, 4)
            except ValueError:
                refused += 1
    assert refused > 4 * header


def test_failed_write_leaves_the_old_file(path, monkeypatch):
    old = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        save_codes(path, random_codes(), ["x", "y"], VOCABULARY)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


WRITER = """
import os, signal, sys, torch
from semhitok.corpus.ids_file import save_codes
from semhitok.vocabulary import Vocabulary
setattr(os, sys.argv[3], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
vocabulary = Vocabulary(256, 8, codebook_hash=sys.argv[2])
save_codes(sys.argv[1], torch.zeros(1, 4, 4, dtype=torch.int64), ["x"], vocabulary)
"""


@pytest.mark.parametrize("killed_in", ["fsync", "replace"])
def test_killed_writer_leaves_the_old_file(path, killed_in):
    command = [sys.executable, "-c", WRITER, str(path), HASH, killed_in]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert torch.equal(load_codes(path).codes, random_codes())
