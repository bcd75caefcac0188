"""What happens after the job: power off, reboot or halt, through reboot(2)."""

from __future__ import annotations

import os

from capture.boot.supervisor import Watch
from capture.boot.watchdog import Watchdog
from capture.console import Console
from capture.errors import CaptureError

_COMMANDS = {"reboot": 0x0123_4567, "halt": 0xCDEF_0123, "poweroff": 0x4321_FEDC}
"""LINUX_REBOOT_CMD_*, include/uapi/linux/reboot.h."""


SYNC_LIMIT = 30
"""Seconds that the disks have to sync: what was saved is synced, and one that hangs must not keep the machine."""


def perform(action: str, console: Console, dog: Watchdog | None = None) -> None:
    """Sync all disks and leave this kernel. Returns only for ``shell``.

    Raises:
        CaptureError: the kernel refused.
    """
    if action == "shell":
        return
    with Watch(SYNC_LIMIT, console, dog) as watch:
        _, end = watch.run(lambda _tell: os.sync())
    if end.hung:
        console.say(f"a disk did not sync in {SYNC_LIMIT} s: going on without it")
    elif end.line:  # what was saved is synced
        console.say(f"the disks were not synced: {end.line}")
    import ctypes  # when the job, which lacks what this process takes, is over

    libc = ctypes.CDLL(None, use_errno=True)
    libc.reboot(ctypes.c_int(_COMMANDS[action] - (1 << 32) * (_COMMANDS[action] >> 31)))
    raise CaptureError(f"{action} was refused: {os.strerror(ctypes.get_errno())}; use the power button")
