"""Mounts a file system for a moment, where nobody else looks.

The directory that it is mounted on is only ever removed empty: a file system that cannot be unmounted, because somebody
looks at it just then, is not to lose all that is on it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from initramfs import tools
from initramfs.errors import ToolError


@contextmanager
def mounted_for_now(device: Path | str, options: str = "", kind: str = "") -> Iterator[Path]:
    """Mount the file system of a device, of whatever type it is if not ``kind``, and unmount it.

    Raises:
        ToolError: it cannot be mounted, or not be unmounted.
    """
    words = ["mount", *(("-t", kind) if kind else ()), *(("-o", options) if options else ()), str(device)]

    def mount(point: Path) -> None:
        tools.run([tools.require(words[0], "mount"), *words[1:], point])

    with mounted_by(mount) as point:
        yield point


@contextmanager
def mounted_by(mount: Callable[[Path], object]) -> Iterator[Path]:
    """Have ``mount`` mount something on a new directory, yield that, and unmount it.

    Raises:
        ToolError: it cannot be unmounted; besides that, what ``mount`` raises.
    """
    point = Path(tempfile.mkdtemp(prefix="vmcapture-"))
    try:
        try:
            mount(point)
        except BaseException:
            if os.path.ismount(point):  # interrupted just when it was there
                _unmount(point)
            raise
        try:
            yield point
        except BaseException:
            try:
                _unmount(point)
            except ToolError:
                if os.path.ismount(point):
                    raise
            raise  # of what has gone by itself, as sshfs does without its server: why that is tells more
        else:
            _unmount(point)
    finally:
        with contextlib.suppress(OSError):  # of what is still mounted there
            point.rmdir()


def _unmount(point: Path) -> None:
    try:
        tools.run([tools.require("umount", "mount"), point])
    except ToolError as error:
        raise ToolError(f"what was mounted on {point} for a moment is still there, unmount it: {error}") from None
