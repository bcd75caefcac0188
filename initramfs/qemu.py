"""Runs one guest in QEMU to its end, with nobody at its console: for what can only be known by trying."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capture import footprint
from initramfs import tools
from initramfs.errors import MeasureError, ToolError

KVM = Path("/dev/kvm")
MACHINE = os.uname().machine
ARCHITECTURES = {"x86_64": "qemu-system-x86"}
"""Machines that a guest is described for, and the package of its QEMU."""
POLL = 0.2  # seconds between two looks at the console
HOST_SPARE = 512 << 20
"""Memory of the host, in bytes, that is to be left when a guest has taken all of its own: this may be a server."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What to boot, and on what. Paths are absolute, ``memory`` is in bytes."""

    kernel: Path
    initrd: Path
    command_line: str
    disk: Path  # an image file, the guest's /dev/vda
    memory: int
    cpus: int


class Deadline:
    """A point in time that everything has to be done by."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then; 0 when it has passed."""
        return max(0.0, self._end - time.monotonic())


def find() -> Path:
    """Return the QEMU that runs guests like this machine.

    Raises:
        MeasureError: nobody has tried that on such a machine.
        ToolError: it is not installed.
    """
    if MACHINE not in ARCHITECTURES:
        raise MeasureError(f"guests can be crashed on {', '.join(ARCHITECTURES)} only, this is {MACHINE}")
    return tools.require(f"qemu-system-{MACHINE}", ARCHITECTURES[MACHINE])


def accelerators() -> tuple[str, ...]:
    """Return what to try a guest with, the fastest first. A /dev/kvm that may be opened need not work in a guest."""
    return ("kvm", "tcg") if os.access(KVM, os.R_OK | os.W_OK) else ("tcg",)


def check_memory(guest_memory: int) -> None:
    """Refuse a guest that might have the host kill something else for want of memory.

    Raises:
        MeasureError: so many bytes and some to spare are not available.
    """
    available = footprint.memory("MemAvailable")
    needed = guest_memory + HOST_SPARE
    if available is not None and available < needed:
        raise MeasureError(f"a guest may take {needed >> 20} MiB of memory, {available >> 20} MiB are available here")


def command(qemu: Path, guest: Guest, accelerator: str) -> list[str]:
    """Return QEMU's command line. The serial console is its standard output."""
    blockdev = {
        "driver": "raw",
        "node-name": "disk",
        # A dump of an idle machine has many zeros: they become holes in the image.
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": str(guest.disk)},
    }
    return [
        str(qemu),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"),
        *("-machine", "pc", "-accel", accelerator, "-cpu", "max", "-smp", str(guest.cpus)),
        *("-m", f"{guest.memory >> 20}M"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.command_line),
        *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk"),
    ]


def run(
    words: list[str],
    log: Path,
    deadline: Deadline,
    hopeless: str = "",
    up: tuple[str, Deadline] | None = None,
) -> str:
    """Run a guest until it powers off or resets, and return what came over its serial console (also in ``log``).

    It is ended when the deadline has passed, when its console shows ``hopeless``, or when it does not show the text of
    ``up`` by then: the caller sees that in what is returned, or in the deadline.

    Raises:
        ToolError: QEMU cannot be run, or failed.
    """
    complaints = log.with_suffix(".qemu")
    with _started(words, log, complaints) as process:
        while process.poll() is None and deadline.left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(POLL, deadline.left))
            console = _text(log)
            if hopeless and hopeless in console:
                break
            if up is not None and not up[1].left and up[0] not in console:
                break
        status = process.poll()
    if status:
        said = tools.last_line(complaints.read_text(errors="replace"))
        raise ToolError(f"{words[0]} {tools.describe_status(status)}: {said}")
    return _text(log)


@contextmanager
def _started(words: list[str], log: Path, complaints: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start QEMU; it does not outlive the block, however that ends."""
    with log.open("wb") as console, complaints.open("wb") as errors:
        try:
            # A QEMU that aborts leaves its core where it was started.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=console, stderr=errors, cwd=log.absolute().parent
            )
        except OSError as error:
            raise ToolError(f"cannot run {words[0]}: {error.strerror}") from error
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _text(log: Path) -> str:
    return log.read_bytes().decode("utf-8", "replace").replace("\r", "")
