"""What the ops may use: instruction sets, memory, import time, packages. Each test runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semhitok import _C

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT / "tests/helpers",
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
        pytest.skip("the tests themselves run on this one")
    files = ["tests/ops/test_ops.py", "tests/ops/test_ops_subcode.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", "not error", *files],
        env={**os.environ, "SEMHITOK_CPU_CAPABILITY": capability, "HYPOTHESIS_STORAGE_DIRECTORY": os.devnull},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_sub_codes_have_the_same_bits_on_every_instruction_set() -> None:
    digest = """
import hashlib, torch
from op_checks import randn
from semhitok import ops
digest = hashlib.sha256()
for n, k, m, d, dtype in [(500, 40, 12, 32, "float32"), (300, 9, 70, 8, "bfloat16"), (300, 9, 5, 19, "float16")]:
    z, codes = randn(n, d, seed=1) * 1e3, randn(k, m, d, seed=2, dtype=getattr(torch, dtype))
    for metric in ("ip", "l2"):
        for output in ops.nearest_subcode(z, codes, torch.arange(n) % k, metric):
            digest.update(bytes(output.view(torch.uint8).tolist()))
print(digest.hexdigest())
"""
    found = _C.build_info()["cpu"]["found"]
    assert len({answer(digest, SEMHITOK_CPU_CAPABILITY=capability) for capability in found}) == 1


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

STATUS = """
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
"""
reads_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
MEASURE = """
import torch
from semhitok import ops, reference
from op_checks import randn

n, k, d, m, dp = 4096, 16384, 32, 12, 32
torch.set_num_threads(2)
inputs = torch.rand(n, d), torch.rand(n, dp), torch.rand(k, d), torch.rand(k, m, dp)
op = {op}
op(*(t[:64] for t in inputs))
before = status("VmRSS")
outputs = op(*inputs)
print(status("VmHWM") - before - sum(o.nbytes for o in outputs))
"""


@reads_proc
def test_hier_quantize_needs_little_memory() -> None:
    """N = 4096, K = 16,384, D = 32, m = 12, Dp = 32: < 64 MiB beyond inputs and outputs; one N x K matrix is 256."""
    assert int(answer(STATUS + MEASURE.format(op="ops.hier_quantize"))) < 64 * MIB
    assert int(answer(STATUS + MEASURE.format(op="reference.hier_quantize"))) >= 512 * MIB


# 16,384 tokens, K = 16,384 codes with m = 12 sub-codes of 32 values. Scores would be 1 GiB, a mask of bools 256 MiB;
# fp32 of the sub-codebooks' size is 24 MiB and of the tokens' 2.
STEP = """
import torch
from semhitok import ops
from semhitok.quantizer import HierarchicalQuantizer

{step}
torch.set_num_threads(2)
step(*setup(64, 64))  # what is allocated once and for all
n = k = 16384
arguments = setup(n, k)
before = status("VmRSS")
step(*arguments)
{more}
print(status("VmHWM") - before)
"""
TRAIN = """
def setup(n, k):
    z_sem, z_pix = torch.nn.functional.normalize(torch.randn(n, 32), dim=-1), torch.randn(n, 32, requires_grad=True)
    return z_sem, z_pix, HierarchicalQuantizer(k, 12, 32, 32)

def step(z_sem, z_pix, quantizer):
    q_sem, q_pix, codes, commitment = quantizer(z_sem, z_pix)
    loss = q_sem.square().mean() + q_pix.square().mean() + commitment
    (gradient,) = torch.autograd.grad(loss, z_pix)
    assert gradient.any()
    quantizer.update(z_pix.detach(), codes)
    quantizer.restart(z_pix.detach(), codes, 10**6, generator=torch.Generator())
    quantizer.semantic.update(z_sem, codes // 12)
"""
LEARN = """
def setup(n, k):
    codebooks = torch.randn(k, 32, requires_grad=True), torch.randn(k, 12, 32, requires_grad=True)
    return torch.randn(n, 32), torch.randn(n, 32), *codebooks

def step(z_sem, z_pix, sem, pix):
    scores, ids = ops.nearest_code(z_sem, sem, "l2")
    sub_scores, _ = ops.nearest_subcode(z_pix, pix, ids)
    gradients = torch.autograd.grad(scores.sum() + sub_scores.sum(), (sem, pix))
    assert gradients[0].any() and gradients[1].any()
"""


@reads_proc
@pytest.mark.parametrize("step", [TRAIN, LEARN], ids=["train", "learn codebooks"])
def test_a_training_step_needs_little_memory(step: str) -> None:
    """Forward, losses, backward, moving averages and restarts, or gradients of both codebooks.

    At most one tensor of the sub-codebooks' size exists at a time besides what the tokens need; three would be 72 MiB.
    """
    assert int(answer(STATUS + STEP.format(step=step, more=""))) < 72 * MIB
    mask = "torch.ones(n, k, dtype=torch.bool)"  # the least that N x K can be: the measurement sees it
    assert int(answer(STATUS + STEP.format(step=step, more=mask))) > 192 * MIB


LARGE = """
import torch
from semhitok import ops

torch.set_num_threads(2)
z, codebook = torch.rand(65536, 32), torch.rand(16384, 32)
{prepare}
ops.nearest_code(z[:256], codebook, "{metric}")  # packs the codebook, starts the threads
before = status("VmRSS")
outputs = ops.nearest_code(z, codebook, "{metric}")
print(status("VmHWM") - before - sum(o.nbytes for o in outputs))
"""


@reads_proc
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_code_needs_little_memory(metric: str) -> None:
    """N = 65,536, K = 16,384: at most 8 MiB and 1 MiB a thread beyond outputs and the packed codebook."""
    assert int(answer(STATUS + LARGE.format(metric=metric, prepare=""))) <= 10 * MIB
    # Also where the int8 pass settles nothing: two clusters of nearly equal codes.
    hard = "codebook = torch.rand(2, 32)[torch.arange(16384) % 2] + 1e-6 * codebook; z = z[:2048]"
    assert int(answer(STATUS + LARGE.format(metric=metric, prepare=hard))) <= 10 * MIB


@reads_proc
def test_codebooks_that_change_do_not_pile_up() -> None:
    """Five hundred versions of one codebook, as in training, and two hundred codebooks, each used once."""
    code = """
import torch
from semhitok import ops

z, codebook = torch.rand(8, 32), torch.rand(16384, 32)
def versions(count):
    for _ in range(count):
        ops.nearest_code(z, codebook.mul_(1.001))
def others(count):
    for _ in range(count):
        ops.nearest_code(z, torch.rand(16384, 32))
versions(10)
before = status("VmRSS")
versions(500)
print(status("VmRSS") - before)
others(20)
before = status("VmRSS")
others(200)
print(status("VmRSS") - before)
"""
    same, other = map(int, answer(STATUS + code).split())
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
