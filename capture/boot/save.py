"""``vmcapture save`` at one target: mount it, save there, make room, unmount it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from capture.boot.config import BootConfig
from capture.boot.job import SaveReport, default_source, exit_status, save
from capture.boot.mounting import inside
from capture.boot.targets import mounted_target
from capture.console import Console
from capture.options import DumpOptions
from capture.vmcore import open_vmcore


def _nothing(_saved: SaveReport) -> None:
    pass


def save_to_target(
    boot: BootConfig,
    target: str,
    console: Console,
    options: DumpOptions,
    source: str | None = None,
    *,
    device: str | None = None,
    can_map: bool = True,
    tell: Callable[[SaveReport], None] = _nothing,
) -> SaveReport:
    """Mount ``target``, save the dead kernel below ``boot.path`` on it, unmount it.

    Once that is whole and on the disk, older crashes go as ``boot.keep`` and ``boot.free`` say. ``tell`` is told what
    was saved before that, and before the target is unmounted: a disk may hang even then.

    ``device`` is where the target was found before, if it was. Without ``can_map`` the source is read. The directory in
    the report is as seen on the target's own file system.

    Raises:
        SourceError: there is no usable vmcore.
        TargetError: the target is not there, cannot be mounted, or a directory cannot be made.
    """
    with (
        open_vmcore(source or default_source(), can_map=can_map) as vmcore,
        mounted_target(target, boot.wait, console, device) as root,
    ):
        saved = save(vmcore, inside(root, boot.path, target), options, console)
        mounted = saved.directory
        saved.directory = Path("/") / mounted.relative_to(root)
        tell(saved)
        if exit_status(saved) == 0 and (boot.keep is not None or boot.free is not None):
            from capture.boot.room import make_room

            make_room(mounted, boot.keep, boot.free, console)
    return saved
