"""Brings a machine into the state in which a crash is saved: an image that is current, and loaded."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capture.console import Console
from capture.errors import IncompleteError
from initramfs.errors import ImageError, KexecError, ToolError

DOUBTFUL = IncompleteError.exit_status
"""Armed, but not with what should be."""
LOCK = Path("/run/vmcapture/arm.lock")

Run = Callable[[Sequence[str]], int]
"""Runs ``vmcapture`` with these words; returns its exit status."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the machine is to be armed with."""

    release: str
    kernel: Path
    image: Path
    words: tuple[str, ...] = ()  # options of both commands: --config, --quiet
    load: bool = True
    force: bool = False  # whether or not anything has changed


def arm(wanted: Wanted, run: Run, console: Console) -> int:
    """Build the image if something that it is made from has changed, and load it if it is not loaded as it is.

    Where an image cannot be built now (its disk is not attached) and one is there, that is loaded: an older one saves
    most crashes, none saves no crash. DOUBTFUL is returned then.

    Raises:
        CaptureError: the machine cannot be armed.
    """
    needed = () if wanted.force else ("--if-needed",)
    doubtful = 0
    with _alone():
        try:
            words = ("--kernel", wanted.release, "-o", str(wanted.image))
            status = run(("initramfs", *words, *needed, *wanted.words))
        except (ImageError, ToolError) as error:
            if not wanted.load or not wanted.image.exists():
                raise
            console.say(f"{error}; the image that is there, {wanted.image}, is used")
            doubtful = DOUBTFUL
        else:
            if status or not wanted.load:
                return status
        words = ("--kernel-image", str(wanted.kernel), "--image", str(wanted.image))
        return run(("load", *words, *needed, *wanted.words)) or doubtful


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until nobody else arms the machine: a kernel's installation, plugged memory and the boot may coincide."""
    try:
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise KexecError("only root may arm a machine: use sudo") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
