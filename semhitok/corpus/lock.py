"""One run at a time in a corpus's folder: a lock that ends with the process that holds it.

The lock is the system's (`flock`) on a file in the folder: a process that is killed leaves at most the file behind, not
the lock. The processes of one torchrun share it; they know each other by torchrun's run id and address.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from semhitok._messages import printable

LOCK = "encode.lock"
WAIT = 20.0  # seconds for which a process of torchrun waits for the first one of them
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_held: set[int] = set()  # descriptors, which the processes that this one forks must not keep


@contextlib.contextmanager
def locked(folder: Path, group: str | None = None) -> Iterator[None]:
    """A context in which no other run encodes into `folder`.

    group: what the processes that share the lock have in common; None shares it with nobody.

    On a file system without locks this is a warning on stderr, and nothing more.

    Raises:
        ValueError: another run holds the lock.
        OSError: the lock's file cannot be written.
    """
    descriptor = _acquire(folder, group)
    if descriptor is None:
        yield
        return
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        # The last one to hold it removes the file. Whoever opened it before finds that it is not the lock any more.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(folder / LOCK)
        os.close(descriptor)


def torchrun_group() -> str:
    """What the processes of one torchrun have in common."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "") for name in names)


def _acquire(folder: Path, group: str | None) -> int | None:
    """The descriptor of the locked file; None if there are no locks here."""
    path = folder / LOCK
    refused = ValueError(f"{folder}: another run is encoding into this folder; wait for it, or stop it")
    end = time.monotonic() + WAIT
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _take(descriptor, path, group):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _BUSY or isinstance(error, FileNotFoundError):
                raise refused from None
            problem = f"{path}: no locks on this file system ({error.strerror}); run one command at a time"
            print(f"semhitok: {printable(problem)}", file=sys.stderr)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > end:
            raise refused
        time.sleep(0.05)


def _take(descriptor: int, path: Path, group: str | None) -> bool:
    """Whether the lock is taken now; False if it may be a moment later. OSError if others hold it."""
    if group is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_lock(descriptor, path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_lock(descriptor, path):
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, group.encode(), 0)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
    # Shared with the others of the group. Between the two locks another run may come first: so look who it is.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return False
    if not _is_lock(descriptor, path):
        return False
    if os.pread(descriptor, 4096, 0) != group.encode():
        raise OSError(errno.EWOULDBLOCK, "held by another group")
    return True


def _is_lock(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one in the folder."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
