"""Which crashes are made: a row each. To cover a kernel, add a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LA57 = "max"  # QEMU's own model, which has 5-level page tables
LA48 = "Skylake-Server-v5"  # 4-level page tables


@dataclass(frozen=True, slots=True)
class Case:
    """One machine that crashes, and how its capture kernel was armed."""

    name: str
    kernel: str = "linux-image-cloud-amd64"
    cpus: int = 1
    cpu_model: str = LA57
    syscall: Literal["file", "load"] = "file"  # kexec -s, kexec -c
    memory: str = "768M"
    crashkernel: str = "256M"
    filesystem: str = "ext4"
    target_size: str = "2G"
    append: str = ""  # more for the capture kernel's command line
    old_memory: Literal["same", "refused", "not asked"] = "not asked"  # what is expected of oldmem:

    def __str__(self) -> str:
        return self.name

    @property
    def kexec_option(self) -> str:
        """The option of ``vmcapture load`` that picks the system call."""
        return {"file": "-s", "load": "-c"}[self.syscall]


LINUX_6_1 = "linux-image-cloud-amd64"
LINUX_6_12 = "linux-image-6.12-cloud-amd64"

# Every pair of kernel, CPUs, paging and system call occurs.
CASES: tuple[Case, ...] = (
    Case("6.1-la57-file", LINUX_6_1, 1, LA57, "file"),
    Case("6.1-la48-smp-load", LINUX_6_1, 4, LA48, "load", old_memory="same"),
    Case("6.1-la57-smp-file", LINUX_6_1, 4, LA57, "file", memory="1G"),
    Case("6.12-la48-file", LINUX_6_12, 1, LA48, "file", old_memory="same"),
    Case("6.12-la48-load", LINUX_6_12, 1, LA48, "load", append="iomem=strict", old_memory="refused"),
    Case("6.12-la57-smp-load", LINUX_6_12, 4, LA57, "load", old_memory="same"),
)

# Where a person has to help, or the power fails: one small machine.
RESCUE = Case("rescue", LINUX_6_1)

# Looked at with debug symbols as well, which are a download of about 300 MB a kernel.
WITH_DEBUGINFO = ("6.1-la57-smp-file", "6.12-la57-smp-load")
DEBUGINFO_CASES: tuple[Case, ...] = tuple(case for case in CASES if case.name in WITH_DEBUGINFO)
