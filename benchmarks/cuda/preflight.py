"""Which searches run on which shapes. Each search is tried in a process of its own, so that a kernel that crashes or
hangs does not stop the benchmark.

    python -m benchmarks.cuda.preflight PATH NxKxD...      ("op": what nearest_code itself chooses)
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable

from benchmarks.processes import environment

LIMIT = 45  # seconds for all searches, which run in parallel
OP = "op"  # the search that the op itself chooses

Shape = tuple[int, int, int]  # N, K, D


def name_of(shape: Shape) -> str:
    return "x".join(map(str, shape))


def survivors(searches: Iterable[str], shapes: Iterable[Shape]) -> tuple[dict[str, set[Shape]], dict[str, str]]:
    """(search -> shapes it runs on, search -> what went wrong first)."""
    named = {name_of(shape): shape for shape in shapes}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    command = [sys.executable, "-m", __spec__.name]
    running = {search: subprocess.Popen([*command, search, *named], **piped) for search in searches}
    deadline = time.monotonic() + LIMIT
    ran: dict[str, set[Shape]] = {}
    wrong: dict[str, str] = {}
    for search, process in running.items():
        try:
            printed, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            wrong[search] = f"still running after {LIMIT} s"
        ran[search], message = outcome(printed, named)
        if len(ran[search]) < len(named):
            wrong.setdefault(search, message)
    return ran, wrong


def outcome(printed: str, named: dict[str, Shape]) -> tuple[set[Shape], str]:
    """What a process printed -> shapes it got through, and its first complaint."""
    lines = printed.splitlines()
    ran = {named[name] for name, _, rest in (line.partition(" ") for line in lines) if rest == "ok" and name in named}
    complaints = [line for line in lines if not line.endswith(" ok")]
    refused = [line for line in complaints if line.partition(" ")[0] in named]
    return ran, (refused or complaints[-1:] or ["stopped without output"])[0]


def main() -> None:
    import torch

    import semhitok  # noqa: F401  (registers the ops)

    search, *names = sys.argv[1:]
    for name in names:
        n, k, d = map(int, name.split("x"))
        z, codebook = torch.randn(n, d, device="cuda"), torch.randn(k, d, device="cuda")
        try:
            if search == OP:
                torch.ops.semhitok.nearest_code(z, codebook, "ip")
            else:
                torch.ops.semhitok.nearest_code_probe(z, codebook, "ip", search)
            torch.cuda.synchronize()
            print(name, "ok", flush=True)
        except RuntimeError as error:
            print(name, str(error).splitlines()[0], flush=True)


if __name__ == "__main__":
    main()
