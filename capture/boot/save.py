"""``vmcapture save`` without a directory: find the target that the kernel command line names, and save there."""

from __future__ import annotations

from pathlib import Path

from capture.boot.config import BootConfig
from capture.boot.job import SaveReport, default_source, save
from capture.boot.targets import mounted_target
from capture.console import Console
from capture.dump import DumpOptions
from capture.errors import UsageError
from capture.vmcore import open_vmcore


def save_to_target(
    boot: BootConfig, console: Console, options: DumpOptions | None = None, source: str | None = None
) -> SaveReport:
    """Mount the target, save the dead kernel below ``boot.path`` on it, unmount it.

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
    options = options or DumpOptions(level=boot.level, compression=boot.compression)
    with open_vmcore(source or default_source()) as vmcore, mounted_target(boot.target, boot.wait, console) as root:
        saved = save(vmcore, root / boot.path.lstrip("/"), options, console)
    saved.directory = Path("/") / saved.directory.relative_to(root)
    return saved
