"""What the job takes of the machine it runs on: CPUs, memory, time since boot. For the manifest, and to size things."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")


def cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def memory(key: str) -> int | None:
    """Return a line of /proc/meminfo (``MemTotal``, ``MemAvailable``) in bytes, None where there is none."""
    return _kibibytes(MEMINFO, key)


def peak_rss() -> int | None:
    """Return the most memory that this process ever held, in bytes; mapped files are in it."""
    return _kibibytes(STATUS, "VmHWM")


def uptime() -> float:
    """Return seconds since this kernel was booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _kibibytes(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    return None


@dataclass(slots=True)
class Footprint:
    """Taken from the start of a job to its end. Sizes in bytes, None where this kernel does not tell."""

    started: float = field(default_factory=uptime)
    least_available: int | None = None

    def sample(self) -> None:
        """Look at how much memory is available now."""
        available = memory("MemAvailable")
        if available is not None and (self.least_available is None or available < self.least_available):
            self.least_available = available

    def values(self) -> dict[str, int | float | None]:
        """Return what the job took, for JSON."""
        self.sample()
        return {
            "uptime_at_start": round(self.started, 3),
            "cpus": cpus(),
            "memory_total": memory("MemTotal"),
            "memory_available_least": self.least_available,
            "peak_rss": peak_rss(),
        }
