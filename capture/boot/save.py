"""``vmcapture save`` without a directory: find the target that the kernel command line names, and save there."""

from __future__ import annotations

import time
from pathlib import Path

from capture.boot.config import BootConfig
from capture.boot.job import SaveReport, default_source, exit_status, save
from capture.boot.targets import mounted_target
from capture.console import Console
from capture.errors import TargetError, UsageError
from capture.options import DumpOptions
from capture.vmcore import open_vmcore


def _inside(root: Path, boot: BootConfig) -> Path:
    """Return the directory on the mounted target; a symbolic link must not lead out of it, into our own memory."""
    place = root / boot.path.lstrip("/")
    if not place.resolve().is_relative_to(root.resolve()):
        raise TargetError(
            f"{boot.target}: {boot.path} on it is a symbolic link to {place.resolve()}: "
            "name the directory itself with vmcapture.path="
        )
    return place


def save_to_target(
    boot: BootConfig, console: Console, options: DumpOptions | None = None, source: str | None = None
) -> SaveReport:
    """Mount the target, save the dead kernel below ``boot.path`` on it, unmount it.

    Once that is whole and on the disk, older crashes go as ``boot.keep`` and ``boot.free`` say.

    The directory in the report is as seen on the target's own file system.

    Raises:
        UsageError: the command line names no target.
        SourceError: there is no usable vmcore.
        TargetError: the target is not there, cannot be mounted, or a directory cannot be made.
    """
    if boot.target is None:
        raise UsageError(
            "no vmcapture.target= on this kernel's command line: mount a disk and name a directory: vmcapture save DIR"
        )
    if options is None:
        deadline = time.monotonic() + boot.deadline if boot.deadline else None
        options = DumpOptions(levels=boot.levels, compression=boot.compression, deadline=deadline)
    with open_vmcore(source or default_source()) as vmcore, mounted_target(boot.target, boot.wait, console) as root:
        saved = save(vmcore, _inside(root, boot), options, console)
        if exit_status(saved) == 0 and (boot.keep is not None or boot.free is not None):
            from capture.boot.room import make_room

            make_room(saved.directory, boot.keep, boot.free, console)
    saved.directory = Path("/") / saved.directory.relative_to(root)
    return saved
