"""Whether a target could be reached now, and what room is there, without changing anything on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from capture.boot import nfs, ssh
from capture.boot.targets import LOCAL, NFS, RAW, SSH, kind_of, place_of
from capture.errors import CaptureError
from initramfs import devices, places, superblock
from initramfs.superblock import Room

TIMEOUT = 3
"""Seconds for a server to answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """One target. Sizes in bytes, None where they cannot be known from here; ``reached`` None: it cannot be tried."""

    target: str
    reached: bool | None
    what: str
    remedy: str = ""
    free: int | None = None
    total: int | None = None


def reach(target: str, path: str) -> Target:
    """Return what is known of a target now; ``path`` is the directory on it."""
    kinds: dict[str, Callable[[str, str], Target]] = {
        LOCAL: _local, RAW: _raw, NFS: _nfs, SSH: _ssh,
    }  # fmt: skip
    try:
        return kinds.get(kind_of(target), _untried)(target, path)
    except (CaptureError, OSError, UnicodeError) as error:  # (of a name that cannot be looked up)
        return Target(target, False, f"{target}: {places.reason(error, target)}", "vmcapture test tries it")


def _local(target: str, path: str) -> Target:
    device = devices.find_device(target)
    if device is None:
        return Target(target, False, devices.absent(target), "attach it, or name another target")
    name = target if target == str(device) else f"{target} ({device})"
    there = places.mounted(device, path)
    found = superblock.room(device) if there is None else _room_of_mount(there)
    if found is None:
        return Target(target, True, f"{name} is there; how much room is on it is not known: it is not mounted")
    kind = "" if there is not None else ", not mounted"
    return Target(target, True, f"{name}{kind}", free=found.free, total=found.total)


def _room_of_mount(path: Path) -> Room:
    while not path.exists():
        path = path.parent
    volume = os.statvfs(path)
    return Room(volume.f_bfree * volume.f_frsize, volume.f_blocks * volume.f_frsize)


def _raw(target: str, _path: str) -> Target:
    word = place_of(target)
    device = _partition(word)
    if device is None:
        return Target(target, False, devices.absent(word), "attach it, or name another target")
    with device.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    return Target(target, True, f"{target} ({device})", free=size, total=size)


def _partition(word: str) -> Path | None:
    tag, equals, value = word.partition("=")
    if not equals:
        return Path(word) if Path(word).exists() else None
    link = Path("/dev/disk") / f"by-{tag.lower()}" / value
    return link.resolve() if link.exists() else None


def _nfs(target: str, _path: str) -> Target:
    return _answers(target, nfs.parse(target).server, nfs.PORT)


def _ssh(target: str, _path: str) -> Target:
    login = ssh.parse(target)
    return _answers(target, login.host, login.port)


def _answers(target: str, host: str, port: int) -> Target:
    with socket.create_connection((host, port), TIMEOUT):
        pass
    return Target(target, True, f"{target}: port {port} answers; vmcapture test tries whether it can be written")


def _untried(target: str, _path: str) -> Target:
    return Target(target, None, f"{target}: vmcapture test tries it")
