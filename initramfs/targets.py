"""The targets that a save can go to, seen from the healthy machine: what each kind needs, and how it is handed over.

Each kind has a row in KINDS, and a module of its own on both sides: capture.boot.targets has those that mount it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from capture.boot.targets import LOCAL, kind_of
from capture.errors import UsageError
from initramfs import local
from initramfs.devices import Mount, Needed

Say = Callable[[str], object]


class Kind(NamedTuple):
    """One kind of target.

    ``needed``: what the image has to hold for a target, which raises CaptureError where that cannot work.
    ``named``: the target as the capture kernel finds it, and what is doubtful of it said; raises alike.
    ``filesystems``: types in /proc/self/mountinfo that are of this kind; ``of_mount`` tells the target behind one.
    """

    needed: Callable[[str], Needed]
    named: Callable[[str, Say], str]
    filesystems: tuple[str, ...] = ()
    of_mount: Callable[[Mount], str] | None = None


KINDS = {
    LOCAL: Kind(local.needed, local.named),
}
"""What stands before a target's first colon → its kind, with the same keys as capture.boot.targets.KINDS."""

SAMPLES = ("UUID=…", "LABEL=…", "/dev/…")


def _kind(target: str) -> Kind:
    try:
        return KINDS[kind_of(target)]
    except KeyError:
        raise UsageError(f"{target}: no such kind of target; known: {', '.join(SAMPLES)}") from None


def needed_by(target: str) -> Needed:
    """Return what an image has to hold for a save on ``target``.

    Raises:
        CaptureError: it is not there, or no save on it could work.
    """
    return _kind(target).needed(target)


def needed_by_mount(mount: Mount) -> Needed:
    """Return what an image has to hold for a save on what is mounted there; raises as ``needed_by`` does."""
    target = _target_of(mount)
    return local.needed_by_mount(mount) if target is None else needed_by(target)


def named(target: str, say: Say) -> str:
    """Return the target as the capture kernel finds it; what is doubtful of it is said.

    Raises:
        CaptureError: no save on it could work.
    """
    return _kind(target).named(target, say)


def named_mount(mount: Mount) -> str:
    """Return what is mounted there as the capture kernel finds it; raises as ``named`` does."""
    return _target_of(mount) or local.named_mount(mount)


def _target_of(mount: Mount) -> str | None:
    """Return the target behind a mount; None where that is a local file system."""
    for kind in KINDS.values():
        if mount.kind in kind.filesystems and kind.of_mount is not None:
            return kind.of_mount(mount)
    return None
