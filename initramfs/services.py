"""What systemd says of units; on a machine without it nothing is enabled, and nothing runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from initramfs import tools

SYSTEMD = Path("/run/systemd/system")
"""There where systemd is PID 1 (sd_booted(3))."""
ARMING = "vmcapture.service"
COMPETITORS = ("kdump-tools.service", "kdump.service")


def running() -> bool:
    """Return whether systemd runs this machine."""
    return SYSTEMD.is_dir()


def enabled(unit: str) -> bool:
    """Return whether a unit is started at boot."""
    return _systemctl("is-enabled", unit)


def active(unit: str) -> bool:
    """Return whether a unit is active now."""
    return _systemctl("is-active", unit)


def _systemctl(question: str, unit: str) -> bool:
    systemctl = tools.find("systemctl") if running() else None
    if systemctl is None:
        return False
    words = [str(systemctl), "--quiet", question, unit]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0
