"""What happens after the job: power off, reboot or halt, through reboot(2)."""

from __future__ import annotations

import ctypes
import os

from capture.errors import CaptureError

_COMMANDS = {"reboot": 0x0123_4567, "halt": 0xCDEF_0123, "poweroff": 0x4321_FEDC}
"""LINUX_REBOOT_CMD_*, include/uapi/linux/reboot.h."""


def perform(action: str) -> None:
    """Sync all disks and leave this kernel. Returns only for ``shell``.

    Raises:
        CaptureError: the kernel refused.
    """
    if action == "shell":
        return
    os.sync()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.reboot(ctypes.c_int(_COMMANDS[action] - (1 << 32) * (_COMMANDS[action] >> 31)))
    raise CaptureError(f"{action} was refused: {os.strerror(ctypes.get_errno())}; use the power button")
