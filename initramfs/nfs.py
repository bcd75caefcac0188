"""A target on an NFS server, seen from the healthy machine."""

from __future__ import annotations

from pathlib import Path

from capture.boot import nfs
from initramfs import network, remote
from initramfs.devices import Mount, Needed
from initramfs.wishes import Say, Wishes

FILE_SYSTEMS = ("nfs", "nfs4")
MEMORY = 4 << 20
"""Bytes that the client takes in the kernel, its modules included."""
_MODULES, _OPTIONAL = ("nfs", "nfsv4"), ("nfsv3",)


def needed(target: str, wishes: Wishes) -> Needed:
    """Return what the image has to hold for a save there; try it first.

    Raises:
        CaptureError: the server cannot be reached, or does not take a file.
    """
    export = nfs.parse(target)
    route = network.route_to(export.server, nfs.PORT)
    has = remote.needed(route) + Needed(_MODULES, _OPTIONAL)
    if wishes.check:
        remote.have_module("nfs")

        def mount(point: Path, _scratch: Path) -> None:
            nfs.mount(export, route.address, point, nfs.SOFT)  # nobody watches here

        with remote.tried(target, route, nfs.PORT, mount) as point:
            remote.probe(point, wishes.path, target)
    return has


def named(target: str, say: Say) -> str:
    """Return the target; say whether the server does not answer now.

    Raises:
        UsageError: it is none.
    """
    export = nfs.parse(target)
    remote.doubt(target, export.server, nfs.PORT, say)
    return target


def of_mount(mount: Mount) -> str:
    """Return the target that is mounted there."""
    return f"nfs:{mount.device}"
