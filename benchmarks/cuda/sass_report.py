"""Registers, memory and the decisive instructions of every compiled CUDA kernel.

    python -m benchmarks.cuda.sass_report [semhitok/_C....so | kernel.cubin | program]

Reads the machine code from the binary (by default the installed semhitok._C) with cuobjdump: from $CUOBJDUMP, the PATH
or Triton's package. Prints a line for each kernel and architecture. Exit status 1 if a kernel of ours uses local memory
(a stack, LDL, STL) or lacks an instruction that PROMISES names.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import tool_output

# The instructions (the beginning of an opcode) that make a kernel fast and must be in its code, by a part of its
# demangled name and the architecture. It counts as a miss, too, if a binary for the architecture lacks the kernel.
PROMISES: dict[tuple[str, str], tuple[str, ...]] = {
    ("search_few_kernel", "sm_80"): ("HMMA",),
    ("search_mma_kernel", "sm_80"): ("HMMA",),
    ("search_wgmma_kernel", "sm_90a"): ("HGMMA",),
    ("search_int8_kernel", "sm_90a"): ("IGMMA", "VIMNMX3"),
}

# Titles of columns; each counts the opcodes of its name, of which only the part before the first dot matters.
COLUMNS = ("LDL/STL", "HGMMA", "IGMMA", "HMMA", "IMMA", "VIMNMX3", "VIMNMX", "FMNMX", "FFMA", "UBLKCP")
MORE_OPCODES = {"LDL/STL": ("LDL", "STL"), "VIMNMX": ("VIMNMX", "IMNMX")}
NAMESPACE = "semhitok"
SHOWN = 44  # characters of a kernel's name


@dataclass
class Kernel:
    mangled: str
    architecture: str
    registers: int = 0
    stack: int = 0  # bytes, as is shared
    shared: int = 0
    code: list[tuple[int, str, int | None]] = field(default_factory=list)  # address, opcode, where a branch goes
    name: str = ""  # demangled

    @property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs, without its modifiers."""
        return self.between(0, math.inf)

    def between(self, first: int, last: float) -> Counter[str]:
        """The opcodes at addresses first to last."""
        return Counter(opcode.partition(".")[0] for address, opcode, _ in self.code if first <= address <= last)

    def count(self, title: str) -> int:
        opcodes = self.opcodes
        return sum(opcodes[name] for name in MORE_OPCODES.get(title, (title,)))

    @property
    def ours(self) -> bool:
        return NAMESPACE in self.name

    def loops(self) -> list[Counter[str]]:
        """The opcodes of each loop: those between a backward branch and its target."""
        jumps = [(target, address) for address, _, target in self.code if target is not None and target < address]
        return [self.between(*jump) for jump in jumps]


def find_tool(name: str = "cuobjdump") -> str | None:
    """$CUOBJDUMP, the PATH, Triton's package."""
    found = os.environ.get(name.upper()) or shutil.which(name)
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name
        found = str(bundled) if bundled.is_file() else None
    return found


ARCHITECTURE = re.compile(r"(?:arch =|code for) (sm_\w+)")
FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+)\s*:?\s*$")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*)")
BRANCH = re.compile(r"\b(0x[0-9a-f]+)\s*;")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def parse(sass: str, resources: str) -> list[Kernel]:
    """Output of cuobjdump with -sass and with --dump-resource-usage for one binary -> its kernels, in that order."""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture, kernel = "", None
    for line in sass.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture, kernel = match[1], None
        elif match := FUNCTION.match(line):
            kernel = kernels.setdefault((match[1], architecture), Kernel(match[1], architecture))
        elif kernel and (match := INSTRUCTION.match(line)):
            target = BRANCH.search(match[3]) if match[2].partition(".")[0] == "BRA" else None
            kernel.code.append((int(match[1], 16), match[2], int(target[1], 16) if target else None))
    architecture, kernel = "", None
    for line in resources.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.match(line):
            kernel = kernels.get((match[1], architecture))
            # For a lone .cubin this part is printed without its architecture.
            kernel = kernel or next((k for k in kernels.values() if k.mangled == match[1] and not architecture), None)
        elif kernel and (match := RESOURCES.search(line)):
            kernel.registers, stack, kernel.shared, local = map(int, match.groups())
            kernel.stack = stack + local
    names = demangle([k.mangled for k in kernels.values()])
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = name
    return list(kernels.values())


def demangle(names: list[str]) -> list[str]:
    """With c++filt if it is available; otherwise the names as they are."""
    tool = shutil.which("c++filt") or find_tool("cu++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    readable = done.stdout.splitlines()
    return readable if done.returncode == 0 and len(readable) == len(names) else names


def short(name: str) -> str:
    """`semhitok::cuda::(anonymous namespace)::search<float>(Problem, int)` -> `search<float>`."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("semhitok::cuda::", "")
    name = re.sub(r"\((bool|int|long|unsigned int)\)", "", name).replace("semhitok::", "")
    name = re.sub(r"^cub::\w+::detail::", "cub::", name)
    depth = 0
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def read(binary: Path) -> list[Kernel]:
    """The kernels in a binary.

    Raises:
        RuntimeError: cuobjdump is missing or cannot read the file.
    """
    tool = find_tool()
    if tool is None:
        ways = "set CUOBJDUMP, put the CUDA toolkit's bin folder on PATH, or pip install triton"
        raise RuntimeError(f"no cuobjdump: {ways}")
    return parse(*(tool_output([tool, option, str(binary)]) for option in ("-sass", "--dump-resource-usage")))


def broken_promises(kernels: list[Kernel]) -> list[str]:
    """A sentence for each kernel of ours that uses local memory, and for each promised instruction that is missing."""
    broken = [
        f"{short(k.name)} ({k.architecture}) uses local memory: {k.stack} bytes of stack, {k.count('LDL/STL')} LDL/STL"
        for k in kernels
        if k.ours and (k.stack or k.count("LDL/STL"))
    ]
    there = {k.architecture for k in kernels}
    for (part, architecture), opcodes in PROMISES.items():
        meant = [k for k in kernels if part in k.name and k.architecture == architecture]
        if architecture in there and not meant:
            broken.append(f"no kernel named {part} for {architecture}")
        broken += [f"{short(k.name)} ({architecture}) has no {o}" for k in meant for o in opcodes if not k.opcodes[o]]
    return broken


def table(kernels: list[Kernel]) -> list[str]:
    titles = ["kernel".ljust(SHOWN), f"{'arch':7}", "registers", "stack", "shared", *COLUMNS]
    lines = [" ".join(titles)]
    for k in kernels:
        values = [short(k.name)[:SHOWN].ljust(SHOWN), f"{k.architecture:7}", k.registers, k.stack, k.shared]
        values += [k.count(title) for title in COLUMNS]
        lines.append(" ".join(str(v).rjust(len(title)) for title, v in zip(titles, values, strict=True)))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?", type=Path, help="default: the installed semhitok._C")
    arguments = parser.parse_args()
    binary = arguments.binary
    if binary is None:
        from semhitok import _C

        binary = Path(_C.__file__)
    try:
        kernels = read(binary)
    except RuntimeError as error:
        parser.error(str(error))
    if not kernels:
        parser.error(f"{binary}: no CUDA machine code in it")
    print("\n".join(table(kernels)))
    broken = broken_promises(kernels)
    print("\n".join(broken) or "no kernel of ours uses local memory; all promised instructions are there")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
