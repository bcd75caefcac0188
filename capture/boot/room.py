"""Room on the target: after a save that is whole, older crashes of the same host go, the oldest first.

Never before: an old dump may be the only one that there will be. Never the crash just saved, never another host's, and
never what is not of our making: a directory counts as a crash when it has the name that ``capture.boot.job`` gives and
holds a manifest that we wrote, ``vmcore.incomplete``, or ``vmcore`` beside registers, or the same encrypted. Of it go
the files that a save makes, and the directory when nothing else is in it. All is done through open directories, so that
no symbolic link is followed, whoever puts one there meanwhile.

Whatever fails here costs a line on the console and nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from capture import pulse
from capture.boot.names import DUMP, ENCRYPTED_DUMP, REGISTERS, REGISTERS_TEXT
from capture.console import Console
from capture.dumpfile.encrypted import SUFFIX
from capture.dumpfile.output import INCOMPLETE_SUFFIX, MANIFEST, sync_file_system
from capture.errors import UsageError

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MAX_PERCENT = 99

_NAME = re.compile(
    r"([A-Za-z0-9._-]+)-([0-9]{4}-[0-9]{2}-[0-9]{2})-([0-9]{2}:[0-9]{2}:[0-9]{2})(?:-([1-9][0-9]{0,3}))?", re.ASCII
)
"""Host, day, time and number, as ``capture.boot.job`` puts them together. A host name has no colon there."""
_FILE = re.compile(
    r"((vmcore-dmesg\.txt|registers\.(txt|json)|capture-log(-[0-9]{1,2})?\.txt)(\.age)?"
    r"|vmcore|vmcore\.flat\.age|manifest\.json|manifest-full\.json\.age)(\.incomplete)?"
    r"|\.order-[a-z0-9_]{8}|\.fuse_hidden[0-9a-f]{16}|\.nfs[0-9a-f]{24}",
    re.ASCII,
)
"""What a save makes. The last line: files without a name (capture.dumpfile.output.unnamed_file), which FUSE and NFS
call so as long as they are open, and which stay on a server when the connection to it breaks.
"""
_WRITTEN_BY = b'"written_by": "vmcapture '
_MANIFEST_START = 512  # bytes; the second line of it says who wrote it
_BESIDE = (REGISTERS_TEXT, REGISTERS)
_DUMPS = {DUMP: _BESIDE, ENCRYPTED_DUMP: tuple(name + SUFFIX for name in _BESIDE)}
"""What a dump is called, plain and encrypted, and what lies beside it."""
_LAST = {**dict.fromkeys(_DUMPS, -1), **{f"{dump}{INCOMPLETE_SUFFIX}": 1 for dump in _DUMPS}, MANIFEST: 2}
"""In which order files go: last what a directory is known by, so that the next save goes on with one that was begun."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_POLL = 0.1
_POLLS = 50


