"""What a listing passes over because it is no input: counted by the reason, with the first names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from semhitok._messages import printable

UNREADABLE = "not readable"  # the only reason that may cost an image
_NAMED = 3  # of each reason in a message


class PassedOver:
    """How many files a listing passes over for each reason, and the names of the first few. A folder counts once.

    Attributes:
        counts: {reason: number}.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def __call__(self, name: str | Path, reason: str) -> None:
        """Count a file, or a member of an archive; of a path, the last part is named."""
        self.counts[reason] += 1
        names = self._names.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(name.name if isinstance(name, Path) else name)

    def clear(self) -> None:
        """Forget everything: it will be counted again."""
        self.counts.clear()
        self._names.clear()

    @property
    def unreadable(self) -> int:
        """Files and folders that could not be read and may hold images: they count as skipped."""
        return self.counts[UNREADABLE]

    def summary(self) -> str:
        """`passed over 3 files: 2 of no image format (notes.txt, a.py), 1 not a file (queue)`; empty if there are none.

        One line, whatever the names are.
        """
        if not self.counts:
            return ""
        total = self.counts.total()
        parts = []
        for reason, count in self.counts.items():
            names = ", ".join(self._names[reason]) + (", ..." if count > _NAMED else "")
            parts.append(f"{count} {reason} ({names})")
        return printable(f"passed over {total} file{'' if total == 1 else 's'}: {', '.join(parts)}")
