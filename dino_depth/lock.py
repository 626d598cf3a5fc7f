"""A lock on a folder, between processes and machines, which ends with its holder however that ends."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_depth.errors import ConfigError

__all__ = ["EXCLUSIVE", "NO_LOCKS", "SHARED", "Busy", "locked"]

EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH
# Some cluster file systems are mounted without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
POLL_SECONDS = 0.5
_not_for_children: set[int] = set()


class Busy(ConfigError):
    """Somebody else holds a lock."""


@contextmanager
def locked(path: Path, kind: int, busy: str, children_hold: bool = True, patience: float = 0) -> Iterator[None]:
    """Holds the lock of the file ``path``, which is made where it is missing.

    The holder may remove the file, to leave nothing behind: whoever gets the lock of a removed file tries again.

    Args:
        kind: ``EXCLUSIVE`` or ``SHARED``.
        busy: the error where somebody else holds it.
        children_hold: forked processes keep the lock while they outlive this one; otherwise it ends with this one.
        patience: seconds to wait for a holder.

    Raises:
        Busy: ``busy``.
    """
    deadline = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                raise Busy(busy) from None
            time.sleep(min(POLL_SECONDS, patience))
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(lock)
                raise
            print(
                f"{path.parent}: this file system has no locks, so nothing keeps a second process out", file=sys.stderr
            )
            break
        os.close(lock)
    if not children_hold:
        _not_for_children.add(lock)
    try:
        yield
    finally:
        _not_for_children.discard(lock)
        os.close(lock)


def _close_in_child():
    # The kernel keeps a lock until the last copy of its descriptor is closed; closing one copy does not release it.
    for lock in _not_for_children:
        os.close(lock)
    _not_for_children.clear()


os.register_at_fork(after_in_child=_close_in_child)
