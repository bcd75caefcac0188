"""The targets that a save can go to, seen from the healthy machine: what each kind needs, and how it is handed over.

Each kind has a row in KINDS, and a module of its own on both sides: capture.boot.targets has those that mount it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from capture.boot.targets import LOCAL, NFS, RAW, SSH, VIRTIOFS, kind_of
from capture.errors import CaptureError, UsageError
from initramfs import local, nfs, raw, ssh, virtiofs
from initramfs.devices import Mount, Needed, is_loaded
from initramfs.errors import ImageError
from initramfs.image import load_order, ordered_names
from initramfs.modules import normal
from initramfs.wishes import Say, Wishes


class Kind(NamedTuple):
    """One kind of target.

    ``needed``: what the image has to hold for a target, which raises CaptureError where that cannot work.
    ``named``: the target as the capture kernel finds it, and what is doubtful of it said; raises alike.
    ``memory``: bytes that a save there takes more than one on a disk; the image's own size is counted elsewhere.
    ``filesystems``: types in /proc/self/mountinfo that are of this kind; ``of_mount`` tells the target behind one.
    """

    needed: Callable[[str, Wishes], Needed]
    named: Callable[[str, Say], str]
    memory: int = 0
    filesystems: tuple[str, ...] = ()
    of_mount: Callable[[Mount], str] | None = None


KINDS = {
    LOCAL: Kind(local.needed, local.named),
    RAW: Kind(raw.needed, raw.named),
    VIRTIOFS: Kind(virtiofs.needed, virtiofs.named, filesystems=(VIRTIOFS,), of_mount=virtiofs.of_mount),
    NFS: Kind(nfs.needed, nfs.named, nfs.MEMORY, nfs.FILE_SYSTEMS, nfs.of_mount),
    SSH: Kind(ssh.needed, ssh.named, ssh.MEMORY),
}
"""What stands before a target's first colon → its kind, with the same keys as capture.boot.targets.KINDS."""

SAMPLES = (
    "UUID=…", "LABEL=…", "/dev/…", "raw:PARTUUID=…", "virtiofs:TAG", "nfs:SERVER:/EXPORT", "ssh:USER@HOST[:PORT]",
)  # fmt: skip


def _kind(target: str) -> Kind:
    try:
        return KINDS[kind_of(target)]
    except KeyError:
        raise UsageError(f"{target}: no such kind of target; known: {', '.join(SAMPLES)}") from None


def needed_by(target: str, wishes: Wishes | None = None) -> Needed:
    """Return what an image has to hold for a save on ``target``.

    Raises:
        CaptureError: it is not there, or no save on it could work.
    """
    return _kind(target).needed(target, wishes or Wishes())


def needed_by_mount(mount: Mount, wishes: Wishes | None = None) -> Needed:
    """Return what an image has to hold for a save on what is mounted there; raises as ``needed_by`` does."""
    target = _target_of(mount)
    return local.needed_by_mount(mount) if target is None else needed_by(target, wishes)


def named(target: str, say: Say) -> str:
    """Return the target as the capture kernel finds it; what is doubtful of it is said.

    Raises:
        CaptureError: no save on it could work.
    """
    return _kind(target).named(target, say)


def named_mount(mount: Mount) -> str:
    """Return what is mounted there as the capture kernel finds it; raises as ``named`` does."""
    return _target_of(mount) or local.named_mount(mount)


def memory_of(names: Iterable[str]) -> int:
    """Return the bytes that the capture kernel needs for the most demanding of these targets, to estimate with."""
    return max((KINDS[kind].memory for kind in map(kind_of, names) if kind in KINDS), default=0)


def lacking_modules(names: Iterable[str], image: Path) -> str | None:
    """Return a line when disks that are named use modules now that are not in the image; None when all is well."""
    try:
        there = ordered_names(load_order(image))
    except ImageError:  # not ours to judge
        return None
    for target in names:
        if kind_of(target) not in (LOCAL, RAW):
            continue
        try:
            used = [name for name in needed_by(target).loaded if is_loaded(name)]
        except CaptureError:  # it may be attached when it is needed
            continue
        if lacking := [name for name in used if normal(name) not in there]:
            return (
                f"{image} has no {' and no '.join(lacking)}, which {target} uses now: build the image anew, "
                "vmcapture initramfs with the same --target, and load it"
            )
    return None


def _target_of(mount: Mount) -> str | None:
    """Return the target behind a mount; None where that is a local file system."""
    for kind in KINDS.values():
        if mount.kind in kind.filesystems and kind.of_mount is not None:
            return kind.of_mount(mount)
    return None
