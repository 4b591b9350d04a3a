"""The same compiled module under another PyTorch (a CPU-only one where pip gives that): the stable ABI's promise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semhitok import _C

ROOT = Path(__file__).resolve().parents[2]
OTHER = "2.13.0"
FOLDER = ROOT / "build" / f"torch-{OTHER}-{sys.implementation.cache_tag}"
PACKAGES = [f"torch=={OTHER}", "numpy", "pytest", "hypothesis"]


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the other PyTorch, made once and kept in the build folder."""
    executable = FOLDER / "bin" / "python"
    complete = FOLDER / "complete"
    if not complete.is_file():
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        done = subprocess.run([executable, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"could not install {' '.join(PACKAGES)}, so this test cannot run:\n{done.stderr[-2000:]}")
        complete.touch()
    return executable


def in_other(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYPOTHESIS_STORAGE_DIRECTORY": os.devnull}
    return subprocess.run([str(python), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith(OTHER), reason=f"this is torch {OTHER}")
def test_same_module_loads(python: Path) -> None:
    done = in_other(python, "-c", "import torch, semhitok; print(torch.__version__, semhitok._C.__file__)")
    assert done.returncode == 0, done.stderr
    version, module = done.stdout.split()
    assert version.startswith(OTHER) and Path(module).samefile(_C.__file__)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith(OTHER), reason=f"this is torch {OTHER}")
def test_op_tests_pass(python: Path) -> None:
    done = in_other(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not inductor",
        "tests/ops/test_ops.py", "tests/ops/test_ops_autograd.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
