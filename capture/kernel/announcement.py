"""How a line of the kernel's log announces its crash."""

from __future__ import annotations

import re

_PANIC = re.compile(rb"(?<!\[ end )Kernel panic - not syncing")
_OOPS = re.compile(
    rb"^(BUG|Oops|general protection fault|Unable to handle kernel|kernel BUG at|Internal error)\b"
    rb"|^[a-z][\w ,-]*: [0-9a-f]{4} \[#\d+\]"
)
"""What precedes a crash without panic(): with panic_on_oops, oops_end() (arch/x86/kernel/dumpstack.c) and die()
(arch/arm64/kernel/traps.c) jump to the capture kernel first. The last form is x86's ``invalid opcode: 0000 [#1]``."""


def is_panic(text: bytes) -> bool:
    """Return whether a line of the log, without its time stamp, is panic()'s own."""
    return _PANIC.search(text) is not None


def is_oops(text: bytes) -> bool:
    """Return whether a line of the log, without its time stamp, begins an oops."""
    return _OOPS.search(text) is not None
