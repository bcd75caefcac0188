"""Targets on other machines, NFS and SSH: what both need in the image, and the trial of a save while all is well.

A server is tried as the capture kernel will use it: mounted by the same code, with the key and the host key of the
image, and a file is written where the dumps will be. What can be wrong there is one line at build time.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from capture.boot import routes
from capture.boot.mounting import inside
from capture.boot.routes import Route
from capture.dumpfile.output import TargetFullError, target_error
from capture.errors import CaptureError
from initramfs import mounting, network, tools
from initramfs.devices import Needed
from initramfs.errors import ImageError, ToolError
from initramfs.image import BUSYBOX_PACKAGE, static_busybox
from initramfs.wishes import Say

_PROBE = b"vmcapture was here, and has forgotten to remove this file\n"


def needed(route: Route) -> Needed:
    """Return what the image has to hold to bring up what leads to a server.

    Raises:
        ImageError: this busybox cannot do that.
    """
    busybox = static_busybox()
    lacking = set(network.APPLETS) - set(tools.run([busybox, "--list"]).split())
    if lacking:
        raise ImageError(f"{busybox} has no {' and no '.join(sorted(lacking))}: install {BUSYBOX_PACKAGE} that has it")
    place = routes.place_of(route.server)
    return network.modules(route) + Needed(files=((str(place), routes.dump(route)),))


def routes_in(files: tuple[tuple[str, Path | bytes], ...]) -> list[Route]:
    """Return the routes among the files of an image."""
    return [
        routes.parse(content)
        for place, content in files
        if isinstance(content, bytes) and Path(place).parent == routes.PLACE
    ]


@contextmanager
def tried(target: str, route: Route, port: int, mount: Callable[[Path, Path], object]) -> Iterator[Path]:
    """Have ``mount`` mount a target on the directory that it is given, yield that, and unmount it.

    The second thing that it is given is a directory for secrets, in memory where there is one.

    Raises:
        ImageError: the server does not answer at the port.
    """
    if not network.answers(route.address, port):
        raise ImageError(
            f"{target}: {route.address} does not answer at port {port}: see to the server and its firewall, or build "
            "with --no-check"
        )
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vmcapture-", dir=shared if shared.is_dir() else None) as scratch:
        try:
            with mounting.mounted_by(lambda point: mount(point, Path(scratch))) as point:
                yield point
        except ToolError as error:
            raise ImageError(f"{target}: {error}") from None


def probe(root: Path, path: str, target: str) -> None:
    """Write, sync, rename and remove a file where the dumps will be.

    Raises:
        ImageError: something of that cannot be done.
        TargetError: the directory is a link that leads away from the server.
    """
    place = inside(root, path, target)
    while not place.exists():
        place = place.parent
    there = f"/{place.relative_to(root)}".replace("/.", "/")
    first, second = (place / f".vmcapture-{secrets.token_hex(4)}" for _ in range(2))
    try:
        try:
            with os.fdopen(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_PROBE)
                file.flush()
                os.fsync(file.fileno())
            first.rename(second)
        finally:
            for name in (first, second):
                name.unlink(missing_ok=True)
    except OSError as error:
        remedy = {
            errno.EROFS: "the server lets nobody write: export it rw",
            errno.EACCES: "give the user that writes there this directory",
            errno.EPERM: "give the user that writes there this directory",
            errno.ENOSPC: "make room there",
            errno.EDQUOT: "make room there",
        }.get(error.errno or 0, "no dump could be written there")
        if isinstance(target_error(place, "writing", error), TargetFullError):  # sshfs has other numbers for it
            remedy = "make room there"
        raise ImageError(f"{target}: {there} on it cannot be written: {error.strerror}; {remedy}") from None


def have_module(name: str) -> None:
    """Have the running kernel load a module, for the trial; what is built in, or cannot be loaded, shows later."""
    modprobe = tools.find("modprobe")
    if modprobe is not None:
        try:
            tools.run([modprobe, "-q", name])
        except ToolError:
            return


def doubt(target: str, server: str, port: int, say: Say) -> None:
    """Say why a server cannot be reached now, if it cannot."""
    try:
        route = network.route_to(server, port)
    except CaptureError as error:
        say(f"{target}: {error}")
        return
    if not network.answers(route.address, port):
        say(f"{target}: {route.address} does not answer at port {port} now")
