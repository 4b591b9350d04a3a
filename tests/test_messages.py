"""Progress without a terminal."""

import sys
import time

import pytest

from semhitok._messages import progress


@pytest.mark.parametrize("known", [True, False])
def test_long_work_prints_lines(monkeypatch, capsys, known):
    monkeypatch.setattr("semhitok._messages.MINUTE", 0.05)
    items = range(10) if known else iter(range(10))
    for _ in progress(items, "count"):
        time.sleep(0.02)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    shown = [line for line in lines if line]
    assert 2 <= len(shown) <= 8
    for line in shown:
        assert line.startswith("count: ") and ("of 10, " in line and line.endswith("left")) == known
    assert len(set(shown)) > 1


def test_messages_stay_alone(capsys):
    bar = progress(range(10), "count")
    for n in bar:
        bar.write(f"message {n}", file=sys.stderr)
    assert capsys.readouterr().err.split("\n") == [*(f"message {n}" for n in range(10)), ""]


def test_short_work_prints_nothing(capsys):
    assert list(progress(range(10), "count")) == list(range(10))
    assert capsys.readouterr().err == ""
