"""What is imported when: a command answers `--help` without torch, everybody else gets the ops with the package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import semhitok
from semhitok.cli import COMMANDS

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).parent / "semhitok"  # what pip installed
HEAVY = {"torch", "numpy", "timm", "transformers", "yaml", "PIL", "tqdm"}
OPS = "import sys, semhitok, torch; torch.ops.semhitok.nearest_code(torch.ones(1, 2), torch.ones(3, 2), 'ip')"


def python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_a_command_do_not_spin_while_they_wait(given, policy, monkeypatch):
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")  # the library says what it was told when it was loaded
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert f"OMP_WAIT_POLICY = '{policy}'" in python("-m", "semhitok", "info").stderr


def imported(*arguments: object) -> set[str]:
    """The top-level packages that `python ARGUMENTS` imports."""
    report = python("-X", "importtime", *arguments).stderr
    return {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", report, re.M)}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    found = imported("-m", "semhitok", *arguments)
    assert "semhitok" in found and not found & HEAVY


@pytest.mark.skipif(not SCRIPT.exists(), reason="semhitok is not installed in this environment")
def test_the_installed_script_is_recognised(tmp_path: Path) -> None:
    assert not imported(SCRIPT, "encode", "--help") & HEAVY
    (tmp_path / "link").symlink_to(SCRIPT)
    assert not imported(tmp_path / "link", "encode", "--help") & HEAVY


def test_every_other_program_gets_the_ops_at_once(tmp_path: Path) -> None:
    loaded = "import sys, semhitok; assert 'semhitok.ops' in sys.modules"
    python("-c", loaded)
    (tmp_path / "semhitok").write_text(OPS)  # a user's script of that name
    python(tmp_path / "semhitok", "encode")
    package = tmp_path / "other"
    package.mkdir()
    (package / "__init__.py").write_text(loaded)  # imported while Python looks for the module to run
    (package / "__main__.py").write_text(OPS)
    python("-m", "other", "semhitok", cwd=tmp_path)


@pytest.mark.parametrize("name", ["SemHiTok", "SemanticQuantizer", "HierarchicalQuantizer", "ops"])
def test_a_command_loads_the_ops_with_what_needs_them(name: str) -> None:
    # A command's process, and the processes it spawns, which have its argv.
    begin = f"import sys; sys.argv = [{str(SCRIPT)!r}]; import semhitok; assert 'torch' not in sys.modules\n"
    python("-c", f"{begin}import pickle; pickle.dumps(semhitok.{name}) if {name != 'ops'} else semhitok.ops\n{OPS}")


def test_only_ops_calls_the_compiled_ops() -> None:
    """So that whoever imports a module of semhitok has the ops that it calls."""
    package = Path(semhitok.__file__).parent
    direct = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.semhitok"
    ]
    assert direct == ["ops.py"]
