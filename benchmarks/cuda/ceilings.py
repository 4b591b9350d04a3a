"""Builds ceilings.cu for this GPU and runs it. The floors of the benchmark are computed from its output.

python -m benchmarks.cuda.ceilings [--out ceilings.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import tool_output

SOURCE = Path(__file__).with_suffix(".cu")
LIMIT = 120  # seconds for the build, and for the run


def compile_command(architecture: str, program: Path) -> list[str]:
    """architecture: as in "90a"."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc: put the CUDA toolkit's bin folder on PATH, or set CUDACXX to nvcc")
    return [
        nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-o", str(program), str(SOURCE),
    ]  # fmt: skip


def architecture_of(major: int, minor: int) -> str:
    return f"{major}{minor}" + ("a" if major == 9 else "")  # only code for 9.0a has wgmma


def measure() -> dict[str, Any]:
    """Raises RuntimeError with what failed."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cuda_ceilings"
        tool_output(compile_command(architecture_of(*torch.cuda.get_device_capability()), program), LIMIT)
        return json.loads(tool_output([str(program)], LIMIT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    try:
        text = json.dumps(measure(), indent=1)
    except RuntimeError as error:
        parser.error(str(error))
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
