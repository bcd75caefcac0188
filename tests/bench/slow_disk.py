"""A disk of this host that takes as many bytes a second as one wants: for benchmarks that emulation would drown.

A file, behind QEMU's throttle, shown by QEMU's storage daemon as a file again (FUSE), on that a loop device with ext4.
The host's own CPUs compress, and the disk is as slow as it says. For root alone.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.guest import disk, host
from tests.guest.host import HostError

_START_TIMEOUT = 10.0


@contextmanager
def mounted(folder: Path, name: str, size: str, speed: int | None) -> Iterator[Path]:
    """Mount a new disk of ``size`` ("4G") that takes ``speed`` bytes a second, or all that come; its mount point.

    Raises:
        HostError: not root, or the host lacks what this needs.
    """
    if os.geteuid() != 0:
        raise HostError("a throttled disk needs root (loop device, mount); or measure in a guest, with --guest")
    image, shown, point = (folder / f"{name}{suffix}" for suffix in (".ext4", ".shown", ""))
    disk.make(image, size, name)
    shown.touch()
    point.mkdir()
    with ExitStack() as undo:
        undo.enter_context(_exported(image, shown, speed))
        device = host.run("losetup", "--find", "--show", shown).output.strip()
        undo.callback(host.run, "losetup", "--detach", device)
        host.run("mount", "-t", "ext4", device, point)
        undo.callback(host.run, "umount", point)
        yield point


@contextmanager
def _exported(image: Path, shown: Path, speed: int | None) -> Iterator[None]:
    """Have QEMU's storage daemon show ``image`` as ``shown``, as slow as ``speed`` says."""
    limit = "" if speed is None else f",x-bps-write={speed}"
    command = (
        host.find("qemu-storage-daemon"),
        "--object", f"throttle-group,id=limit{limit}",
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=throttle,node-name=throttled,throttle-group=limit,file=file",
        "--export", f"type=fuse,id=shown,node-name=throttled,mountpoint={shown},writable=on",
    )  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not shown.stat().st_size:  # what is shown has the size of the image
                if daemon.poll() is not None or time.monotonic() > deadline:
                    daemon.kill()
                    said = daemon.communicate()[1].strip() or "it shows nothing"
                    raise HostError(f"qemu-storage-daemon cannot show a disk as a file: {said.splitlines()[-1]}")
                time.sleep(0.05)
            yield
        finally:
            daemon.terminate()
