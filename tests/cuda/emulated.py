"""The CUDA kernels compiled for the CPU, on the emulator in this folder: built when sources change, called on tensors.

`python tests/cuda/emulated.py` builds the library and prints its path.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # csrc/problem.h
METRICS = ["ip", "l2"]
# The table's rows, for parametrised tests: these are collected before the library is built.
SEARCHES = re.findall(r'^ +\{"(\w+)", ', (ROOT / "csrc/cuda/nearest_code.cu").read_text(), re.M)
GUARD = 4096  # bytes of 0xFF, NaN in every dtype, on both sides of each tensor
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DSEMHITOK_EMULATED", "-DSEMHITOK_HAVE_SM90A=1",
         "-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip
FASTER = {"emulated_tensor_cores.cpp": ["-O3"]}  # loops that the compiler should vectorise


class LaunchError(RuntimeError):
    """A launch that failed, with the emulator's reason."""


def toolkit_include() -> Path | None:
    """The folder of cuda_runtime_api.h, if the CUDA toolkit is installed."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:  # it may be a wrapper elsewhere, but it knows the toolkit's folder
        output = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        roots += [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.+)$", output, re.M)]
        roots.append(Path(nvcc).resolve().parent.parent)
    roots.append(Path("/usr/local/cuda"))
    for include in (root / "include" for root in roots):
        if (include / "cuda_runtime_api.h").exists() and (include / "cuda_fp16.h").exists():
            return include.resolve()
    return None


def _machine_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= words else []


def build(include: Path, csrc: Path = ROOT / "csrc", folder: Path = ROOT / "build/emulated") -> Path:
    """Compiles csrc/cuda and this folder into one library; objects are kept by the hash of what they read."""
    compiler = os.environ.get("CXX", "g++")
    headers = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh"), *HERE.glob("**/*.h"),
                      *HERE.glob("**/*.cuh")])  # fmt: skip
    flags = [*FLAGS, *_machine_flags(), f"-I{HERE}", f"-I{csrc / 'cuda'}", "-isystem", str(include)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    common = hashlib.sha256(f"{version} {flags} {platform.machine()}".encode())
    for header in headers:
        common.update(header.read_bytes())

    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.cu"), *csrc.glob("cuda/*.cu")]):
        key = common.copy()
        key.update(source.read_bytes())
        jobs.append((source, folder / f"{source.stem}-{key.hexdigest()[:16]}.o"))

    def compile_one(job: tuple[Path, Path]) -> None:
        source, built = job
        if built.exists():
            return
        part = built.with_suffix(".part")
        command = [compiler, *flags, *FASTER.get(source.name, []), "-x", "c++", "-c", str(source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(built)

    objects = [str(built) for _, built in jobs]
    library = folder / f"kernels-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process that builds the same
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        if not library.exists():
            part = library.with_suffix(".part")
            subprocess.run([compiler, "-shared", "-o", str(part), *objects], check=True)
            part.replace(library)
    return library


class Kernels:
    """The ops of `semhitok.ops` without their checks: contiguous tensors on the CPU in, the kernels' results out."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        for name in ("message", "launch_message", "search_name", "chosen_search"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.launches.restype = self.c.device_queries.restype = ctypes.c_uint64
        self.c.hier_quantize_scratch.restype = ctypes.c_int64
        names = (self.c.search_name(ctypes.c_int64(index)) for index in itertools.count())
        self.searches = [name.decode() for name in itertools.takewhile(bool, names)]  # simplest first
        self.set_seed(1)
        self.set_device()  # the library is loaded once for all tests: undo what another has set
        self.set_truncating_sums(False)

    def set_seed(self, seed: int) -> None:
        """Sets the order in which threads and blocks run and copies arrive."""
        self.c.set_seed(ctypes.c_uint64(seed))

    def set_device(self, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> None:
        self.c.set_device(*capability, multiprocessors)

    def set_truncating_sums(self, truncating: bool) -> None:
        """Whether tensor cores truncate sums of fp16 products, as the hardware is known to, or round them."""
        self.c.set_sum(int(truncating))

    def call(self, name: str, *arguments: Any) -> None:
        """Tensors become pointers to copies between guards; what the kernel wrote is copied back."""
        held = [(a, *_guarded(a)) for a in arguments if isinstance(a, Tensor)]
        inner = iter(held)
        passed = [
            ctypes.c_void_p(next(inner)[2].data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a)
            for a in arguments
        ]
        error = getattr(self.c, name)(*passed)
        if error != 0:
            reason = self.c.launch_message() if name.startswith("selftest") else self.c.message()
            raise LaunchError(f"{name}: error {error}: {reason.decode()}")
        for tensor, whole, copy in held:
            edges = torch.cat([whole[:GUARD], whole[GUARD + copy.numel() :]])
            assert (edges == 255).all(), f"{name} wrote outside of a tensor {tuple(tensor.shape)}"
            tensor.copy_(copy.view(tensor.dtype).view(tensor.shape))

    def nearest_code(self, z: Tensor, codebook: Tensor, metric: str = "ip") -> tuple[Tensor, Tensor]:
        (n, d), k = z.shape, len(codebook)
        wide = _is_wide(z, codebook)
        scores, ids = _results(n, wide)
        sizes = (n, k, d, METRICS.index(metric), wide)
        self.call("nearest_code", *sizes, z, _dtype(z), codebook, _dtype(codebook), scores, ids)
        return scores, ids

    def nearest_code_probe(
        self, z: Tensor, codebook: Tensor, metric: str, search: str, bound_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, d), k = z.shape, len(codebook)
        scores, ids = _results(n, False)
        rescored = torch.zeros(n, dtype=torch.int64)
        self.call("nearest_code_probe", n, k, d, METRICS.index(metric), z, _dtype(z), codebook, _dtype(codebook),
                  self.searches.index(search), torch.tensor([bound_scale], dtype=torch.float64), scores, ids,
                  rescored)  # fmt: skip
        return scores, ids, rescored

    def chosen_search(self, tokens: int, codes: int, depth: int, wide: bool = False) -> str:
        """The search that nearest_code would run on the current device."""
        return self.c.chosen_search(*(ctypes.c_int64(n) for n in (tokens, codes, depth, wide))).decode()

    def hier_quantize_scratch(self, tokens: int, groups: int, subcodes: int, sem_depth: int, pix_depth: int) -> int:
        """Bytes of device memory beyond inputs and outputs on the current device, all in fp32."""
        sizes = (tokens, groups, subcodes, sem_depth, pix_depth)
        return self.c.hier_quantize_scratch(*(ctypes.c_int64(size) for size in sizes))

    def nearest_subcode(
        self, z: Tensor, codes: Tensor, group: Tensor, metric: str = "l2", offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        wide = _is_wide(z, codes)
        scores, ids = _results(len(z), wide)
        sizes = (len(z), *_sizes(codes, offsets), codes.shape[-1], METRICS.index(metric), wide)
        self.call("nearest_subcode", *sizes, z, _dtype(z), codes, _dtype(codes), group, scores, ids,
                  *_offsets(codes, offsets))  # fmt: skip
        return scores, ids

    def hier_quantize(
        self, z_sem: Tensor, z_pix: Tensor, sem: Tensor, pix: Tensor, sem_metric: str = "ip", pix_metric: str = "l2",
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        n = len(z_sem)
        codes = torch.full((n,), -7)
        q_sem, q_pix = sem.new_full((n, sem.shape[1]), 7), pix.new_full((n, pix.shape[-1]), 7)
        self.call("hier_quantize", n, *_sizes(pix, offsets), METRICS.index(sem_metric), METRICS.index(pix_metric),
                  _is_wide(z_sem, z_pix, sem, pix), z_sem, _dtype(z_sem), z_pix, _dtype(z_pix), sem, _dtype(sem),
                  sem.shape[1], pix, _dtype(pix), pix.shape[-1], codes, q_sem, q_pix,
                  *_offsets(pix, offsets))  # fmt: skip
        return q_sem, q_pix, codes

    def hier_lookup(
        self, codes: Tensor, sem: Tensor, pix: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        n = len(codes)
        q_sem, q_pix = sem.new_full((n, sem.shape[1]), 7), pix.new_full((n, pix.shape[-1]), 7)
        self.call("hier_lookup", n, *_sizes(pix, offsets), sem, _dtype(sem), sem.shape[1], pix, _dtype(pix),
                  pix.shape[-1], codes, q_sem, q_pix, *_offsets(pix, offsets))  # fmt: skip
        return q_sem, q_pix

    def segment_sum(self, values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        sums, counts = torch.full((num_segments, values.shape[1]), 7, dtype=dtype), torch.full((num_segments,), -7)
        self.call("segment_sum", len(values), values.shape[1], num_segments, values, _dtype(values), ids, sums, counts)
        return sums, counts


def _sizes(codes: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    """K and m of sub-codebooks [K, m, D], or of [T, D] with offsets [K + 1], where m is 0: it is not used."""
    return (codes.shape[0], codes.shape[1]) if offsets is None else (len(offsets) - 1, 0)


def _offsets(codes: Tensor, offsets: Tensor | None) -> tuple[int, Tensor | int]:
    return (0, 0) if offsets is None else (len(codes), offsets)


def _dtype(tensor: Tensor) -> int:
    return DTYPES.index(tensor.dtype)


def _is_wide(*tensors: Tensor) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)


def _results(count: int, wide: bool) -> tuple[Tensor, Tensor]:
    return torch.full((count,), 7, dtype=torch.float64 if wide else torch.float32), torch.full((count,), -7)


def _guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer, and in its middle the tensor's bytes, aligned as PyTorch's allocators align."""
    bytes_ = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = torch.full((GUARD + len(bytes_) + GUARD + 512,), 255, dtype=torch.uint8)
    whole = whole[-whole.data_ptr() % 512 :][: GUARD + len(bytes_) + GUARD]
    inside = whole[GUARD : GUARD + len(bytes_)]
    inside.copy_(bytes_)
    return whole, inside


if __name__ == "__main__":
    found = toolkit_include()
    if found is None:
        raise SystemExit("no CUDA toolkit: set CUDA_HOME")
    print(build(found))
