"""What a listing passes over because it is no input: counted, with the first name of each kind."""

from __future__ import annotations

from collections.abc import Iterator

from semhitok._messages import printable


class PassedOver:
    """Counts names by the reason why they were passed over."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, name: str, reason: str) -> None:
        """Count `name`; reason: what it is, such as "without a suffix"."""
        count, first = self._found.get(reason, (0, name))
        self._found[reason] = count + 1, first

    def clear(self) -> None:
        """Forget everything: it will be counted again."""
        self._found.clear()

    def lines(self) -> Iterator[str]:
        """A line for each reason: its number and the first name."""
        for reason, (count, first) in self._found.items():
            yield printable(f"{count:,} {reason}, such as {first}" if count > 1 else f"1 {reason}: {first}")
