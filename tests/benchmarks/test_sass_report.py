"""What the compiler made of the kernels, read out of the built binary; a report that would see a broken promise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda import ceilings as cuda_ceilings
from benchmarks.cuda import sass_report
from semhitok import _C

needs_cuobjdump = pytest.mark.skipif(sass_report.find_tool() is None, reason="no cuobjdump")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
MOST_REGISTERS = 168  # what three groups of four warps leave each thread
NVCC = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]

TINY = """
namespace semhitok::cuda {
template <typename T>
__global__ void largest(const T* in, T* out, int n) {
  T best = in[0];
#pragma unroll 1
  for (int i = 1; i + 1 < n; i += 2) best = __vimax3_s32(best, in[i], in[i + 1]);
  out[threadIdx.x] = best;
}
__global__ void spilling(const int* in, int* out, int which) {
  int values[64] = {};
  for (int i = 0; i < which; ++i) values[in[i] & 63] += i;  // an index that only runs know
  out[0] = values[which & 63];
}
template __global__ void largest(const int*, int*, int);
}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cu").write_text(TINY)
    subprocess.run([*NVCC, "-cubin", "-o", folder / "tiny.cubin", folder / "tiny.cu"], check=True)
    return folder / "tiny.cubin"


@needs_cuobjdump
@needs_nvcc
def test_reads_a_cubin(tiny: Path) -> None:
    kernels = {sass_report.short(k.name).partition("<")[0]: k for k in sass_report.read(tiny)}
    assert set(kernels) == {"largest", "spilling"} and all(k.ours for k in kernels.values())
    assert {k.architecture for k in kernels.values()} == {"sm_90a"}
    largest, spilling = kernels["largest"], kernels["spilling"]
    assert largest.count("VIMNMX3") >= 1 and largest.count("HGMMA") == 0
    assert 0 < largest.registers < 64 and largest.stack == 0
    assert any(loop["VIMNMX3"] for loop in largest.loops())
    assert spilling.stack >= 256 and spilling.count("LDL/STL") > 0


@needs_cuobjdump
@needs_nvcc
def test_sees_broken_promises(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    promises = {
        ("largest", "sm_90a"): ("VIMNMX3", "HGMMA"),
        ("gone", "sm_90a"): ("HGMMA",),
        ("elsewhere", "sm_80"): ("HMMA",),  # no code for sm_80 in there: nothing to hold it against
    }
    monkeypatch.setattr(sass_report, "PROMISES", promises)
    monkeypatch.setattr(sys, "argv", ["sass_report.py", str(tiny)])
    assert sass_report.main() == 1
    printed = capsys.readouterr().out
    assert "spilling (sm_90a) uses local memory" in printed and "no kernel named gone for sm_90a" in printed
    assert "has no HGMMA" in printed and "VIMNMX3\n" not in printed and "elsewhere" not in printed


@needs_cuobjdump
@pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="this build of semhitok has no CUDA kernels")
def test_the_built_module_keeps_its_promises() -> None:
    kernels = sass_report.read(Path(_C.__file__))
    assert sum(k.ours for k in kernels) >= 5 and all(k.registers and k.code for k in kernels if k.ours)
    assert sass_report.broken_promises(kernels) == []
    assert all(k.registers <= MOST_REGISTERS for k in kernels if k.ours)
    assert len({len(line) for line in sass_report.table(kernels)}) == 1


@needs_cuobjdump
def test_what_is_no_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.cubin").write_text("no code")
    with pytest.raises(RuntimeError, match="cubin"):
        sass_report.read(tmp_path / "x.cubin")
    monkeypatch.setenv("CUOBJDUMP", "/nonexistent/cuobjdump")
    with pytest.raises(RuntimeError, match="/nonexistent/cuobjdump"):
        sass_report.read(tmp_path / "x.cubin")


def test_short_names() -> None:
    name = "void semhitok::cuda::(anonymous namespace)::search<float, (int)128>(semhitok::NearestCode, int)"
    assert sass_report.short(name) == "search<float, 128>"
    assert sass_report.short("plain") == "plain"


@needs_cuobjdump
@needs_nvcc
def test_ceilings_measure_what_they_name(tmp_path: Path) -> None:
    """The loop of each issue rate is 64 times its instruction and next to nothing else; the others have theirs."""
    subprocess.run(cuda_ceilings.compile_command("90a", tmp_path / "ceilings"), check=True)
    kernels = {sass_report.short(k.name): k for k in sass_report.read(tmp_path / "ceilings")}
    for name in ("VIMNMX3", "VIMNMX", "LOP3", "IMAD", "FMNMX", "FFMA"):
        loops = kernels[f"issue_kernel<{name.capitalize()}>"].loops()
        assert len(loops) == 1 and loops[0][name] == 64 and loops[0].total() <= 68, (name, loops)
    for kernel, opcode, times in (("wgmma_kernel<float>", "HGMMA", 4), ("wgmma_kernel<int>", "IGMMA", 4),
                                  ("mma_sync_kernel", "HMMA", 8), ("read_kernel", "LDG", 4)):  # fmt: skip
        assert any(loop[opcode] == times for loop in kernels[kernel].loops()), kernel
        assert kernels[kernel].stack == kernels[kernel].count("LDL/STL") == 0


@needs_nvcc
def test_ceilings_compile_for_other_gpus(tmp_path: Path) -> None:
    assert cuda_ceilings.architecture_of(9, 0) == "90a" and cuda_ceilings.architecture_of(8, 6) == "86"
    subprocess.run(cuda_ceilings.compile_command("80", tmp_path / "ceilings"), check=True)
