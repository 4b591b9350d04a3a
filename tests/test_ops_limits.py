"""What the ops may cost and need: instruction sets, memory, import time, packages. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semhitok import _C

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )


def answer(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- instruction sets ----


@pytest.mark.slow
@pytest.mark.parametrize("capability", _C.build_info()["cpu"]["found"])
def test_ops_on_every_instruction_set(capability: str) -> None:
    if capability == _C.build_info()["cpu"]["used"]:
        pytest.skip("test_ops.py itself runs on this one")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", "not error", "tests/test_ops.py"],
        env={**os.environ, "SEMHITOK_CPU_CAPABILITY": capability, "HYPOTHESIS_STORAGE_DIRECTORY": os.devnull},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_capability_is_chosen_by_the_environment() -> None:
    show = "import semhitok; print(semhitok._C.build_info()['cpu']['used'])"
    found = _C.build_info()["cpu"]["found"]
    assert answer(show, SEMHITOK_CPU_CAPABILITY="default") == "default"
    assert answer(show, SEMHITOK_CPU_CAPABILITY="") == found[0]
    wrong = run("import semhitok, torch; semhitok.ops.nearest_code(torch.ones(1, 1), torch.ones(1, 1))",
                SEMHITOK_CPU_CAPABILITY="sse9")  # fmt: skip
    assert wrong.returncode != 0
    assert f"SEMHITOK_CPU_CAPABILITY: expected one of {', '.join(found)}" in wrong.stderr and "sse9" in wrong.stderr


# ---- memory ----

MEASURE = """
import torch
from semhitok import ops, reference
from op_checks import randn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

n, k, d, m, dp = 4096, 16384, 32, 12, 32
torch.set_num_threads(2)
inputs = torch.rand(n, d), torch.rand(n, dp), torch.rand(k, d), torch.rand(k, m, dp)
op = {op}
op(*(t[:64] for t in inputs))
before = status("VmRSS")
outputs = op(*inputs)
print(status("VmHWM") - before - sum(o.nbytes for o in outputs))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_hier_quantize_needs_little_memory() -> None:
    """N = 4096, K = 16,384, D = 32, m = 12, Dp = 32: < 64 MiB beyond inputs and outputs; one N x K matrix is 256."""
    assert int(answer(MEASURE.format(op="ops.hier_quantize"))) < 64 * MIB
    assert int(answer(MEASURE.format(op="reference.hier_quantize"))) >= 512 * MIB


LARGE = """
import torch
from semhitok import ops

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(2)
z, codebook = torch.rand(65536, 32), torch.rand(16384, 32)
{prepare}
ops.nearest_code(z[:256], codebook, "{metric}")  # packs the codebook, starts the threads
before = status("VmRSS")
outputs = ops.nearest_code(z, codebook, "{metric}")
print(status("VmHWM") - before - sum(o.nbytes for o in outputs))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_code_needs_little_memory(metric: str) -> None:
    """N = 65,536, K = 16,384: at most 8 MiB and 1 MiB a thread beyond outputs and the packed codebook."""
    assert int(answer(LARGE.format(metric=metric, prepare=""))) <= 10 * MIB
    # Also where the int8 pass settles nothing: two clusters of nearly equal codes.
    hard = "codebook = torch.rand(2, 32)[torch.arange(16384) % 2] + 1e-6 * codebook; z = z[:2048]"
    assert int(answer(LARGE.format(metric=metric, prepare=hard))) <= 10 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_codebooks_that_change_do_not_pile_up() -> None:
    """Five hundred versions of one codebook, as in training, and two hundred codebooks, each used once."""
    code = """
import torch
from semhitok import ops

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

z, codebook = torch.rand(8, 32), torch.rand(16384, 32)
def versions(count):
    for _ in range(count):
        ops.nearest_code(z, codebook.mul_(1.001))
def others(count):
    for _ in range(count):
        ops.nearest_code(z, torch.rand(16384, 32))
versions(10)
before = resident()
versions(500)
print(resident() - before)
others(20)
before = resident()
others(200)
print(resident() - before)
"""
    same, other = map(int, answer(code).split())
    assert same <= 8 * MIB and other <= 16 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or _C.build_info()["cuda"] is None, reason="no CUDA device or kernels"
)
def test_hier_quantize_needs_little_device_memory() -> None:
    from semhitok import ops

    inputs = [torch.rand(s, device="cuda") for s in [(4096, 32), (4096, 32), (16384, 32), (16384, 12, 32)]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = ops.hier_quantize(*inputs)
    used = torch.cuda.max_memory_allocated() - before - sum(o.nbytes for o in outputs)
    assert used < 64 * MIB


# ---- importing ----


def test_import_is_quick() -> None:
    code = "import torch, time; start = time.perf_counter(); import semhitok; print(time.perf_counter() - start)"
    assert min(float(answer(code)) for _ in range(4)) <= 0.3


def test_import_needs_torch_alone() -> None:
    """With everything but torch's own dependencies blocked, the package imports and the ops run."""
    code = """
import sys
blocked = {"timm", "torchvision", "transformers", "safetensors", "huggingface_hub", "PIL", "numpy", "tqdm", "yaml",
           "skimage", "sklearn", "matplotlib", "scipy", "hypothesis", "pytest"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
import torch, semhitok
codes = semhitok.ops.hier_quantize(torch.rand(5, 3), torch.rand(5, 4), torch.rand(7, 3), torch.rand(7, 2, 4))[2]
assert codes.shape == (5,) and not blocked & set(sys.modules)
print(semhitok.__version__)
"""
    assert answer(code) == _C.build_info()["version"]


def test_without_the_compiled_module_the_error_says_what_to_do() -> None:
    done = run("import sys; sys.modules['semhitok._C'] = None; import semhitok")
    assert done.returncode != 0 and "pip install -e ." in done.stderr.splitlines()[-1]


def test_unknown_names_are_attribute_errors() -> None:
    import semhitok

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        semhitok.nonsense  # noqa: B018
    assert "SemHiTok" in dir(semhitok)
