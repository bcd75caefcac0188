"""Asks the healthy system for its watchdogs: the drivers that the capture kernel needs, and which of them run now.

A watchdog that runs goes on through a crash, and resets the machine while it saves unless somebody feeds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from capture.boot import config
from initramfs.devices import SYS, Needed, driver_modules, is_loaded, needed
from initramfs.errors import ImageError
from initramfs.image import load_order, ordered_names

PROC = Path("/proc")
IPMI = ("ipmi_si", "ipmi_ssif", "ipmi_watchdog")
"""How a board's management controller is reached, and its watchdog: a driver that sysfs shows no device of."""
SOFTWARE = "softdog"
DEFAULT_SECONDS = 180
"""Without progress. A disk may take that long to answer and then go on: the kernel gives a SCSI command 30 seconds, and
tries it six times (drivers/scsi/sd.h: SD_TIMEOUT, SD_MAX_RETRIES)."""


def modules(sys: Path = SYS) -> Needed:
    """Return the modules behind the hardware watchdogs of this machine."""
    names = [name for link in _devices(sys) for name in driver_modules(link.resolve(), sys)]
    if is_loaded(IPMI[-1], sys):
        names += [name for name in IPMI if is_loaded(name, sys)]
    return needed(names, sys)


def running(sys: Path = SYS, proc: Path = PROC) -> tuple[str, ...]:
    """Return the names of the watchdogs that somebody has armed and not disarmed, software's too."""
    states = sorted((sys / "class/watchdog").glob("watchdog*/state"))
    names = [state.parent.name for state in states if state.read_text(encoding="utf-8").strip() == "active"]
    if is_loaded(IPMI[-1], sys) and _is_open("/dev/watchdog", proc):
        names.append(IPMI[-1])
    return tuple(names)


def lacking_driver(image: Path, sys: Path = SYS, proc: Path = PROC) -> str | None:
    """Return a line when a watchdog runs now whose driver is not in the image; None when all is well."""
    names = running(sys, proc)
    if not names:
        return None
    try:
        there = ordered_names(load_order(image))
    except ImageError:  # not ours to judge
        return None
    lacking = [name for name in modules(sys).loaded if name not in there]
    if not lacking:
        return None
    return (
        f"{' and '.join(names)} runs now, and {image} has no {' and no '.join(lacking)}: "
        "it may reset the machine while it saves; build the image anew: vmcapture initramfs"
    )


def doubt(command_line: str, image: Path, sys: Path = SYS, proc: Path = PROC) -> str | None:
    """Return a line when a watchdog runs now and a capture kernel with this command line and image will not feed it."""
    if (line := lacking_driver(image, sys, proc)) is not None:
        return line
    names = running(sys, proc)
    if not names or config.parse(command_line).watchdog:
        return None
    return (
        f"{' and '.join(names)} runs now, and is not used in the capture kernel: a save that hangs is not cut; "
        f"vmcapture load --watchdog {DEFAULT_SECONDS}"
    )


def _devices(sys: Path) -> Iterator[Path]:
    """Yield the links from watchdogs to their hardware; software's have none."""
    yield from sorted((sys / "class/watchdog").glob("watchdog*/device"))


def _is_open(device: str, proc: Path) -> bool:
    """Tell whether a process has the device open; root sees all of them."""
    for process in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process or its file has gone meanwhile
            if any(str(descriptor.readlink()) == device for descriptor in (process / "fd").iterdir()):
                return True
    return False
