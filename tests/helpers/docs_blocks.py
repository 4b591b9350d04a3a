"""What the documentation's blocks of code are, and how each language of them is treated (see test_docs)."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomllib

from semhitok import cli

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:<!-- (?P<note>.*?) -->\n)?^(?P<fence>```+)(?P<language>.*)\n(?P<code>[\s\S]*?)^(?P=fence)$", re.M
)

# Added where such a command is run, so that it takes a second.
_STEPS = ["{0}.steps=2", "{0}.batch_size=2", "{0}.micro_batch=null"]
_SETTINGS = {
    "train": [
        *(s.format(stage) for stage in ("semantic", "pixel") for s in [*_STEPS, "{0}.continuous_steps=1"]),
        "semantic.init_tokens_per_code=1", "pixel.init_tokens_per_code=1",
    ],
    "train-mllm": [
        *(s.format(stage) for stage in ("adapter", "joint") for s in _STEPS), "data.length=64", "precision=fp32",
    ],
}  # fmt: skip
SHORT = {command: [w for s in settings for w in ("--set", s)] for command, settings in _SETTINGS.items()}
SHORT["encode"] = ["--processes", "1"]


class Block(NamedTuple):
    place: str  # page:line
    language: str
    note: str
    code: str


def blocks(text: str, page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        found.append(Block(f"{page}:{line}", match["language"].strip(), match["note"] or "", match["code"]))
    fences = len(re.findall(r"^\s*```", text, re.M))
    assert fences == 2 * len(found), f"{page}: {fences} lines of ```, {len(found)} blocks: one is indented or open"
    return found


class Page:
    """Goes through the blocks of a page, in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def treat(self, block: Block) -> None:
        treatment = getattr(self, block.language, None) if block.language in LANGUAGES else None
        assert treatment, f"language: expected one of {', '.join(LANGUAGES)}, got {block.language!r}"
        kind, _, value = block.note.partition(": ")
        known = not block.note or (kind in ("not run", "file") and value)
        assert known, f"<!-- {block.note} -->: expected `not run: REASON` or `file: NAME`"
        treatment(block, value if kind == "file" else None, kind != "not run")

    def python(self, block: Block, file: str | None, run: bool) -> None:
        assert run, "python blocks are always run"
        line = int(block.place.rpartition(":")[2])
        exec(compile("\n" * line + block.code, block.place, "exec"), self.names)

    def bash(self, block: Block, file: str | None, run: bool) -> None:
        for command in block.code.replace("\\\n", " ").splitlines():
            self.command(shlex.split(command, comments=True), run)

    def console(self, block: Block, file: str | None, run: bool) -> None:
        first, *parts = re.split(r"^\$ ", block.code, flags=re.M)
        assert not first.strip() and parts, "console: expected a line that begins with '$ '"
        for part in parts:
            command, _, expected = part.partition("\n")
            printed = self.command(shlex.split(command, comments=True), run, fails="error: " in expected)
            if run:
                assert labels(printed) == labels(expected), f"{command}: printed\n{printed}"

    def yaml(self, block: Block, file: str | None, run: bool) -> None:
        from semhitok.config import train_config
        from semhitok.mllm.config import mllm_config

        assert file, "yaml: expected <!-- file: NAME --> above"
        Path(file).write_text(block.code)
        (mllm_config if re.search("^(llm|tokenizer):", block.code, re.M) else train_config)(file)

    def json(self, block: Block, file: str | None, run: bool) -> None:
        keys = {key for line in block.code.splitlines() for key in json.loads(line)}
        read = "".join((ROOT / "semhitok/mllm" / name).read_text() for name in ("sources.py", "rows.py"))
        assert all(f'"{key}"' in read for key in keys), f"expected keys that training reads, got {keys}"

    def text(self, block: Block, file: str | None, run: bool) -> None:
        command = re.search(r"^\s*(\$|semhitok|python|pip|import|from) \S", block.code, re.M)
        assert not command, f"text: expected no command, got {command and command[0]!r}"

    def bibtex(self, block: Block, file: str | None, run: bool) -> None:
        assert re.match(r"@\w+\{\w+,", block.code) and block.code.count("{") == block.code.count("}")

    def command(self, words: list[str], run: bool, fails: bool = False) -> str:
        """Check a command and run it, if it is to be run and one of ours. Returns what it printed, errors first."""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            return ""
        target = None
        if ">" in words:
            *words, _, target = words
        program, *arguments = words
        if program in ("accelerate", "torchrun"):
            program, arguments, run = "python", arguments[arguments.index("-m") :], False
        if program.endswith("python") and arguments[:1] == ["-c"]:
            exec(arguments[1], {})
        elif program.endswith("python") and arguments[:2] == ["-m", "semhitok"]:
            return self.semhitok(arguments[2:], run, fails, target)
        elif run and program.endswith("python") and arguments[:1] == ["-m"] and arguments[1].startswith("semhitok."):
            return printed(importlib.import_module(arguments[1]).main, arguments[1:])
        elif program == "semhitok":
            return self.semhitok(arguments, run, fails, target)
        else:
            look_up(program, arguments)
        return ""

    def semhitok(self, arguments: list[str], run: bool, fails: bool, target: str | None) -> str:
        try:
            args = cli.parse(arguments)
        except SystemExit as error:
            raise AssertionError(f"semhitok {shlex.join(arguments)}: not parsed") from error
        if args.command in ("train", "train-mllm"):
            config = printed(lambda: cli.main([*arguments, "--print-config"]))
            assert re.search("^stages:", config, re.M) and re.search("^(model|tokenizer):", config, re.M), config
            if target:
                Path(target).write_text(config)
        if not run or getattr(args, "print_config", False):
            return ""
        own = SHORT.get(args.command, []) if args.command != "encode" or "processes" in args else []
        code = None

        def call() -> None:
            nonlocal code
            code = cli.main([*arguments, *own])

        out = printed(call)
        assert fails == (code != 0) and "skipped: " not in out, f"semhitok {shlex.join(arguments)}: {code}\n{out}"
        return out


LANGUAGES = ("python", "bash", "console", "yaml", "json", "text", "bibtex")


def printed(call: Callable[[], Any], argv: list[str] | None = None) -> str:
    """What `call` prints: what semhitok says on stderr, then stdout. On the standard input is a question."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO("what is it ?\n"))
        if argv:
            patch.setattr(sys, "argv", argv)
        call()
    # Libraries have much to say on stderr.
    ours = [line for line in err.getvalue().splitlines(keepends=True) if line.startswith("semhitok")]
    return "".join(ours) + out.getvalue()


def labels(text: str) -> list[str]:
    """What stands first in lines with a number in them, and all of others; repeats count once. Numbers are masked."""
    found: list[str] = []
    for line in text.splitlines():
        masked = re.sub(r"\b[0-9a-f]{12}\b|[-+]?\d[\d.,]*%?", "#", line.strip())
        cells = re.split(r"\s{2,}", masked)
        label = cells[0] if "#" in masked else " ".join(cells)
        if label and found[-1:] != [label]:
            found.append(label)
    return found


def look_up(program: str, arguments: list[str]) -> None:
    """Check a command that is not run: what it names has to be there."""
    options = [a.partition("=")[0] for a in arguments if a.startswith("--")]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets), f"make: expected one of {targets}, got {arguments}"
    elif program in ("pytest", "ruff", "mypy"):
        for path in (word for word in arguments if "/" in word):
            assert (ROOT / path).exists(), f"{path}: no such file or folder"
    elif program.endswith("pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[(.*?)\]", " ".join(arguments))
        assert arguments[0] == "install" and all(e in extras for n in named for e in n.split(",")), arguments
        if "-r" in arguments:
            assert (ROOT / arguments[arguments.index("-r") + 1]).is_file(), arguments
    elif program.endswith("python") or program.startswith("benchmarks/"):
        script = program if program.startswith("benchmarks/") else arguments[0]
        if script == "-m":
            script = arguments[1].replace(".", "/") + ".py"
        assert (ROOT / script).is_file(), f"{script}: no such script"
        if script.endswith(".py"):
            known = constants(ROOT / script)
            assert set(options) <= known, f"{script}: expected its options, got {set(options) - known}"
    else:
        assert [program, *arguments] == ["source", ".venv/bin/activate"] or program == "tensorboard", (
            f"expected a command that this test knows, got {program!r}"
        )


def constants(script: Path) -> set[object]:
    """The constants of a script, and of the modules of benchmarks that it imports, which may define its options."""
    found: set[object] = set()
    seen, left = {script}, [script]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text())):
            if isinstance(node, ast.Constant):
                found.add(node.value)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                package = ROOT / node.module.replace(".", "/")
                modules = {package.with_suffix(".py"), *(package / f"{alias.name}.py" for alias in node.names)}
                left += [module for module in modules - seen if module.is_file()]
                seen |= modules
    return found


def go_through(text: str, name: str) -> None:
    """Treat all blocks of a page in the current folder; AssertionError tells page, line and what is wrong."""
    page = Page()
    for block in blocks(text, name):
        try:
            page.treat(block)
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error
