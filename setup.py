"""Finds what CMakeLists.txt needs and runs it; everything else about the package is in pyproject.toml.

The installed PyTorch is used as files: its headers are found beside the target environment's packages without importing
it, so pip's build isolation neither hides it nor downloads another.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "semhitok/__init__.py").read_text(), re.M).group(1)
OLDEST_TORCH = (2, 11)


def torch_root() -> Path | None:
    """The folder of the torch package to build against, or None."""
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent)
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").is_file()), None)


def torch_version(root: Path) -> str:
    match = re.search(r"__version__ = '(.+)'", (root / "version.py").read_text())
    version = match.group(1) if match else "unknown"
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise SystemExit(f"semhitok needs torch >= 2.11, found {version} in {root}: pip install --upgrade torch")
    return version


def tools_to_install() -> list[str]:
    """What the build needs and this machine lacks; pip puts it into the isolated build environment."""
    needed = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    return needed + ([] if torch_root() else ["torch>=2.11"])


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"semhitok: {name} not found: pip install {name} (or install it from the system's packages)")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        root = torch_root()
        if root is None:
            raise SystemExit(
                "semhitok: no torch headers found (torch/include/torch/csrc/stable): "
                "pip install 'torch>=2.11' into this environment, then pip install -e . again"
            )
        # A folder that stays between installs makes the second one incremental.
        folder = ROOT / "build" / sys.implementation.cache_tag
        folder.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DSEMHITOK_VERSION={VERSION}",
            f"-DSEMHITOK_TORCH_INCLUDE={root / 'include'}",
            f"-DSEMHITOK_TORCH_VERSION={torch_version(root)}",
            f"-DSEMHITOK_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DSEMHITOK_PYBIND11_INCLUDE={pybind11_include(folder)}",
            f"-DSEMHITOK_MODULE_SUFFIX={suffix}",
        ]  # fmt: skip
        build = [tool("cmake"), "--build", str(folder), "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        for command in (configure, build):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"semhitok: {' '.join(command[:2])} failed: the first error above says why")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file moved into place: a process that has the old one loaded keeps it.
        shutil.copy2(folder / f"_C{suffix}", target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)


def pybind11_include(folder: Path) -> Path:
    """pybind11's headers, copied to a path that is the same in every build: an isolated environment's is not."""
    import pybind11

    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.is_dir():
        shutil.copytree(pybind11.get_include(), copy.with_suffix(".part"), dirs_exist_ok=True)
        copy.with_suffix(".part").rename(copy)
    return copy


setup(
    ext_modules=[Extension("semhitok._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=tools_to_install(),
)
