"""The machine's watchdog: armed while we save, fed only while something moves, so that a save that hangs is cut.

It may have run since before the crash, because nobody stops a watchdog on the way into the capture kernel. Stage one
loads its driver before all others: the driver stops it, or the kernel feeds it, until somebody opens it
(drivers/watchdog/watchdog_dev.c: WDOG_HW_RUNNING, handle_boot_enabled). We open it when ``vmcapture.watchdog=`` says
so: from then on only ``feed`` keeps it quiet.

Software's own (softdog) is a timer of the capture kernel: it restarts a machine whose disk no longer answers, though
not one whose kernel has stopped. It is taken where there is no other.

The interface: Documentation/watchdog/watchdog-api.rst and include/uapi/linux/watchdog.h.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from capture.console import Console

SYS = Path("/sys/class/watchdog")
DEV = Path("/dev")
SOFTWARE = "Software Watchdog"  # the identity of softdog

WDIOC_SETTIMEOUT = 0xC004_5706  # _IOWR('W', 6, int)
WDIOC_GETTIMEOUT = 0x8004_5707  # _IOR('W', 7, int)
_INT = struct.Struct("i")
FEED = b"\0"
MAGIC_CLOSE = b"V"

STAND_STILL = ("halt", "shell")


class _Device(NamedTuple):
    name: str
    descriptor: int


class Watchdog:
    """All watchdogs that were armed, as one; none is a watchdog too. Nothing here raises: a dump is worth more.

    In a ``with`` block: what is still armed at its end stays so, and resets the machine unless somebody else feeds it.
    """

    def __init__(self, devices: list[_Device], console: Console) -> None:
        self._devices = devices
        self._console = console
        self._hungry: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.let_go()

    @property
    def armed(self) -> tuple[str, ...]:
        """The names of those that are to be fed."""
        return tuple(device.name for device in self._devices)

    def feed(self) -> None:
        """Give them another time-out. To be called about once a second, and only when something has moved."""
        for name, descriptor in self._devices:
            try:
                os.write(descriptor, FEED)
                self._hungry.discard(name)
            except OSError as error:
                if name not in self._hungry:
                    self._console.say(f"{name} cannot be fed ({error.strerror}): it may reset the machine")
                    self._hungry.add(name)

    def settle(self, action: str) -> None:
        """What is to be done with them before ``action``, one of ``capture.boot.config.ACTIONS``.

        A machine that is told to reboot or to power off stays armed: where that hangs it is reset, and all is saved.
        One that is to stand still, for a person to read its console or to type at its shell, is disarmed. What cannot
        be disarmed (nowayout) is fed by stage one behind its shell; a halted machine has nobody to do so.
        """
        if action not in STAND_STILL:
            self.feed()
            return
        names = self.armed
        for _, descriptor in self._devices:
            with contextlib.suppress(OSError):
                os.write(descriptor, MAGIC_CLOSE)
        self.let_go()
        for name in names:
            if action == "halt" and is_active(name):
                self._console.say(f"{name} cannot be disarmed (nowayout): it will reset the halted machine")

    def let_go(self) -> None:
        """Close them without a word: they stay armed. In a child, whose parent feeds them, nothing else happens."""
        for _, descriptor in self._devices:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._devices = []


def open_watchdogs(seconds: int, console: Console) -> Watchdog:
    """Arm what this kernel has, to reset the machine ``seconds`` after the last ``feed``; 0: touch none.

    A line on the console says what was armed, or why nothing was.
    """
    devices: list[_Device] = []
    if seconds:
        names = available()
        if not names:
            console.say(
                f"vmcapture.watchdog={seconds}: this kernel has no watchdog; "
                "on the next boot, build the image on this machine: vmcapture initramfs"
            )
        for name in names:
            try:
                descriptor = os.open(DEV / name, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                console.say(f"{name} cannot be opened ({error.strerror}): going on without it")
                continue
            devices.append(_Device(name, descriptor))
            patience = _arm(descriptor, seconds)
            console.say(f"{name}{_identity(name)} resets the machine after {patience} without progress")
    return Watchdog(devices, console)


def available() -> list[str]:
    """Return the names of the devices to use: hardware's, else software's.

    A driver that is older than the kernel's watchdog core (ipmi_watchdog) has /dev/watchdog only, not listed in sysfs.
    """
    names = sorted(entry.name for entry in SYS.glob("watchdog*"))
    hardware = [name for name in names if _attribute(name, "identity") != SOFTWARE]
    if "watchdog0" not in names and (DEV / "watchdog").exists():
        hardware.append("watchdog")
    return hardware or names


def is_active(name: str) -> bool:
    """Tell whether a watchdog has been opened and not disarmed since."""
    return _attribute(name, "state") == "active"


def _arm(descriptor: int, seconds: int) -> str:
    """Set the time-out, or the longest one that the hardware takes; return what it is now, for people."""
    wanted = seconds
    while wanted:
        try:
            fcntl.ioctl(descriptor, WDIOC_SETTIMEOUT, _INT.pack(wanted))
            break
        except OSError:  # more than the counter holds: half as much, until it is taken
            wanted //= 2
    try:
        (now,) = _INT.unpack(fcntl.ioctl(descriptor, WDIOC_GETTIMEOUT, _INT.pack(0)))
    except OSError:
        return "a time of its own"
    return f"{now} s" if now == seconds else f"{now} s (not {seconds}: its own limit)"


def _identity(name: str) -> str:
    said = _attribute(name, "identity")
    return f" ({said})" if said else ""


def _attribute(name: str, attribute: str) -> str:
    try:
        return (SYS / name / attribute).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
