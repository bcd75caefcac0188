"""Faults, a line each: what goes wrong, at which operations, and how the job may end after it."""

from __future__ import annotations

from typing import NamedTuple

WRITES = frozenset({"pwritev", "pwrite"})
SYNCS = frozenset({"fdatasync", "fsync"})
NAMES = frozenset({"rename", "replace", "unlink", "rmdir"})
ROOM = WRITES | {"open", "mkdir", "posix_fallocate"}
"""What takes room, or an inode."""
EVERYTHING = ROOM | SYNCS | NAMES | {"ftruncate", "fchmod", "chmod"}

KILLED = -9
"""``subprocess``'s status of a process that got SIGKILL."""

Statuses = frozenset[int]
ALL_SAVED, IN_PART, REFUSED = frozenset({0}), frozenset({3}), frozenset({5})


class Fault(NamedTuple):
    """``action`` is ``kill before``, ``kill within`` (a write) or ``kill after``, the name of an errno, or ``short``.

    ``partly``: a write is cut short before the error, or instead of one (``short``). ``lasting``: all after it fail as
    well. ``statuses`` are how the job may end. ``of`` is the one file that it is about, or all.
    """

    name: str
    operations: frozenset[str]
    action: str
    statuses: Statuses
    lasting: bool = False
    partly: bool = False
    of: str = ""

    def concerns(self, file: str) -> bool:
        """Whether it is about a file of that name."""
        return not self.of or file == self.of

    @property
    def kills(self) -> bool:
        return self.action.startswith("kill")


# fmt: off
FAULTS = {fault.name: fault for fault in (
    Fault("kill-before", EVERYTHING, "kill before", frozenset({KILLED})),
    Fault("kill-within", WRITES, "kill within", frozenset({KILLED})),
    Fault("kill-after", EVERYTHING, "kill after", frozenset({KILLED})),
    Fault("enospc-write", WRITES, "ENOSPC", ALL_SAVED | IN_PART),
    Fault("enospc-cut", WRITES, "ENOSPC", ALL_SAVED | IN_PART, partly=True),
    Fault("enospc-from-here", ROOM, "ENOSPC", ALL_SAVED | IN_PART | REFUSED, lasting=True),
    Fault("edquot-write", WRITES, "EDQUOT", ALL_SAVED | IN_PART),
    Fault("edquot-cut", WRITES, "EDQUOT", ALL_SAVED | IN_PART, partly=True),
    Fault("edquot-from-here", ROOM, "EDQUOT", ALL_SAVED | IN_PART | REFUSED, lasting=True),
    Fault("eio-write", WRITES, "EIO", ALL_SAVED | IN_PART),
    Fault("eio-cut", WRITES, "EIO", ALL_SAVED | IN_PART, partly=True),
    Fault("eio-from-here", EVERYTHING, "EIO", IN_PART | REFUSED, lasting=True),
    Fault("erofs-from-here", EVERYTHING, "EROFS", IN_PART | REFUSED, lasting=True),
    Fault("short-write", WRITES, "short", ALL_SAVED, partly=True),
    Fault("fdatasync-once", frozenset({"fdatasync"}), "EIO", IN_PART),
    Fault("fdatasync-enospc", frozenset({"fdatasync"}), "ENOSPC", IN_PART),
    Fault("fdatasync-edquot", frozenset({"fdatasync"}), "EDQUOT", IN_PART),
    Fault("fdatasync-never", frozenset({"fdatasync"}), "EIO", IN_PART | REFUSED, lasting=True),
    Fault("fsync-directory", frozenset({"fsync"}), "EIO", ALL_SAVED | IN_PART),
    Fault("fsync-never", frozenset({"fsync"}), "EINVAL", IN_PART, lasting=True),
    Fault("rename", frozenset({"rename", "replace"}), "EIO", IN_PART),
    Fault("rename-never", frozenset({"rename", "replace"}), "EPERM", IN_PART, lasting=True),
    Fault("mkdir", frozenset({"mkdir"}), "EIO", REFUSED),
    Fault("mkdir-enospc", frozenset({"mkdir"}), "ENOSPC", REFUSED),
    Fault("create", frozenset({"open"}), "EIO", ALL_SAVED | IN_PART),
    Fault("create-eacces", frozenset({"open"}), "EACCES", ALL_SAVED | IN_PART),
    Fault("fallocate", frozenset({"posix_fallocate"}), "EIO", IN_PART),
    Fault("fallocate-enospc", frozenset({"posix_fallocate"}), "ENOSPC", IN_PART),
    Fault("fchmod", frozenset({"fchmod", "chmod"}), "EPERM", ALL_SAVED),
    Fault("ftruncate", frozenset({"ftruncate"}), "EIO", ALL_SAVED | IN_PART),
    Fault("unlink", frozenset({"unlink", "rmdir"}), "EIO", ALL_SAVED | IN_PART),
)}
# fmt: on
