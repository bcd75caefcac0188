"""The dead kernel's names (struct new_utsname): six fields of 65 bytes, read from init_uts_ns."""

from __future__ import annotations

from typing import NamedTuple

from capture.kernel.address import KernelMemory
from capture.memory.image import UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

FIELD_BYTES = 65
"""__NEW_UTS_LEN + 1, include/uapi/linux/utsname.h."""
FIELDS = ("sysname", "nodename", "release", "version", "machine", "domainname")


class Utsname(NamedTuple):
    """``raw`` is the structure as it lay in memory (390 bytes); the fields are decoded from it."""

    raw: bytes

    def text(self, name: str) -> str:
        """Return one field as text; bytes that are not UTF-8 are replaced."""
        start = FIELDS.index(name) * FIELD_BYTES
        return self.raw[start : start + FIELD_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")


def read_utsname(memory: KernelMemory, info: VmcoreInfo, machine: str) -> Utsname:
    """Read init_uts_ns.name; where it cannot be read, or is not Linux's, fall back to OSRELEASE and the ELF machine."""
    address, offset = info.symbol("init_uts_ns"), info.offset("uts_namespace.name")
    if address is not None and offset is not None:
        try:
            raw = memory.read(address + offset, FIELD_BYTES * len(FIELDS))
        except UnreadableMemory:
            raw = b""
        if raw.startswith(b"Linux\0"):
            return Utsname(raw)
    # Never empty: libkdumpfile, and drgn with it, opens no dump without a release and a version.
    names = ("Linux", "", info.release or "unknown", "unknown", machine, "")
    return Utsname(b"".join(name.encode()[: FIELD_BYTES - 1].ljust(FIELD_BYTES, b"\0") for name in names))
