"""What the CUDA kernels compile to, wherever there is nvcc: no kernel of ours spills or uses local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
MOST_REGISTERS = 168  # a block of 256 threads of the largest kernel still fits an SM with room for others


def test_kernels_mirror_the_cpu() -> None:
    cpu = {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")}
    ops = {"nearest_code", "nearest_subcode", "hier_quantize", "hier_lookup", "segment_sum"}
    assert ops <= {p.stem for p in KERNELS} and ops <= cpu


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", KERNELS, ids=[p.stem for p in KERNELS])
def test_no_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-DSEMHITOK_HAVE_SM90A=1", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "x"),
         str(source)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = re.findall(
        r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.S,
    )
    ours = [entry for entry in report if "semhitok" in entry[0]]
    assert ours or "__global__" not in source.read_text(), done.stderr
    for name, stack, stores, loads, registers in ours:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} uses local memory: {stack} {stores} {loads}"
        assert int(registers) <= MOST_REGISTERS, f"{name} uses {registers} registers"
