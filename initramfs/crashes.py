"""The crashes that were saved on this host: found by their directories, described by what lies in them.

All of it may come from a dead kernel, and be damaged: sizes are bounded, types are checked, and every text that leaves
here is printable.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.boot.names import DUMP, ENCRYPTED_DUMP, LOG, REGISTERS
from capture.boot.room import Crash, crash_named, made_by_us
from capture.console import printable
from capture.dumpfile.encrypted import SUFFIX
from capture.dumpfile.output import INCOMPLETE_SUFFIX, MANIFEST
from capture.errors import SourceError
from capture.kernel.announcement import is_oops, is_panic
from initramfs.places import Place

WHOLE, INCOMPLETE, WITHOUT_DUMP = "whole", "incomplete", "without dump"
MAX_JSON = 64 << 20
"""Bytes of a manifest: it may list a range of pages for each that was unreadable."""
MAX_LOG = 32 << 20
"""Bytes of a log, its end: the kernel's buffer holds as much at the most (log_buf_len, kernel-parameters.txt)."""
LINES_BEFORE, LINES = 2, 40
"""Lines of the log that are shown: some before the crash is announced, and as many in all."""
_OOPS_BEFORE_PANIC = 200
"""Lines from an oops to the panic that it ends in, at the most."""
_STAMP = re.compile(rb"^\[ *\d+\.\d+\] (?:\[ *[TC]\d+\] )?")
"""What stands before a line's text: its time, and who printed it (``dmesg --caller``)."""


@dataclass(frozen=True, slots=True)
class SavedCrash:
    """One crash. Texts are printable; ``None`` and ``()`` where nothing is known."""

    directory: Path
    shown: str  # what to call its directory
    host: str
    when: datetime
    state: str  # WHOLE, INCOMPLETE or WITHOUT_DUMP
    encrypted: bool
    size: int  # bytes of all files
    dump: Path | None = None
    level: int | None = None
    release: str | None = None
    version: str | None = None
    machine: str | None = None
    panic: str | None = None
    panicked_cpu: int | None = None
    problems: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "directory": self.shown,
            "host": self.host,
            "time": self.when.isoformat(),
            "state": self.state,
            "encrypted": self.encrypted,
            "bytes": self.size,
            "dump": None if self.dump is None else self.dump.name,
            "level": self.level,
            "release": self.release,
            "version": self.version,
            "machine": self.machine,
            "panic": self.panic,
            "panicked_cpu": self.panicked_cpu,
            "problems": list(self.problems),
        }


def find(places: Iterable[Place]) -> list[SavedCrash]:
    """Return the crashes in these places, the newest first. What was not saved by vmcapture is no crash.

    One that cannot be read, because the disk fails, is there all the same, and hides no other.

    Raises:
        OSError: a directory that they are in is there, and cannot be read.
    """
    found: dict[Path, tuple[Crash, Place]] = {}
    for place in places:
        with contextlib.suppress(FileNotFoundError):  # nothing was ever saved
            for named in _ours(place.path):
                found.setdefault((place.path / named.name).resolve(), (named, place))
    newest_first = sorted(found.values(), key=lambda entry: (entry[0].when, entry[0].number), reverse=True)
    return [_described(named, place) for named, place in newest_first]


def _described(named: Crash, place: Place) -> SavedCrash:
    directory, shown = place.path / named.name, f"{place.shown}/{named.name}"
    try:
        return describe(directory, shown)
    except OSError as error:
        problems = (f"cannot be read: {error.strerror or error}",)
        when = named.when.replace(tzinfo=UTC)
        return SavedCrash(directory, printable(shown), named.host, when, WITHOUT_DUMP, False, 0, problems=problems)


def _ours(parent: Path) -> list[Crash]:
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        there = []
        for named in filter(None, map(crash_named, names)):
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                if made_by_us(descriptor, named.name):
                    there.append(named)
        return there
    finally:
        os.close(descriptor)


def describe(directory: Path, shown: str = "") -> SavedCrash:
    """Return what is known of a crash from what lies in its directory, which is to be called ``shown``.

    Raises:
        SourceError: the directory has not the name of a crash.
        OSError: it cannot be read.
    """
    named = crash_named(directory.resolve().name)
    if named is None:
        raise SourceError(
            f"{directory}: not a crash that vmcapture saved: HOST-YYYY-MM-DD-HH:MM:SS is how those are called"
        )
    sizes = {
        entry.name: entry.stat(follow_symlinks=False).st_size
        for entry in os.scandir(directory)
        if entry.is_file(follow_symlinks=False)
    }
    manifest = _object(_json(directory / MANIFEST))
    kernel = _object(manifest.get("kernel"))
    dump = _dump(sizes)
    encrypted = any(name.endswith((SUFFIX, SUFFIX + INCOMPLETE_SUFFIX)) for name in sizes)
    problems = [_text(line) for key in ("failures", "failed", "problems") for line in _list(manifest.get(key))]
    if not manifest:
        problems.append("no manifest: the save did not come to its end")
    return SavedCrash(
        directory=directory,
        shown=printable(shown or str(directory)),
        host=named.host,
        when=named.when.replace(tzinfo=UTC),
        state=WITHOUT_DUMP if dump is None else WHOLE if manifest.get("complete") is True else INCOMPLETE,
        encrypted=encrypted,
        size=sum(sizes.values()),
        dump=None if dump is None else directory / dump,
        level=_number(_object(manifest.get("dump")).get("level")),
        release=_text(kernel.get("release")) or None,
        version=_text(kernel.get("version")) or None,
        machine=_text(kernel.get("machine")) or None,
        panic=_text(kernel.get("panic")) or (None if encrypted else _announced(directory / LOG)),
        panicked_cpu=_number(manifest.get("panicked_cpu")),
        problems=tuple(problems),
    )


def _dump(names: Iterable[str]) -> str | None:
    """Return the name of the dump among these files."""
    candidates = (DUMP, ENCRYPTED_DUMP, DUMP + INCOMPLETE_SUFFIX, ENCRYPTED_DUMP + INCOMPLETE_SUFFIX)
    return next((name for name in candidates if name in names), None)


def excerpt(crash: SavedCrash) -> list[str]:
    """Return the lines of the log around the crash, printable; empty where there is no log that can be read."""
    lines = _log_lines(crash.directory / LOG)
    at, _ = _announcement(list(map(_without_stamp, lines)))
    first = max(0, len(lines) - LINES if at is None else at - LINES_BEFORE)
    return [_text(line.decode("utf-8", "replace")) for line in lines[first : first + LINES]]


def panicked_registers(crash: SavedCrash) -> tuple[int, dict[str, str]] | None:
    """Return the CPU that panicked and its registers as text; None where that is not known."""
    found = _object(_json(crash.directory / REGISTERS))
    cpu = _number(found.get("panicked_cpu"))
    for entry in map(_object, _list(found.get("cpus"))):
        if cpu is not None and _number(entry.get("cpu")) == cpu:
            return cpu, {_text(name): _text(value) for name, value in _object(entry.get("registers")).items()}
    return None


def log_has(crash: SavedCrash, text: str) -> bool:
    """Return whether the dead kernel's log has the text in it."""
    return any(text.encode() in line for line in _log_lines(crash.directory / LOG))


def manifest_files(crash: SavedCrash) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of each file, by its name."""
    files = _object(_object(_json(crash.directory / MANIFEST)).get("files"))
    return {name: _object(said) for name, said in files.items() if "/" not in name}


def _announced(log: Path) -> str | None:
    texts = list(map(_without_stamp, _log_lines(log)))
    begin, panic = _announcement(texts)
    at = begin if panic is None else panic
    return None if at is None else _text(texts[at].decode("utf-8", "replace"))


def _announcement(texts: list[bytes]) -> tuple[int | None, int | None]:
    """Return where the log begins to speak of the crash, and its last panic.

    It begins with the oops that ended in that panic, else with the panic.
    """
    panic = next((number for number in range(len(texts) - 1, -1, -1) if is_panic(texts[number])), None)
    end = len(texts) if panic is None else panic
    oopses = (number for number in range(max(0, end - _OOPS_BEFORE_PANIC), end) if is_oops(texts[number]))
    return next(oopses, panic), panic


def _without_stamp(line: bytes) -> bytes:
    return line[found.end() :] if (found := _STAMP.match(line)) else line


def _log_lines(path: Path) -> list[bytes]:
    for candidate in (path, path.with_name(path.name + INCOMPLETE_SUFFIX)):
        with contextlib.suppress(OSError):
            return _read(candidate, MAX_LOG).splitlines()
    return []


def _json(path: Path) -> Any:  # noqa: ANN401
    """Return what a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(_read(path, MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None


def _read(path: Path, limit: int) -> bytes:
    """Return a regular file's last ``limit`` bytes; no symbolic link is followed, nothing is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        file.seek(max(0, status.st_size - limit))
        return file.read(limit)


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:  # noqa: ANN401
    return printable(value) if isinstance(value, str) else ""


def _number(value: Any) -> int | None:  # noqa: ANN401
    return value if isinstance(value, int) and not isinstance(value, bool) else None
