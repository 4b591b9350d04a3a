"""Damaged inputs, read: none may end in anything but its content or a ValueError or OSError that names it in a line.

    python tests/fuzz.py --count 20000 --seed 0
    python tests/fuzz.py --kinds tars parquets
    python tests/fuzz.py --only tars:17          one input once more, with its traceback; the damaged file is kept

The inputs are a function of the seed, the kind and their number. Each kind is read by a process of its own, which is
replaced if it crashes, hangs outside Python or takes too much memory. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "helpers")]

import torch  # noqa: E402
from fuzz_kinds import Images, Kind, Parquets, Tars, Wrong, WrongPairing, check_problem  # noqa: E402
from fuzz_runs import Captions, Corpora, Ids, Records, Resumed, Settings, States, Tokenizers  # noqa: E402

KINDS: dict[str, type[Kind]] = {
    "images": Images, "tars": Tars, "parquets": Parquets, "records": Records, "captions": Captions,
    "settings": Settings, "ids": Ids, "tokenizers": Tokenizers, "corpora": Corpora, "resumed": Resumed,
    "states": States,
}  # fmt: skip
SECONDS = 10  # of the processor, after which an input counts as one that hangs; six times as many on the clock
MEMORY = 2 * 2**30  # bytes that reading an input may add to what the process holds
ADDRESSES = 24 * 2**30  # bytes of address space, so that the machine survives what takes too much
OUTCOMES = ("read", "refused", "failures", "hangs", "wrong pairings")
SHOWN = 5  # failures of a kind that are printed


class Hang(BaseException):
    """Raised by the alarm; no handler of Exception catches it."""


def outcome(kind: Kind, path: Path) -> tuple[str, str]:
    """One of OUTCOMES, and what went wrong."""
    try:
        kind.read()
    except WrongPairing as error:
        return "wrong pairings", str(error)
    except Wrong as error:
        return "failures", str(error)
    except (ValueError, OSError) as error:
        from semhitok._messages import message

        try:
            check_problem(message(error), path)
        except Wrong as wrong:
            return "failures", str(wrong)
        return "refused", ""
    except Hang:
        return "hangs", "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "semhitok" in f.filename]
        return "failures", f"{type(error).__name__}: {str(error)[:200]} ({' '.join(ours[-3:])})"
    return "read", ""


def read_inputs(name: str, seed: int, numbers: range, folder: Path, connection: Any) -> None:
    """Runs in a process of its own: sends (number, outcome, reason, seconds, peak in bytes, words on stderr)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.signal(signal.SIGPROF, _alarm)
    stderr = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    (folder / "files").mkdir()
    kind = KINDS[name](folder / "files")
    for read in kind.intact():
        read()  # what raises here is a mistake of the fuzz run, or all is broken
    connection.send((-1, "ready", "", 0.0, 0, ""))
    before = peak()
    for number in numbers:
        path = kind.make(Random(f"{seed} {name} {number}"))
        os.ftruncate(stderr, 0)
        os.lseek(stderr, 0, os.SEEK_SET)
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=stderr)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        begun = time.process_time()
        result, reason = outcome(kind, path)
        seconds = time.process_time() - begun
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        said = (folder / "stderr").read_text(errors="replace")[:500]
        used = peak() - before
        if result in ("read", "refused"):
            if used > MEMORY:
                result, reason = "failures", f"took {used >> 20} MiB"
            elif "Traceback" in said:
                result, reason = "failures", f"printed {said!r}"
        connection.send((number, result, reason, seconds, used, said))
        if used > MEMORY:
            break  # the peak of a process never falls
    connection.close()


def _alarm(*_: Any) -> None:
    raise Hang


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def results(name: str, seed: int, count: int) -> Iterator[tuple[int, str, str, float, int, str]]:
    """What `read_inputs` sends for all inputs of a kind, through as many processes as it takes."""
    context = multiprocessing.get_context("fork")
    done = 0
    while done < count:
        receiver, sender = context.Pipe(duplex=False)
        folder = Path(tempfile.mkdtemp(prefix="semhitok-fuzz-"))
        process = context.Process(target=read_inputs, args=(name, seed, range(done, count), folder, sender))
        process.start()
        sender.close()
        ready = False
        with contextlib.suppress(EOFError):
            while True:
                result = receiver.recv()
                if not ready:
                    ready = True
                    continue
                done = result[0] + 1
                yield result
        process.join()
        last = (folder / "stderr").read_text(errors="replace")[-3000:]
        shutil.rmtree(folder, ignore_errors=True)
        if not ready:
            raise RuntimeError(f"{name}: the intact inputs cannot be read:\n{last}")
        if process.exitcode:
            result = "hangs" if "Timeout (" in last else "failures"
            yield done, result, f"the process ended with status {process.exitcode}: {last}", 0.0, 0, last
            done += 1


def fuzz(name: str, seed: int, count: int) -> bool:
    """Read all inputs of a kind and print its line, and the first failures; whether there were none."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest, slowest_number, most = 0.0, 0, 0
    for number, result, reason, seconds, used, said in results(name, seed, count):
        counts[result] += 1
        counts["noise"] += bool(said)
        (slowest, slowest_number), most = max((slowest, slowest_number), (seconds, number)), max(most, used)
        if reason:
            kind_of_failure = f"{result}: {''.join('#' if c.isdigit() else c for c in reason)[:60]}"
            reasons[kind_of_failure] += 1
            if reasons[kind_of_failure] == 1 and len(reasons) <= SHOWN:
                print(f"  --only {name}:{number}  {result}: {reason}", flush=True)
    if len(reasons) > SHOWN:
        print(f"  and {len(reasons) - SHOWN} failures of {name} of other kinds")
    figures = [f"{counts[key]:>7}" for key in OUTCOMES] + [f"{counts['noise']:>7}"]
    print(
        f"{name:<11}{count:>7} {' '.join(figures)} {1e3 * slowest:>8.0f} {slowest_number:>7} {most / 2**20:>5.0f}",
        flush=True,
    )
    return not reasons


def only(name: str, seed: int, number: int) -> bool:
    """Read one input in this process, and say what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="semhitok-fuzz-"))
    kind = KINDS[name](folder)
    for read in kind.intact():
        read()
    path = kind.make(Random(f"{seed} {name} {number}"))
    print(f"{path}: kept")
    kind.read()
    print("read")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="inputs, of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", metavar="KIND:NUMBER", help="read one input, in this process")
    args = parser.parse_args()
    if args.only:
        name, _, number = args.only.partition(":")
        return 0 if only(name, args.seed, int(number)) else 1
    weight = sum(kind.weight for kind in KINDS.values())
    head = " ".join(f"{key:>7}" for key in ("read", "refused", "failed", "hangs", "mispair", "noise"))
    print(f"{'kind':<11}{'inputs':>7} {head} {'max ms':>8} {'number':>7} {'MiB':>5}", flush=True)
    good = [fuzz(name, args.seed, -int(-args.count * KINDS[name].weight // weight)) for name in args.kinds]
    print(
        "nothing failed"
        if all(good)
        else "FAILED: " + " ".join(n for n, g in zip(args.kinds, good, strict=True) if not g)
    )
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
