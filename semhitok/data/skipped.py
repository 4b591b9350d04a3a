"""What is left out because it cannot be used: named on stderr, each once, and counted."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from semhitok import distributed
from semhitok._messages import message, warn


class Skipped:
    """Names what is left out and counts it; the same problem that comes again, in another epoch perhaps, once.

    `len` is the number of problems. One object serves a whole run, in one process.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()  # hashes, as there may be a million

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, problem: str) -> None:
        """problem: what is left out, and why."""
        number = int.from_bytes(hashlib.blake2b(problem.encode(errors="replace"), digest_size=7).digest(), "little")
        if number not in self._known:
            self._known.add(number)
            warn(f"skipped: {problem}")

    @contextlib.contextmanager
    def errors(self, what: str = "") -> Iterator[None]:
        """Count a ValueError or OSError of the body. what: is left out, if the message alone does not say it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self(f"{what}: {message(error)}" if what else message(error))

    def state(self) -> list[int]:
        """For `know`, as JSON has it."""
        return sorted(self._known)

    def know(self, state: Iterable[int]) -> None:
        """Count what another process, or the run before it was stopped, has named."""
        self._known.update(state)

    def gather(self) -> None:
        """Count what any process of the run has named; waits for all of them."""
        for state in distributed.gather_objects(self.state()):
            self.know(state)

    @staticmethod
    def is_state(value: Any) -> bool:
        """Whether a value may come from `state`."""
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**56 for n in value)
