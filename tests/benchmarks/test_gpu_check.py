"""The check of a machine with a GPU goes on after a failure, and says what failed; on a python that only pretends."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu_check.sh"
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_name*) echo "NVIDIA Fake 1";;
  *sysconfig*) echo /nowhere;;
  *sass_report*) echo "a kernel spills"; exit 1;;
  "-m pytest"*test_ops.py) echo "1 failed"; exit 1;;
  "-m pytest"*) echo "$*"; exit 5;;
  *benchmarks.cuda.ceilings*) sleep 30;;
  *quantize_bench*) echo "benchmark: $*";;
  *train_bench*) echo "no timm" >&2; exit 77;;
esac
"""


def test_gpu_check_is_a_script() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    if tool := shutil.which("shellcheck"):
        subprocess.run([tool, SCRIPT], check=True)


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_failure(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(PYTHON)
    fake.chmod(0o755)
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\necho Device not supported; exit 1\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(fake), "PATH": f"{tmp_path}:{os.environ['PATH']}",
                   "GPU_CHECK_SECONDS": "6"}  # fmt: skip
    done = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (out / "log.txt").read_text() == done.stdout and (out / "sass.txt").read_text() == "a kernel spills\n"
    summary = dict(re.findall(r"^(\w+) +\d+ s  (.+)$", done.stdout, re.M))
    assert summary == {
        "environment": "ok", "build": "ok", "sass": "FAILED (status 1)", "tests": "FAILED (status 1)",
        "memcheck": "skipped", "racecheck": "skipped", "ceilings": "FAILED (time was up)", "exactness": "ok",
        "benchmark": "ok", "train": "skipped",
    }  # fmt: skip
    assert "tests/ops/test_ops.py: FAILED" in done.stdout and "tests/cuda/test_cuda_gpu.py: -m pytest" in done.stdout
    assert "no timm" in done.stdout
    assert f"--device cuda --budget 150 --out {out}" in done.stdout


def test_gpu_check_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "a", "b"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: benchmarks/gpu_check.sh [OUT]" in done.stderr
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "finds a CUDA device" in done.stderr
