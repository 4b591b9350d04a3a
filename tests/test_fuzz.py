"""A short run of `tests/fuzz.py`, and the proof that it sees what it is there to see."""

import subprocess
import sys
from pathlib import Path
from random import Random

import mutations
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("webdataset")
pytest.importorskip("transformers")

from fuzz_kinds import PICTURES, Wrong, WrongPairing, caption, check_image, check_pair, check_problem, number_of

from semhitok.data.images import decode_image

SCRIPT = Path(__file__).with_name("fuzz.py")


def test_no_damaged_input_ends_in_a_traceback_a_hang_or_a_wrong_pairing():
    done = subprocess.run([sys.executable, SCRIPT, "--count", "400", "--seed", "1"], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert len(lines) == 11 and sum(int(line[1]) for line in lines) >= 400
    for name, inputs, read, refused, *wrong in lines:
        assert int(read) + int(refused) == int(inputs) and wrong[:3] == ["0", "0", "0"], name


BROKEN = {
    "traceback": "raise KeyError('x')",
    "hang": "while True: pass",
    "crash": "os.kill(os.getpid(), 9)",
    "memory": "bytearray(b'x') * 2**28",
    "lines": "raise ValueError('input\\nis bad')",
}


def test_the_run_sees_what_goes_wrong():
    """Made-up kinds whose third input goes wrong, each in its way; all others are counted."""
    program = f"""
import os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import fuzz
class Made(fuzz.Kind):
    def intact(self): return ()
    def make(self, number):
        self.number = number
        return self.folder / "input"
    def read(self):
        if self.number == 2:
            exec(self.broken)
        if self.number % 2:
            raise ValueError("input: not like this")
fuzz.Random = lambda text: int(text.split()[-1])  # hands the number to `make`
fuzz.SECONDS, fuzz.MEMORY = 1, 2**27
for name, broken in {BROKEN!r}.items():
    fuzz.KINDS[name] = type(name, (Made,), dict(broken=broken))
    assert not fuzz.fuzz(name, 0, 6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in BROKEN:
        result = "hangs" if name == "hang" else "failures"
        assert [line[2] for line in lines if line[:2] == ["--only", f"{name}:2"]] == [f"{result}:"]
        (counts,) = (line[1:6] for line in lines if line[:1] == [name])
        assert counts == ["6", "2", "3", *(["0", "1"] if name == "hang" else ["1", "0"])]


def test_a_damaged_caption_is_no_wrong_pairing_and_that_of_another_picture_is():
    check_pair(3, caption(3))
    check_pair(3, caption(4)[:-1] + "x")
    check_pair(None, caption(4))
    with pytest.raises(WrongPairing):
        check_pair(3, caption(4))


def test_a_picture_tells_its_number_until_it_is_damaged():
    for n, data in enumerate(PICTURES):
        image = decode_image(data, "picture")
        assert number_of(image) == n
        image[1, 3, 3] = 0.5
        assert number_of(image) is None
    for bad in (image * 2, image * float("nan"), image.double(), image[0]):
        with pytest.raises(Wrong):
            check_image(bad)


@pytest.mark.parametrize("problem", ["", "a.tar:\nbad", "bad"])
def test_a_message_must_name_the_file_in_one_line(problem, tmp_path):
    check_problem("a.tar: bad", tmp_path / "a.tar")
    with pytest.raises(Wrong):
        check_problem(problem, tmp_path / "a.tar")


def test_an_input_follows_from_the_seed_the_kind_and_its_number():
    data = bytes(range(256)) * 8
    made = [mutations.damage(data, data[::-1], Random(f"0 images {n}")) for n in range(50)]
    assert made == [mutations.damage(data, data[::-1], Random(f"0 images {n}")) for n in range(50)]
    assert len(set(made)) > 45 and all(damaged.data != data for damaged in made[:5])
