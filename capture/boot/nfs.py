"""A target on an NFS server: ``nfs:SERVER:/EXPORT``.

The kernel mounts it alone, without mount.nfs: all that this helper would do is to try the versions, which is done here,
and to ask for locks, which one save does not need. The mount is hard: a server that comes back within
``vmcapture.timeout=`` seconds costs nothing, and for one that does not the process that watches has its limit.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from capture import pulse
from capture.boot import mounting
from capture.console import Console
from capture.errors import TargetError, UsageError

PORT, RPCBIND = 2049, 111
VERSIONS = ("4.2", "4.1", "4.0", "3")
"""In the order in which they are tried."""
HARD, SOFT = "hard", "soft,timeo=100,retrans=2"
"""nfs(5): wait for a server that does not answer, or give it up after half a minute."""
_PATIENCE = 3.0
_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024
"""include/uapi/linux/mount.h."""
_OTHER_VERSION = (
    errno.EPROTONOSUPPORT, errno.EPFNOSUPPORT, errno.EINVAL, errno.ENOENT, errno.EIO, errno.EPERM, errno.EACCES,
)  # fmt: skip
"""What may have been answered because of the version: a server may export to one and not to another."""
_UNIQUE_ID = Path("/sys/module/nfs/parameters/nfs4_unique_id")


@contextmanager
def mounted(target: str, wait: int, console: Console, device: str | None = None) -> Iterator[Path]:  # noqa: ARG001
    """Mount ``target``, waiting up to ``wait`` seconds for the server to answer.

    Raises:
        TargetError: it does not, or does not let us mount.
    """
    try:
        export = parse(target)
    except UsageError as error:
        raise TargetError(str(error)) from None
    from capture.boot import network, routes

    route = routes.route_to(export.server)
    address = network.connect(route, PORT, wait, console)
    _identify(next((link.hardware for link in route.links if link.kind == routes.CARD), route.source))

    def mount_it(point: Path) -> None:
        console.say(f"{target}: NFS {mount(export, address, point)} from {address}")

    with mounting.mounted_by(mount_it, target, console) as point:
        yield point


class Export(NamedTuple):
    """What a target names."""

    server: str
    path: str


def parse(target: str) -> Export:
    """Return what ``nfs:SERVER:/EXPORT`` names; an IPv6 address stands in brackets.

    Raises:
        UsageError: it is no such text.
    """
    found = re.fullmatch(r"nfs:(?:\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]|([^\s:/\[\]@,]+)):(/[^\s,]*)", target)
    if found is None:
        raise UsageError(f"{target}: not of the form nfs:SERVER:/EXPORT (an IPv6 address in brackets)")
    return Export(found[1] or found[2], found[3])


def _identify(hardware: str) -> None:
    """Have the server tell this client from others, by the address of a card; not where the command line says how.

    A client of NFS 4.1 and up is known by the host's name, and every capture kernel has the same, "(none)". Of two that
    are known by one name the server takes each for the other after a restart, and ends what that had begun: machines
    that crash together would cut each other short. See Documentation/admin-guide/nfs/nfs-client.rst.
    """
    with contextlib.suppress(OSError):  # no such kernel, or no NFS: mounting tells
        if not _UNIQUE_ID.read_text(encoding="utf-8").strip():
            _UNIQUE_ID.write_text(f"vmcapture-{hardware}", encoding="utf-8")


def mount(export: Export, address: str, point: Path, waits: str = HARD) -> str:
    """Mount the export of the server at ``address`` on ``point``; return the version of NFS that does it.

    ``waits``: HARD or SOFT.

    Raises:
        TargetError: the server does not let us, or this kernel cannot.
    """
    import ctypes  # the process that watches over the job has no need of it

    libc = ctypes.CDLL(None, use_errno=True)
    host, family = (f"[{address}]", "tcp6") if ipaddress.ip_address(address).version == 6 else (address, "tcp")
    failures: list[int] = []
    for version in VERSIONS:
        if version == "3" and not _answers(address, RPCBIND):
            break  # who would say where the rest of it is
        options = f"vers={version},addr={address},proto={family},{waits}"
        if version == "3":
            options += f",nolock,mountproto={family}"
        with pulse.at_target():
            answer = libc.mount(
                os.fsencode(f"{host}:{export.path}"), os.fsencode(point), b"nfs", _MS_NOSUID | _MS_NODEV | _MS_NOATIME,
                options.encode(),
            )  # fmt: skip
        if answer == 0:
            return version
        failures.append(ctypes.get_errno())
        if failures[-1] not in _OTHER_VERSION:
            break
    raise TargetError(_refusal(export, address, failures))


def _answers(address: str, port: int) -> bool:
    from capture.boot.network import knock

    try:
        knock(address, port, _PATIENCE)
    except OSError:
        return False
    return True


def _refusal(export: Export, address: str, failures: list[int]) -> str:
    """Return the line for what each version was answered with."""
    # Whatever a version that the server does not speak says, another one says more.
    telling = [number for number in failures if number not in (errno.EPROTONOSUPPORT, errno.EPFNOSUPPORT)]
    number = next((number for number in (errno.EACCES, errno.EPERM) if number in telling), 0)
    number = number or (telling or failures)[0]
    hidden = f"the server does not export {export.path} to this machine: see /etc/exports there"
    remedy = {
        errno.EACCES: hidden,
        errno.EPERM: hidden,
        errno.ENOENT: hidden,
        errno.ENODEV: "this kernel has no NFS: module nfs",
        errno.EPROTONOSUPPORT: f"no NFS {', '.join(VERSIONS)} there, or no modules nfsv4, nfsv3 here",
    }.get(number, "see to the server")
    return f"nfs:{export.server}:{export.path} cannot be mounted from {address}: {os.strerror(number)}; {remedy}"