class Floor(NamedTuple):
    """Room that is to be left on the target: ``size`` bytes, and ``percent`` of the size of its file system."""

    size: int = 0
    percent: int = 0

    def of(self, total: int) -> int:
        """Return the bytes that are to be left of ``total`` bytes."""
        return self.size + -(-total * self.percent // 100)


def parse_floor(text: str) -> Floor:
    """Return what ``10G`` (bytes; K, M, G and T are powers of 1024) or ``10%`` (0 to 99) ask for.

    Raises:
        UsageError: it is neither.
    """
    found = re.fullmatch(r"([0-9]{1,15})([KMGTkmgt]?)|([0-9]{1,2})%", text)
    if found is None:
        raise UsageError(f"{text}: room is a size, 500M, 10G, or a part of the file system, 0% to {_MAX_PERCENT}%")
    size, unit, percent = found.groups()
    return Floor(percent=int(percent)) if percent else Floor(int(size) << _UNITS[unit.upper()])


def make_room(saved: Path, keep: int | None, floor: Floor | None, console: Console) -> None:
    """Remove older crashes beside ``saved``, the directory of a crash that is whole and on the disk.

    ``keep`` is how many of this host's stay, ``saved`` included, None for all; then more go until ``floor`` is free, or
    only ``saved`` is left. Never raises: what was removed and what could not be is said, a line each.
    """
    try:
        parent = os.open(saved.parent, _DIRECTORY)
        try:
            _Pruning(parent, saved.name, console).run(keep, floor)
        finally:
            os.close(parent)
    except OSError as error:
        where = f"{saved.parent}/{error.filename}" if isinstance(error.filename, str) else f"{saved.parent}"
        console.say(f"{where}: making room failed: {error.strerror}; this crash is saved, older ones are left")
    except KeyboardInterrupt:
        console.say("making room was interrupted; this crash is saved, the next save goes on with it")
    except Exception as error:  # (a bug here must not cost what is saved its exit status)
        console.say(f"making room: internal error: {type(error).__name__}: {error}; this crash is saved")


class Crash(NamedTuple):
    """A directory of a crash; in order of age."""

    when: datetime
    number: int
    name: str
    host: str


def crash_named(name: str) -> Crash | None:
    """Return what a directory's name says; None when it is not a name of ours."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    host, day, clock, number = found.groups()
    try:
        return Crash(datetime.fromisoformat(f"{day} {clock}"), int(number or 0), name, host)
    except ValueError:
        return None


def made_by_us(parent: int, name: str) -> bool:
    """Return whether a save of ours made the directory ``name`` of the open directory ``parent``.

    Raises:
        OSError: it cannot be looked into.
    """
    folder = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        if os.fstat(folder).st_dev != os.fstat(parent).st_dev:
            return False  # another file system is mounted there
        with os.scandir(folder) as entries:
            files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        for dump, beside in _DUMPS.items():
            if f"{dump}{INCOMPLETE_SUFFIX}" in files or (dump in files and files.intersection(beside)):
                return True
        return MANIFEST in files and _WRITTEN_BY in _start(folder, MANIFEST)
    finally:
        os.close(folder)


class _Pruning:
    """Makes room in the open directory ``parent`` for those that come after the crash called ``saved``."""

    def __init__(self, parent: int, saved: str, console: Console) -> None:
        self._parent = parent
        self._saved = saved
        self._console = console
        self._polls = _POLLS
        volume = os.fstatvfs(parent)
        self._expected = volume.f_bfree * volume.f_frsize

    def run(self, keep: int | None, floor: Floor | None) -> None:
        older = self._older()
        surplus = [] if keep is None else older[: max(0, len(older) + 1 - keep)]
        for crash in surplus:
            self._remove(crash.name, f"vmcapture.keep={keep}")
        if floor is not None:
            self._hold(floor, older[len(surplus) :])
        os.fsync(self._parent)

    def _older(self) -> list[Crash]:
        """Return the other crashes of this host, the oldest first."""
        mine = crash_named(self._saved)
        with os.scandir(self._parent) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        named = [crash for name in names if name != self._saved and (crash := crash_named(name)) is not None]
        return sorted(crash for crash in named if mine and crash.host == mine.host and self._is_ours(crash.name))

    def _is_ours(self, name: str) -> bool:
        """Return whether a save of ours made the directory."""
        try:
            return made_by_us(self._parent, name)
        except OSError as error:
            self._failed(name, error, "looking into it failed")
            return False

    def _hold(self, floor: Floor, older: list[Crash]) -> None:
        """Remove crashes until the floor is free."""
        volume = os.fstatvfs(self._parent)
        total = volume.f_blocks * volume.f_frsize
        wanted = floor.of(total)
        if wanted > total:
            self._console.say(f"vmcapture.free= wants {_mib(wanted)} of {_mib(total)} left: nothing was removed for it")
            return
        for crash in older:
            if (free := self._free(wanted)) >= wanted:
                return
            self._remove(crash.name, f"vmcapture.free= wants {_mib(wanted)} left, {_mib(free)} were")
        if (free := self._free(wanted)) < wanted:
            self._console.say(
                f"{_mib(free)} are left, vmcapture.free= wants {_mib(wanted)}: no older crash of this host is left"
            )

    def _free(self, wanted: int) -> int:
        """Return the bytes that are free for everybody.

        Some file systems give back later what was removed (XFS, btrfs); until then a crash more would go for nothing.
        """
        while True:
            volume = os.fstatvfs(self._parent)
            free = volume.f_bavail * volume.f_frsize
            if free >= wanted or volume.f_bfree * volume.f_frsize >= self._expected or not self._polls:
                return free
            self._polls -= 1
            sync_file_system(self._parent)
            time.sleep(_POLL)

    def _remove(self, name: str, why: str) -> None:
        """Remove the files of a crash, and its directory when nothing else is in it.

        Raises:
            OSError: the disk is read-only: nothing can be removed from it.
        """
        before = self._expected
        try:
            strangers = self._empty(name)
            if not strangers:
                os.rmdir(name, dir_fd=self._parent)
        except FileNotFoundError:
            return  # somebody else was faster
        except OSError as error:
            if error.errno == errno.EROFS:  # (a kernel that found the file system damaged); EIO may be one directory's
                raise
            self._failed(name, error, "removing it failed")
            return
        taken = _mib(self._expected - before)
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            self._console.say(
                f"{name}: removed ({taken}) but for {strangers[0]}{more}, not of vmcapture's making: {why}"
            )
        else:
            self._console.say(f"removed {name} ({taken}): {why}")

    def _empty(self, name: str) -> list[str]:
        """Remove our files from a directory; return the names of what is not ours."""
        folder = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._parent)
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: (_LAST.get(entry.name, 0), entry.name))
                strangers = []
                for entry in found:
                    if not (_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                        strangers.append(entry.name)
                        continue
                    there = entry.stat(follow_symlinks=False)
                    with pulse.at_target():
                        os.unlink(entry.name, dir_fd=folder)
                    if there.st_nlink == 1:
                        self._expected += there.st_blocks * 512
            return strangers
        finally:
            os.close(folder)

    def _failed(self, name: str, error: OSError, what: str) -> None:
        where = f"{name}/{error.filename}" if isinstance(error.filename, str) and error.filename != name else name
        self._console.say(f"{where}: {what}: {error.strerror}; it is left")


def _start(folder: int, name: str) -> bytes:
    """Return the first bytes of a file in an open directory."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, _MANIFEST_START)
    finally:
        os.close(fd)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
