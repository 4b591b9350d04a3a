"""What tests share: the devices a test runs on, and a way to run commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        from semhitok import _C

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _C.build_info()["cuda"] is None:
            pytest.skip("this build of semhitok has no CUDA kernels")
    return torch.device(request.param)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs a command: (exit code, stdout, stderr lines); any traceback fails the test."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        from semhitok.cli import main

        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err.splitlines()

    return run
