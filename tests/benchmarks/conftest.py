"""Scripts that read their command line from sys.argv, called in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """call(main, *arguments): the exit status that `main` returns for a command line."""

    def with_arguments(main: Callable[[], int], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        return main()

    return with_arguments


@pytest.fixture
def refusal(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refusal(main, *arguments): what `main` prints on stderr of a command line that it refuses with exit status 2."""

    def with_arguments(main: Callable[[], int], *arguments: object) -> str:
        with pytest.raises(SystemExit) as found:
            call(main, *arguments)
        assert found.value.code == 2
        return capsys.readouterr().err

    return with_arguments
