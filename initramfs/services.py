"""What systemd says of units; on a machine without it nothing is enabled, and nothing runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from initramfs import tools

SYSTEMD = Path("/run/systemd/system")
"""There where systemd is PID 1 (sd_booted(3))."""
ARMING = "vmcapture.service"
COMPETITORS = ("kdump-tools.service", "kdump.service")
_GENERATED = "/run/systemd/generator"
"""Where systemd-sysv-generator(8) puts what it makes of scripts in /etc/init.d."""


def running() -> bool:
    """Return whether systemd runs this machine."""
    return SYSTEMD.is_dir()


def enabled(unit: str) -> bool:
    """Return whether a unit is started at boot."""
    return _systemctl("--quiet", "is-enabled", unit).returncode == 0


def active(unit: str) -> bool:
    """Return whether a unit is active now."""
    return _systemctl("--quiet", "is-active", unit).returncode == 0


def competitors() -> list[str]:
    """Return the units of others that load a capture kernel.

    A package that is removed and not purged leaves its script in /etc/init.d, and links to that for which systemctl
    calls it enabled; there may be no unit of that name, or one that is made of the script and does nothing.
    """
    return [unit for unit in COMPETITORS if (enabled(unit) or active(unit)) and _has_file(unit)]


def _has_file(unit: str) -> bool:
    """Return whether a unit is what somebody has installed."""
    path = _systemctl("show", "--property=FragmentPath", unit).stdout.strip().removeprefix("FragmentPath=")
    return bool(path) and not path.startswith(_GENERATED)


def _systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    """Have systemctl answer; where it cannot be asked, it has failed and said nothing."""
    systemctl = tools.find("systemctl") if running() else None
    if systemctl is None:
        return subprocess.CompletedProcess(words, 1, "", "")
    return subprocess.run([str(systemctl), *words], capture_output=True, text=True, check=False)
