"""The build: what build_info says, what a configure says, and that its errors say what to do."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from semhitok import _C, __version__

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
needs_tools = pytest.mark.skipif(bool(NEEDED), reason=f"not on PATH: {', '.join(NEEDED)}")


@pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="this build of semhitok has no CUDA kernels")
def test_cuda_search_names_a_search() -> None:
    """What is chosen where is tested on the emulator (test_cuda_searches.py); here, that one may ask."""
    if torch.cuda.is_available():
        assert _C.cuda_search(1, 1, 129) == _C.cuda_search(65536, 16384, 64, wide=True) == "simt"
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.cuda_search(1, 1, 1, device=torch.cuda.device_count())
    else:
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.cuda_search(1, 1, 1)


def test_cuda_searches_are_listed_with_cuda_alone() -> None:
    assert bool(_C.cuda_searches()) == (_C.build_info()["cuda"] is not None)


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"version", "cxx", "torch_headers", "cpu", "cuda"}
    assert info["version"] == __version__ == metadata.version("semhitok")
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["cxx"]) and re.match(r"\d+\.\d+", info["torch_headers"])
    cpu = info["cpu"]
    assert cpu["compiled"][-1] == "default" and cpu["used"] in cpu["found"]
    assert set(cpu["found"]) <= set(cpu["compiled"])
    if info["cuda"] is not None:
        assert re.match(r"\d+\.\d+", info["cuda"]["toolkit"])
        assert all(re.fullmatch(r"\d+[af]?-(real|virtual)", a) for a in info["cuda"]["architectures"])


def test_extension_holds_no_path_and_needs_only_libtorch() -> None:
    """No RPATH, no CUDA runtime, and of PyTorch only the library every build of it has."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed and not any("cuda" in n or n.startswith("libc10") for n in needed)
    if _C.build_info()["cuda"] is not None:
        symbols = subprocess.run(["nm", "-D", _C.__file__], capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bw aoti_torch_get_current_cuda_stream", symbols)


def setup_namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def configure(folder: Path, environment: dict[str, str], path: str | None = None) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("SEMHITOK_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX")}
    if path is not None:
        keep["PATH"] = path
    defines = {
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "SEMHITOK_VERSION": "9.9",
        "SEMHITOK_TORCH_INCLUDE": folder,
        "SEMHITOK_TORCH_VERSION": "9.9",
        "SEMHITOK_PYTHON_INCLUDE": folder,
        "SEMHITOK_PYBIND11_INCLUDE": folder,
        "SEMHITOK_MODULE_SUFFIX": ".so",
    }
    command = [shutil.which("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    command += [f"-D{k}={v}" for k, v in defines.items()]
    return subprocess.run(command, env={**keep, **environment}, capture_output=True, text=True)


def flat(text: str) -> str:
    """CMake wraps its messages."""
    return " ".join(text.split())


@needs_tools
def test_configure_prints_one_summary(tmp_path: Path) -> None:
    done = configure(tmp_path, {"SEMHITOK_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("semhitok 9.9") == 1
    assert "CUDA         no (SEMHITOK_CUDA=0)" in done.stdout and "CPU kernels" in done.stdout
    assert "Werror" not in done.stderr and not done.stderr.strip()


@needs_tools
@pytest.mark.parametrize(
    "environment,message",
    [
        ({"SEMHITOK_CUDA": "yes"}, 'SEMHITOK_CUDA: expected 0, 1 or auto, got "yes"'),
        (
            {"TORCH_CUDA_ARCH_LIST": "8.0 Hopper"},
            'TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 8.0+PTX, got "Hopper"',
        ),
    ],
)
def test_configure_names_a_wrong_setting(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    done = configure(tmp_path, environment)
    assert done.returncode != 0 and message in flat(done.stderr)


@needs_tools
def test_cuda_wanted_but_missing(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    wanted = configure(tmp_path / "wanted", {"SEMHITOK_CUDA": "1"}, str(tools))
    assert wanted.returncode != 0 and "SEMHITOK_CUDA=1, but no working nvcc was found" in flat(wanted.stderr)
    auto = configure(tmp_path / "auto", {"SEMHITOK_CUDA": "auto"}, str(tools))
    assert auto.returncode == 0 and "CUDA         no (nvcc not found" in auto.stdout


@needs_tools
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_architectures_are_honoured(tmp_path: Path) -> None:
    done = configure(tmp_path, {"TORCH_CUDA_ARCH_LIST": "8.6;9.0a+PTX"})
    assert done.returncode == 0, done.stderr
    assert "86-real;90a-real;90a-virtual" in done.stdout


@needs_tools
def test_cmake_alone_says_to_use_pip(tmp_path: Path) -> None:
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "pip install -e ." in done.stderr


def test_no_torch_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = setup_namespace(monkeypatch)
    build = names["CMakeBuild"](setuptools.Distribution())
    monkeypatch.setitem(names["CMakeBuild"].build_extension.__globals__, "torch_root", lambda: None)
    with pytest.raises(SystemExit, match=r"no torch headers found .* pip install 'torch>=2.11'"):
        build.build_extension(setuptools.Extension("semhitok._C", sources=[]))
    assert "torch>=2.11" in names["tools_to_install"]()


def test_old_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = setup_namespace(monkeypatch)
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(SystemExit, match=r"needs torch >= 2.11, found 2.9.1\+cpu"):
        names["torch_version"](tmp_path)


def test_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    names = setup_namespace(monkeypatch)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="ninja not found: pip install ninja"):
        names["tool"]("ninja")


@pytest.mark.slow
@needs_tools
def test_cpu_build_from_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SEMHITOK_CUDA=0 in a fresh folder builds a module without CUDA; building again does nothing."""
    pytest.importorskip("pybind11")
    names = setup_namespace(monkeypatch)
    globals_ = names["CMakeBuild"].build_extension.__globals__
    for item in ("CMakeLists.txt", "csrc"):
        (tmp_path / item).symlink_to(ROOT / item)
    monkeypatch.setitem(globals_, "ROOT", tmp_path)
    monkeypatch.setenv("SEMHITOK_CUDA", "0")
    build = names["CMakeBuild"](setuptools.Distribution({"packages": []}))
    build.build_lib = str(tmp_path / "lib")
    build.ensure_finalized()
    extension = setuptools.Extension("semhitok._C", sources=[])
    build.build_extension(extension)
    module = Path(build.get_ext_fullpath(extension.name))
    assert module.is_file()
    show = (
        "import torch, sys, importlib.util as u; s = u.spec_from_file_location('_C', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.build_info()['cuda'])"
    )
    done = subprocess.run([sys.executable, "-c", show, str(module)], capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr
    folder = tmp_path / "build" / sys.implementation.cache_tag
    # A function that an AVX-512 file shared with others could be the copy the linker keeps for all of them.
    for item in folder.glob("CMakeFiles/simd_*.dir/**/*.o") if shutil.which("nm") else ():
        symbols = subprocess.run(["nm", "-C", str(item)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r" [WVu] ", symbols), f"{item.name} shares {symbols}"
    # The inner loop of the int8 pass must keep its tile in registers: code vectors that GCC puts on the stack and loads
    # again for every token cost a third of its speed.
    for item in (
        folder.glob("CMakeFiles/simd_avx512_vnni.dir/**/search_int8_simd.cpp.o") if shutil.which("objdump") else ()
    ):
        text = subprocess.run(["objdump", "-dC", str(item)], capture_output=True, text=True, check=True).stdout
        functions = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.M)[1:]
        loops = [body for name, body in zip(*[iter(functions)] * 2, strict=True) if "superblock_maxima" in name]
        assert loops
        for body in loops:
            loop = body[body.index("vpdpbusd") : body.rindex("vpdpbusd")]
            assert loop.count("vpdpbusd") >= 15 and "(%rsp)" not in loop and "(%rbp)" not in loop
