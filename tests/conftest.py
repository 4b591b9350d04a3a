"""What every test shares: the devices a test runs on."""

from __future__ import annotations

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
