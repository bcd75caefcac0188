"""``vmcapture collect``: takes the crashes off a raw partition, where the capture kernel made a file system for them.

Each copy is read back from the disk and held against its original and the crash's manifest. Only when all of them are
right does the partition lose its file system, so that the next crash finds it empty; a run that was cut short is gone
on with by the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from capture.boot.raw import FILE_SYSTEM, LABEL, describe, is_ours, signature
from capture.cli import Subparsers, command
from capture.console import Console
from capture.dumpfile.output import HASH_BLOCK, MANIFEST, digests_of, fsync_directory
from initramfs import devices, mounting
from initramfs.errors import CollectError

DESTINATION = Path("/var/crash")
_UNFINISHED = ".collecting-"
"""What a crash's name begins with until all of it is there."""
_BLOCK = 4 << 20
_WIPED = 64 << 10
"""Bytes that are zeroed: the superblock, by which a file system is known, and what stands around it."""
_MAX_NUMBER = 9999


class Collected(NamedTuple):
    """One crash: where it is now, and its size in bytes; ``again``: it was there already."""

    directory: Path
    size: int
    again: bool


def add_command(subparsers: Subparsers) -> None:
    """Add ``collect``."""
    parser = command(subparsers, "collect", run_collect, "take saved crashes off a raw partition (raw: targets)")
    add = parser.add_argument
    add("--to", type=Path, default=DESTINATION, metavar="DIR", help="where they go (default: %(default)s)")
    add(
        "device", nargs="?", metavar="DEV|PARTUUID=",
        help=f"the partition (default: all that a capture kernel has called {LABEL})",
    )  # fmt: skip


def run_collect(args: argparse.Namespace) -> int:
    """Take everything off the partition that is named, or off all that there are."""
    console = Console(quiet=args.quiet)
    if args.device:
        node = devices.find_device(args.device, tags=("LABEL", "PARTUUID"))
        if node is None:
            raise CollectError(f"{args.device}: no block device of this machine carries it now")
        nodes = [node]
    else:
        nodes = devices.all_with_label(LABEL)
        if not nodes:
            console.say(f"nothing to collect: no partition is called {LABEL}")
    for node in nodes:
        collect(node, args.to, console.say)
    return 0


def collect(node: Path, destination: Path, say: Callable[[str], object]) -> list[Collected]:
    """Copy every crash on the partition ``node`` to a directory of its own below ``destination``, then empty it.

    Raises:
        CollectError: it is not one of ours, or a crash could not be brought over whole; the partition is as it was.
    """
    found = signature(str(node))
    if found is None:
        say(f"{node}: nothing to collect")
        return []
    if not is_ours(found):
        raise CollectError(f"{node} has {describe(found)} on it, which no capture kernel made: left alone")
    with mounting.mounted_for_now(node, "ro,nodev,nosuid,noexec", FILE_SYSTEM) as root:
        crashes = sorted({path.parent for path in root.rglob("*") if path.is_file() and not path.is_symlink()})
        collected = [_bring(crash, destination, node) for crash in crashes]
    for crash in collected:
        there = " was there already" if crash.again else f" ({crash.size / (1 << 20):.1f} MiB)"
        say(f"collected from {node}: {crash.directory}{there}")
    _wipe(node)
    say(f"{node} is empty again" if collected else f"{node}: no crash on it; it is empty again")
    return collected


def _bring(crash: Path, destination: Path, node: Path) -> Collected:
    files = sorted(path for path in crash.iterdir() if path.is_file() and not path.is_symlink())
    size = sum(path.stat().st_blocks * 512 for path in files)
    digests = {path.name: digests_of(path) for path in files}
    _hold_against_manifest(crash, digests, node)
    place = _free_name(destination / crash.name, digests)
    if place.exists():
        return Collected(place, size, again=True)
    unfinished = destination / f"{_UNFINISHED}{place.name}"
    try:
        destination.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        free = os.statvfs(destination)
        if free.f_bavail * free.f_frsize < size:
            raise CollectError(_no_room(destination, crash, size, node))
        unfinished.mkdir(mode=0o700)
        for path in files:
            _copy(path, unfinished / path.name)
        if any(digests_of(unfinished / name) != right for name, right in digests.items()):
            raise CollectError(f"{place}: what was copied reads back wrong; {node} is left as it is")
        fsync_directory(unfinished)
        shutil.copystat(crash, unfinished)
        unfinished.rename(place)
        fsync_directory(destination)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CollectError(_no_room(destination, crash, size, node)) from None
        raise CollectError(f"{error.filename or place}: {error.strerror}; {node} is left as it is") from None
    return Collected(place, size, again=False)


def _no_room(destination: Path, crash: Path, size: int, node: Path) -> str:
    return (
        f"{destination} has no room for {crash.name} ({size / (1 << 20):.0f} MiB): make room, or name another "
        f"directory with --to; {node} is left as it is"
    )


def _hold_against_manifest(crash: Path, digests: dict[str, list[str]], node: Path) -> None:
    """Hold the files of a crash against what its manifest says of them; one that was cut short may have none.

    Raises:
        CollectError: one is not what was written.
    """
    try:
        manifest = json.loads((crash / MANIFEST).read_bytes())
        files = manifest["files"] if manifest["hash_block"] == HASH_BLOCK else {}
        said = {name: values.get("sha256_blocks") or [values["sha256"]] for name, values in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name, right in said.items():
        if name in digests and digests[name] != right:
            raise CollectError(
                f"{node}: {crash.name}/{name} is not what was written (SHA-256 in its manifest); nothing was removed: "
                f"mount -o ro {node} /mnt, and save what can be saved"
            )


def _free_name(place: Path, digests: dict[str, list[str]]) -> Path:
    """Return ``place``, with a number behind where another crash has that name; one that exists is this crash."""
    for number in range(_MAX_NUMBER + 1):
        candidate = place.with_name(f"{place.name}-{number}") if number else place
        if not candidate.exists() or _is_the_same(candidate, digests):
            return candidate
    raise CollectError(f"{place}: {_MAX_NUMBER} crashes have this name; move some of them away")


def _is_the_same(directory: Path, digests: dict[str, list[str]]) -> bool:
    with contextlib.suppress(OSError):
        return all(digests_of(directory / name) == right for name, right in digests.items())
    return False


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its holes, bring it to the disk, and forget it: it is to be read back from there."""
    with source.open("rb") as reading, target.open("xb") as writing:
        os.fchmod(writing.fileno(), 0o600)
        while block := reading.read(_BLOCK):
            if block.count(0) == len(block):
                writing.seek(len(block), os.SEEK_CUR)
            else:
                writing.write(block)
        writing.truncate(source.stat().st_size)
        writing.flush()
        os.fsync(writing.fileno())
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shutil.copystat(source, target)


def _wipe(node: Path) -> None:
    try:
        handle = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.pwrite(handle, bytes(_WIPED), 0)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        why = "it is mounted: unmount it" if error.errno == errno.EBUSY else error.strerror
        raise CollectError(f"{node}: all is collected, but it cannot be emptied: {why}, and collect again") from None
