"""Whether this machine would survive a crash right now: what has to hold for it, a check each.

A check is good, a doubt or bad; where it is not good, it says what to do. One that is bad means that nothing, or not all,
would be saved. A check that does not apply to this machine is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.boot import config as boot_config
from capture.boot.config import BootConfig
from capture.console import printable
from capture.errors import CaptureError, IncompleteError
from capture.options import RECIPIENTS
from initramfs import crash_test, estimate, kexec, predict, stamp, targets, tools, watchdogs
from initramfs.crash_view import size_text
from initramfs.kexec import Loaded
from initramfs.predict import Prediction
from initramfs.stamp import Stamp
from initramfs.targets import Target

GOOD, DOUBT, BAD = "good", "doubt", "bad"
COMPRESSED = 4
"""What a dump is smaller by, compressed, at the least in most cases (README.md, Speed: guests came to 3 to 9)."""
UNIT = "vmcapture.service"
COMPETITORS = ("kdump-tools.service", "kdump.service")
LOCKDOWN = Path("/sys/kernel/security/lockdown")
SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
SYSCTL = Path("/proc/sys/kernel")
SYSTEMD = Path("/run/systemd/system")
DOUBTFUL = IncompleteError.exit_status


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to hold. ``remedy`` says what to do where it does not."""

    name: str
    state: str  # GOOD, DOUBT or BAD
    what: str
    remedy: str = ""

    def line(self) -> str:
        """Return it for a person."""
        return f"{self.name:<12} {self.state:<5}  {self.what}" + (f": {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. Sizes in bytes."""

    armed: bool
    reservation: int
    needed: int | None
    loaded: Loaded | None
    checks: tuple[Check, ...]
    targets: tuple[Target, ...] = ()
    predicted: Prediction | None = None
    image_built: float | None = None
    encrypted: bool | None = None
    watchdog: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst of the checks."""
        states = {check.state for check in self.checks}
        return next((state for state in (BAD, DOUBT) if state in states), GOOD)

    @property
    def exit_status(self) -> int:
        """0: a crash now would be saved; 1: it would not; 3: it would, but for a doubt."""
        return {GOOD: 0, DOUBT: DOUBTFUL, BAD: 1}[self.verdict]

    def json(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "armed": self.armed,
            "verdict": self.verdict,
            "reservation": self.reservation,
            "reservation_needed": self.needed,
            "loaded": None if self.loaded is None else asdict(self.loaded),
            "image_built": self.image_built,
            "encrypted": self.encrypted,
            "watchdog": self.watchdog,
            "predicted": None if self.predicted is None else {**asdict(self.predicted), "method": predict.METHOD},
            "targets": [asdict(target) for target in self.targets],
            "checks": [asdict(check) for check in self.checks],
        }

    def lines(self) -> list[str]:
        """Return it on one screen."""
        worst = next((check for check in self.checks if check.state == self.verdict), None)
        reason = "" if worst is None else worst.what + (f"; {worst.remedy}" if worst.remedy else "")
        first = {
            GOOD: "armed: a crash now would be saved",
            DOUBT: f"armed, but doubtful: {reason}",
            BAD: f"{'armed, but a crash now would not be saved' if self.armed else 'not armed'}: {reason}",
        }[self.verdict]
        return [first, *(check.line() for check in self.checks)]
