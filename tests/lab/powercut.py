"""What a disk has when the power goes: what was synced, and of all else what it pleases.

A save is recorded operation by operation, with the begin and the end of each (``tap``). Sure is the data of a file that
was written before an fdatasync of it began that has ended, and a name that was made, changed or removed before an fsync
of its directory began that has ended. Of the data that is not sure, each block of 4 KiB is there or not, as it comes;
of each directory's changes that are not sure, the first few are there: file systems keep them in their order. A
directory that is not sure may be gone with everything in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.builders import PAGE
from tests.lab.tap import NEVER_MADE, UNNAMED, Event

WRITES = ("pwritev", "pwrite", "posix_fallocate")
CHANGES = ("mkdir", "open", "rename", "replace", "unlink", "rmdir")


class Before(NamedTuple):
    """What the disk had before the job: directories, those above first, and files by path with inode and bytes."""

    folders: list[str]
    files: dict[str, tuple[int, bytes]]


def before(root: Path) -> Before:
    """Take what is below ``root`` now, as the tap numbers its files."""
    found = sorted(root.rglob("*"))
    files = {str(path): (path.stat().st_ino * NEVER_MADE, path.read_bytes()) for path in found if path.is_file()}
    return Before([str(path) for path in found if path.is_dir()], files)


class _Write(NamedTuple):
    offset: int
    data: bytes


class _Change(NamedTuple):
    kind: str
    name: str
    target: str
    inode: int


def disk_after(events: Sequence[Event], moment: int, chance: random.Random, root: Path, had: Before, to: Path) -> None:
    """Make at ``to`` what the disk has below ``root`` when the power goes after ``moment`` events; it ``had`` that."""
    past = events[:moment]
    contents = dict(had.files.values())
    for inode in sorted({event.inode for event in past if event.inode}):
        contents[inode] = _content(past, inode, contents.get(inode, b""), chance)
    folders = {folder: to / Path(folder).relative_to(root) for folder in (str(root), *had.folders)}
    for there in folders.values():
        there.mkdir(mode=0o700, parents=True)
    # A directory is in the record before what is in it.
    made = [event.operation.path for event in past if event.ended and event.operation.kind == "mkdir"]
    for folder in (*list(folders), *made):
        if folder not in folders:  # (it was lost)
            continue
        entries = {Path(path).name: inode for path, (inode, _) in had.files.items() if str(Path(path).parent) == folder}
        for change in _surviving(past, folder, chance):
            if change.kind == "mkdir":
                folders.setdefault(str(Path(folder) / change.name), folders[folder] / change.name)
                folders[str(Path(folder) / change.name)].mkdir(mode=0o700)
            elif change.kind == "open":
                entries[change.name] = change.inode
            elif change.kind in ("rename", "replace"):
                entries[change.target] = entries.pop(change.name)
            elif change.kind == "unlink":
                entries.pop(change.name, None)
        for name, inode in entries.items():
            path = folders[folder] / name
            path.write_bytes(contents.get(inode, b""))
            path.chmod(0o600)


def _sure_before(syncs: Iterator[tuple[int, int]]) -> int:
    """The number of the last event at which a sync that has ended began; 0 where there was none."""
    return max((begin for begin, _ in syncs), default=0)


def _syncs(past: Sequence[Event], inode: int = -1, path: str = "") -> Iterator[tuple[int, int]]:
    """The syncs of a file or directory that have ended: numbers of the events at which they began and ended."""
    begun: dict[int, int] = {}
    for at, event in enumerate(past):
        if event.operation.kind in ("fdatasync", "fsync") and (event.inode == inode or event.operation.path == path):
            if event.ended:
                yield begun[event.operation.number], at
            else:
                begun[event.operation.number] = at


def _content(past: Sequence[Event], inode: int, had: bytes, chance: random.Random) -> bytes:
    """The data of a file, which ``had`` some: what is sure, and blocks of what is not."""
    sure = _sure_before(_syncs(past, inode))
    ended = {event.operation.number: at for at, event in enumerate(past) if event.ended}
    disk = bytearray(had)
    for event in past:
        if event.ended or event.inode != inode:
            continue
        done_by = ended.get(event.operation.number)
        if event.operation.kind == "ftruncate":
            if done_by is not None:
                del disk[event.operation.offset :]
        elif event.operation.kind in WRITES:
            if event.operation.kind == "posix_fallocate":
                disk.extend(bytes(max(0, event.operation.offset + len(event.data) - len(disk))))
                continue
            certain = done_by is not None and done_by < sure
            for block in _blocks(event.operation.offset, event.data):
                if certain or chance.random() < 0.5:
                    end = block.offset + len(block.data)
                    disk.extend(bytes(max(0, end - len(disk))))
                    disk[block.offset : end] = block.data
    return bytes(disk)


def _blocks(offset: int, data: bytes) -> Iterator[_Write]:
    at = 0
    while at < len(data):
        take = min(len(data) - at, PAGE - (offset + at) % PAGE)
        yield _Write(offset + at, data[at : at + take])
        at += take


def _surviving(past: Sequence[Event], folder: str, chance: random.Random) -> list[_Change]:
    """The changes of a directory that the disk has: all that are sure, and some of those after them."""
    sure = _sure_before(_syncs(past, path=folder))
    changes: list[tuple[int, _Change]] = []
    for at, event in enumerate(past):
        kind, path = event.operation.kind, Path(event.operation.path)
        if event.ended and kind in CHANGES and str(path.parent) == folder and event.operation.file != UNNAMED:
            changes.append((at, _Change(kind, path.name, Path(event.target).name, event.inode)))
    certain = [change for at, change in changes if at < sure]
    others = [change for at, change in changes if at >= sure]
    return certain + others[: chance.randint(0, len(others))]


def promised(events: Sequence[Event], moment: int, files: Sequence[str]) -> list[str]:
    """The files that have to be whole on the disk by then: the next one of the order has been begun."""
    created = [
        Path(event.operation.path).name.removesuffix(".incomplete")
        for event in events[:moment]
        if event.operation.kind == "open" and not event.ended and event.operation.file != UNNAMED
    ]
    latest = max((files.index(name) for name in created if name in files), default=0)
    return list(files[:latest])
