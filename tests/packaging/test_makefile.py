"""What `make env` says where it cannot work, and when it has nothing to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def repository(tmp_path):
    """A folder with the Makefile, its inputs empty, and `.venv/bin` of programs that only log."""
    shutil.copy(MAKEFILE, tmp_path)
    for name in (
        "constraints.txt", "pyproject.toml", "setup.py", "CMakeLists.txt", "semhitok/__init__.py", "csrc/ops.cpp"
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("pip", "semhitok"):
        script(tmp_path / ".venv/bin" / name, f'echo "{name} $@" >> log')
    return tmp_path


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(repository, *arguments, **environment):
    command = ["make", *arguments]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(command, cwd=repository, env={**env, **environment}, capture_output=True, text=True)


def test_installs_once_and_again_when_an_input_changed(repository):
    log = repository / "log"
    assert make(repository, "env").returncode == 0
    first = log.read_text()
    assert [line.rpartition(" ")[2] for line in first.splitlines()] == ["torch", ".[dev]"]
    assert all("-c constraints.txt" in line for line in first.splitlines())
    assert make(repository, "demo").returncode == 0
    assert log.read_text() == first + "semhitok demo\n"
    stamp = repository / ".venv/.semhitok"
    os.utime(repository / "csrc/ops.cpp", (stamp.stat().st_mtime + 5,) * 2)
    assert make(repository, "env").returncode == 0
    assert log.read_text().count("pip install") == 4


def test_docs_are_built_strictly_and_without_the_themes_notice(repository):
    script(repository / ".venv/bin/mkdocs", 'echo "mkdocs $@, $NO_MKDOCS_2_WARNING" >> log')
    assert make(repository, "docs").returncode == 0
    assert (repository / "log").read_text().splitlines()[-1] == "mkdocs build --strict, 1"


def test_failed_installation_is_tried_again(repository):
    script(repository / ".venv/bin/pip", "exit 1")
    assert make(repository, "env").returncode != 0
    assert not (repository / ".venv/.semhitok").exists()


def test_old_python(repository):
    script(repository / "old", 'case "$1" in -V) echo Python 3.8.1;; *) exit 1;; esac')
    result = make(repository, "env", "PYTHON=./old")
    assert result.returncode != 0
    assert "Python >= 3.11 is needed (by the pinned versions), ./old is Python 3.8.1" in result.stderr
    assert not (repository / "log").exists()


def test_no_python(repository):
    result = make(repository, "env", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "no no-such-python found" in result.stderr


def test_no_compiler(repository):
    tools = repository / "tools"
    tools.mkdir()
    for name in ("sh", "find", "make"):
        (tools / name).symlink_to(shutil.which(name))
    result = make(repository, "env", f"PYTHON={sys.executable}", PATH=str(tools), CXX="c++")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr
