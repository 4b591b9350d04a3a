"""The rules of the house, checked on the syntax trees of all Python files: who may import what, and how long a file may
be. Each rule is also shown a made-up file that breaks it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_README_LINES, MAX_WIDTH = 450, 150, 120

# The floors of semhitok, lowest first. A module imports from its own floor and those below it.
FLOORS = [
    "__init__ _C _buffers _files _messages _optional _settings "
    "clustering config distributed grouping ops quantizer reference usage vocabulary",
    "models",
    "data",
    "processor tokenizer",
    "corpus",
    "evaluation",
    "training",
    "mllm",
    "explore",
    "demo",
    "cli __main__",
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
# Folders whose files are imported by their bare names (pyproject.toml, `pythonpath`).
BARE = ("tests/helpers/", "tests/cuda/")

NAMED_TUPLE = ("_asdict", "_fields", "_make", "_replace")  # public, though they begin with an underscore


class Import(NamedTuple):
    """`target` is dotted and absolute, down to the imported name; `bound` is what it is called in the file."""

    line: int
    target: str
    bound: str
    at_import: bool  # when the file itself is imported: not inside a function, nor for type checkers alone


class File:
    def __init__(self, path: str, source: str) -> None:
        self.path, self.source = path, source
        self.tree = ast.parse(source, path)
        self.is_package = path.endswith("__init__.py")
        bare = next((folder for folder in BARE if path.startswith(folder)), "")
        self.module = path.removeprefix(bare).rpartition(".")[0].replace("/", ".").removesuffix(".__init__")
        self.imports = list(self._imports(self.tree, True))
        self.bound = {found.bound: found.target for found in self.imports}
        self.private = _private(self.tree)
        # What objects may have: defined in a class, or stored in an attribute.
        classes = [node for node in ast.walk(self.tree) if isinstance(node, (ast.ClassDef, ast.Attribute))]
        self.private_members = set().union(*map(_private, classes))

    def _imports(self, node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    # `import a.b` binds a, which leads to a.b
                    bound = alias.asname or alias.name.partition(".")[0]
                    yield Import(child.lineno, alias.name if alias.asname else bound, bound, at_import)
                    if not alias.asname and bound != alias.name:
                        yield Import(child.lineno, alias.name, alias.name, at_import)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = self.module.split(".")
                    parts = parts[: len(parts) - child.level + self.is_package]
                    base = ".".join([*parts, *([base] if base else [])])
                for alias in child.names:
                    yield Import(child.lineno, f"{base}.{alias.name}", alias.asname or alias.name, at_import)
            else:
                typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from self._imports(child, at_import and not typing and not function)

    def resolve(self, node: ast.AST) -> str | None:
        """The absolute name of `a.b.c` if `a` is imported."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            return base and f"{base}.{node.attr}"
        return None


def _private(tree: ast.AST) -> set[str]:
    """The private names that are defined in a tree, in whatever scope."""
    return {name for name in map(_defined, ast.walk(tree)) if name and is_private(name)}


def _defined(node: ast.AST) -> str | None:
    """The name that this node defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    return None


def is_private(name: str) -> bool:
    return (
        name not in NAMED_TUPLE
        and name.startswith("_")
        and name != "_"
        and not (name.startswith("__") and name.endswith("__"))
    )


class House:
    """All Python files of the repository, or made-up ones: {path: source}."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.files = [File(path, source) for path, source in sources.items()]
        self.modules = {file.module: file for file in self.files}

    def split(self, target: str) -> tuple[File | None, list[str]]:
        """The file a dotted name is in, None if it is not ours, and the names inside it."""
        parts = target.split(".")
        for length in range(len(parts), 0, -1):
            file = self.modules.get(".".join(parts[:length]))
            if file:
                return file, parts[length:]
        return None, parts

    def private_names(self) -> Iterator[str]:
        """Private names of another file. A private module of semhitok may be imported, its public names used."""
        for file in self.files:
            others = set().union(*(other.private_members for other in self.files if other is not file))
            for line, name in {*self._private_targets(file), *self._private_attributes(file, others)}:
                yield f"{file.path}:{line}: takes the private name {name}"

    def _private_targets(self, file: File) -> Iterator[tuple[int, str]]:
        """Imports, attributes of what is imported, and names in strings, as monkeypatch takes them."""
        targets = [(found.line, found.target) for found in file.imports]
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute):
                targets.append((node.lineno, file.resolve(node) or ""))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                targets.append((node.lineno, node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
                names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
                targets += [(node.lineno, f"{file.resolve(node.args[0])}.{name}") for name in names]
        for line, target in targets:
            home, names = self.split(target)
            private = [name for name in names if name.isidentifier() and is_private(name)]
            if home and home is not file and private:
                yield line, f"{home.module}.{private[0]}"

    def _private_attributes(self, file: File, others: set[str]) -> Iterator[tuple[int, str]]:
        """`thing._x`, where this file defines no `_x`, but another of ours does."""
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                own = ast.unparse(node.value) in ("self", "cls", "super()")
                if not own and file.resolve(node) is None and node.attr in others - file.private:
                    yield node.lineno, f"{ast.unparse(node.value)}.{node.attr}"

    def upward_imports(self) -> Iterator[str]:
        for file in self.files:
            top = file.path.partition("/")[0]
            for found in file.imports:
                home, _ = self.split(found.target)
                if home is None or home is file:
                    continue
                if top == "semhitok":
                    # The package itself gives out its public classes, whatever floor they are on.
                    upward = file.module != "semhitok" and self.floor(home) > self.floor(file)
                else:
                    upward = top == "benchmarks" and home.path.startswith("tests/")
                if upward:
                    yield f"{file.path}:{found.line}: imports {home.module}, which is above it"

    @staticmethod
    def floor(file: File) -> int:
        top, *names = file.module.split(".")
        if top != "semhitok":
            return len(FLOORS)  # above all of semhitok
        name = names[0] if names else "__init__"
        assert name in FLOOR_OF, f"{file.path}: {name} has no floor: add it to FLOORS"
        return FLOOR_OF[name]

    def import_circles(self) -> Iterator[str]:
        edges: dict[str, dict[str, int]] = {}
        for file in self.files:
            homes = [(self.split(found.target)[0], found.line) for found in file.imports if found.at_import]
            edges[file.module] = {home.module: line for home, line in homes if home and home is not file}
        done: set[str] = set()

        def visit(module: str, path: list[str]) -> Iterator[str]:
            if module in path:
                circle = path[path.index(module) :]
                first = self.modules[circle[-1]]
                yield f"{first.path}:{edges[first.module][module]}: circle {' -> '.join([*circle, module])}"
            elif module not in done:
                for other in edges[module]:
                    yield from visit(other, [*path, module])
                done.add(module)

        for module in edges:
            yield from visit(module, [])

    def long_files(self) -> Iterator[str]:
        for file in self.files:
            lines = file.source.count("\n")
            if file.path.startswith("semhitok/") and lines > MAX_LINES:
                yield f"{file.path}:{lines}: has more than {MAX_LINES} lines"


@pytest.fixture(scope="module")
def house() -> House:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.py", "*.pyi"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in done.stdout.split() if path.partition("/")[0] in ("semhitok", "benchmarks", "tests")]
    return House({path: (ROOT / path).read_text() for path in sorted(paths) if (ROOT / path).exists()})


RULES = ["private_names", "upward_imports", "import_circles", "long_files"]


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_the_rule(house: House, rule: str) -> None:
    assert len(house.files) > 100
    broken = sorted(getattr(house, rule)())
    assert not broken, "\n" + "\n".join(broken)


def test_lines_are_no_wider_than_in_python() -> None:
    """clang-format leaves comments as they are."""
    listed = ["git", "ls-files", "--", "*.cpp", "*.h", "*.cu", "*.cuh", "*.pyi", "*.sh"]
    paths = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.split()
    lines = [(path, n, line) for path in paths for n, line in enumerate((ROOT / path).read_text().splitlines(), 1)]
    assert len(lines) > 5000 or not paths
    wide = [f"{path}:{n}: {len(line)} characters" for path, n, line in lines if len(line) > MAX_WIDTH]
    assert not wide, "\n".join(wide)


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().count("\n")
    assert lines <= MAX_README_LINES


BELOW = (
    "class _Hidden: ...\nclass Open:\n    def __init__(self): self._kept = 1\n    def give(self): return self._kept\n"
)
GOOD = """
from __future__ import annotations
import torch._dynamo
from typing import TYPE_CHECKING
from semhitok import _files
from semhitok._files import write
from semhitok.data import images
from .text import show
if TYPE_CHECKING:
    from semhitok.cli.info import run
class Mine:
    def __init__(self): self._own = images.Open()
    def other(self, other): return other._own, self.__class__.__name__, torch._dynamo
def late():
    import semhitok.cli.info
"""
MADE_UP = {
    "semhitok/__init__.py": "from . import _files\n",
    "semhitok/_files.py": "def write(): ...\n",
    "semhitok/data/images.py": BELOW,
    "semhitok/cli/text.py": "def show(): ...\n",
    "semhitok/cli/info.py": "from semhitok.cli import encode\ndef run(): ...\n",
    "semhitok/cli/encode.py": GOOD,
    "tests/helpers/help_me.py": "_world = 1\n",
    "tests/test_it.py": "import semhitok\nfrom semhitok import _files\nx = semhitok._files.write\n",
}
ENCODE, IMAGES, TEST = "semhitok/cli/encode.py", "semhitok/data/images.py", "tests/test_it.py"
BROKEN = [
    (
        "private_names",
        TEST,
        "from semhitok.data.images import _Hidden",
        "the private name semhitok.data.images._Hidden",
    ),
    ("private_names", ENCODE, "from ..data.images import _Hidden", "the private name semhitok.data.images._Hidden"),
    ("private_names", ENCODE, "import semhitok.data.images as i\ni._Hidden", ".images._Hidden"),
    ("private_names", ENCODE, "import semhitok.data.images\nsemhitok.data.images._Hidden", ".images._Hidden"),
    ("private_names", ENCODE, "from semhitok.data.images import Open\nOpen._kept", ".images._kept"),
    ("private_names", ENCODE, "def f(thing): return thing._kept", "thing._kept"),
    ("private_names", TEST, "from help_me import _world", "help_me._world"),
    ("private_names", TEST, "patch.setattr('semhitok.data.images._Hidden', 1)", ".images._Hidden"),
    ("private_names", TEST, "from semhitok.data import images\nsetattr(images, '_Hidden', 1)", ".images._Hidden"),
    ("upward_imports", IMAGES, "from semhitok.cli.text import show", "imports semhitok.cli.text"),
    ("upward_imports", IMAGES, "def f():\n    from ..cli import text", "imports semhitok.cli.text"),
    ("upward_imports", IMAGES, "import help_me", "imports help_me"),
    ("upward_imports", "benchmarks/run.py", "import help_me", "imports help_me"),
    ("import_circles", "semhitok/cli/text.py", "import semhitok.cli.encode", "text -> semhitok.cli.encode -> semhitok"),
    ("import_circles", ENCODE, "from . import info", "info -> semhitok.cli.encode -> semhitok.cli"),
    ("long_files", "semhitok/cli/text.py", "\n" * MAX_LINES, "has more than 450 lines"),
]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_allowed(rule: str) -> None:
    assert list(getattr(House(MADE_UP), rule)()) == []


@pytest.mark.parametrize(("rule", "path", "code", "words"), BROKEN)
def test_a_broken_rule_is_found(rule: str, path: str, code: str, words: str) -> None:
    broken = list(getattr(House({**MADE_UP, path: f"{MADE_UP.get(path, '')}\n{code}\n"}), rule)())
    assert broken and re.match(r"[\w/]+\.py:\d+: ", broken[0]) and words in broken[0]


def test_a_module_without_a_floor_is_found() -> None:
    with pytest.raises(AssertionError, match="attic has no floor"):
        list(House({**MADE_UP, "semhitok/attic.py": "import semhitok._files\n"}).upward_imports())
