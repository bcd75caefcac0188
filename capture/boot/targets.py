"""The targets that the command line names: which kind each is of, and who mounts that.

A target is ``KIND:…``, or names a local file system: ``LABEL=…``, ``UUID=…``, ``/dev/…``. Each kind has a module of its
own, imported when its turn comes: what the process that watches takes, the job lacks.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, cast

from capture.console import Console
from capture.errors import TargetError

LOCAL, RAW, VIRTIOFS, NFS, SSH = "", "raw", "virtiofs", "nfs", "ssh"
KINDS = {
    LOCAL: "capture.boot.local",
    RAW: "capture.boot.raw",
    VIRTIOFS: "capture.boot.virtiofs",
    NFS: "capture.boot.nfs",
    SSH: "capture.boot.ssh",
}
"""What stands before the first colon → the module whose ``mounted`` mounts such a target."""
WAITS_FROM_ITS_TURN = {NFS, SSH}
"""Kinds for which nothing is done before: what was waited for others, as for a disk, has not brought them nearer."""
_WAIT, _WAIT_FOR_SERVER = 30, 60
"""Seconds. A card takes up to ten to agree with its switch, and where that runs a spanning tree (IEEE 802.1D) it
forwards nothing for twice 15 more."""


class Mounted(Protocol):
    """What a kind does: it mounts ``target`` and gives the directory, waiting up to ``wait`` seconds for what it needs.

    ``device`` is where it was found before (``devices_of``), for kinds that look for one. It raises TargetError, and
    nothing else, when that is not there or cannot be mounted read-write.
    """

    def __call__(  # noqa: D102
        self, target: str, wait: int, console: Console, device: str | None = None
    ) -> AbstractContextManager[Path]: ...


def kind_of(target: str) -> str:
    """Return the kind of a target, a key of KINDS: what stands before its first colon, where no ``=`` does."""
    before, colon, _ = target.partition(":")
    return before if colon and "=" not in before and "/" not in before else LOCAL


def place_of(target: str) -> str:
    """Return the target without its kind: what stands behind the first colon, or all of a local one."""
    return target if kind_of(target) == LOCAL else target.partition(":")[2]


def patience(target: str, wait: int | None) -> int:
    """Return the seconds to wait for a target: ``wait``, and where nobody said that, what is usual for its kind."""
    if wait is not None:
        return wait
    return _WAIT_FOR_SERVER if kind_of(target) in WAITS_FROM_ITS_TURN else _WAIT


def mounted_target(
    target: str, wait: int | None, console: Console, device: str | None = None
) -> AbstractContextManager[Path]:
    """Mount ``target``, waiting up to ``wait`` seconds for what it needs to appear; see ``patience`` and ``Mounted``.

    Raises:
        TargetError: it cannot be mounted read-write, or nobody knows how.
    """
    kind = kind_of(target)
    if kind not in KINDS:
        raise TargetError(f"target {target}: no such kind of target; mount any disk and name it: vmcapture save DIR")
    mounted = cast("Mounted", importlib.import_module(KINDS[kind]).mounted)
    return mounted(target, patience(target, wait), console, device)


def devices_of(targets: Iterable[str]) -> dict[str, str]:
    """Return the devices of those targets that are there now.

    To look for them, all disks are read, once: to be done before any of them hangs.
    """
    from capture import pulse
    from capture.boot import superblocks
    from capture.boot.local import look_up, tag_of
    from capture.boot.volumes import Assembly

    found: dict[str, str] = {}
    on_disk = [target for target in targets if kind_of(target) in (LOCAL, RAW)]
    if on_disk:
        Assembly().go_on()
    with pulse.at_target():
        known = superblocks.devices_with(map(tag_of, map(place_of, on_disk)))
    for target in on_disk:
        with contextlib.suppress(TargetError):
            device = look_up(place_of(target), known)
            if device is not None:
                found[target] = device
    return found
