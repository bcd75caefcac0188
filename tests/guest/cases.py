"""Which crashes are made: a row each. To cover a kernel, add a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

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
    capture_cpus: int = 1  # vmcapture load --cpus; QEMU without KVM loses kernels with more now and then
    append: str = ""  # more for the capture kernel's command line
    healthy_append: str = ""  # more for the healthy kernel's
    level: str = ""  # vmcapture.level=; as it is when nobody asks where empty
    arguments: tuple[str, ...] = ()  # more for QEMU
    workloads: tuple[str, ...] = ()  # functions of tests/guest/workload.py, and "tmpfs", "balloon", "offline"
    old_memory: Literal["same", "refused", "not asked"] = "not asked"  # what is expected of oldmem:
    long: bool = False  # left to make test-long

    def __str__(self) -> str:
        return self.name

    @property
    def kexec_option(self) -> str:
        """The option of ``vmcapture load`` that picks the system call."""
        return {"file": "-s", "load": "-c"}[self.syscall]


def parameters(cases: Iterable[Case]) -> list[Any]:
    """Cases as pytest's parameters, those that take long marked."""
    return [pytest.param(case, marks=pytest.mark.long if case.long else ()) for case in cases]


LINUX_6_1 = "linux-image-cloud-amd64"
LINUX_6_12 = "linux-image-6.12-cloud-amd64"

# Every pair of kernel, CPUs, paging and system call occurs.
CASES: tuple[Case, ...] = (
    Case("6.1-la57-file", LINUX_6_1, 1, LA57, "file"),
    Case("6.1-la48-smp-load", LINUX_6_1, 2, LA48, "load", level="1", old_memory="same"),
    Case("6.1-la57-smp-file", LINUX_6_1, 3, LA57, "file", memory="1G"),
    Case("6.12-la48-file", LINUX_6_12, 1, LA48, "file", level="0", old_memory="same"),
    Case("6.12-la48-load", LINUX_6_12, 1, LA48, "load", append="iomem=strict", old_memory="refused"),
    Case("6.12-la57-smp-load", LINUX_6_12, 2, LA57, "load", old_memory="same"),
)

LINUX_6_1_FULL = "linux-image-amd64"  # the cloud kernel of 6.1 is built without hwpoison
LINUX_6_1_RT = "linux-image-rt-amd64"

BALLOON = ("-device", "virtio-balloon-pci,id=balloon")
NUMA = (
    "-object", "memory-backend-ram,id=memory0,size=3G", "-numa", "node,nodeid=0,cpus=0-7,memdev=memory0",
    "-object", "memory-backend-ram,id=memory1,size=2G", "-numa", "node,nodeid=1,cpus=8-15,memdev=memory1",
)  # fmt: skip
EVERYTHING = ("tmpfs", "plain", "thp", "hugetlb", "swap", "balloon", "poison")

# Machines that have pages of every class: what is left out of their dumps is held against makedumpfile.
FILTER_CASES: tuple[Case, ...] = (
    Case("filter-6.1", LINUX_6_1_FULL, 2, LA57, memory="1536M", arguments=BALLOON,
         workloads=("offline", *EVERYTHING)),
    Case("filter-6.1-hvo", LINUX_6_1, 2, LA48, memory="1G", healthy_append="hugetlb_free_vmemmap=on",
         workloads=("tmpfs", "plain", "thp", "hugetlb")),
    Case("filter-6.12", LINUX_6_12, 2, LA48, memory="1536M", arguments=BALLOON,
         workloads=("offline", *EVERYTHING)),
    Case("filter-6.1-rt", LINUX_6_1_RT, 2, LA48, memory="1G", workloads=("tmpfs", "plain", "hugetlb", "poison"),
         long=True),
    Case("filter-6.1-numa", LINUX_6_1, 16, LA48, memory="5G", arguments=NUMA, workloads=("tmpfs", "plain", "thp"),
         long=True),
)  # fmt: skip

# Little memory; and more CPUs in the capture kernel, where there is more.
RESERVATION_CASES: tuple[Case, ...] = (
    Case("reserved-112M-6.1", LINUX_6_1, 2, LA48, memory="1G", crashkernel="112M"),
    Case("reserved-112M-6.12", LINUX_6_12, 2, LA57, memory="1G", crashkernel="112M"),
    Case("two-cpus", LINUX_6_12, 3, LA48, memory="1G", crashkernel="192M", capture_cpus=2),
    # The CPU that the firmware started stays asleep, unless it is the one that panicked.
    Case("four-cpus", LINUX_6_1, 5, LA57, memory="1G", crashkernel="256M", capture_cpus=4, long=True),
)

# Where a person has to help, or the power fails: one small machine.
RESCUE = Case("rescue", LINUX_6_1)

# Saved encrypted, and uncompressed: what is in memory would be seen on the disk as it is.
ENCRYPTED_CASES: tuple[Case, ...] = (
    Case("encrypted-6.1-128M", LINUX_6_1, 2, LA48, memory="1G", crashkernel="128M", append="vmcapture.compress=none",
         long=True),
    Case("encrypted-6.12-128M", LINUX_6_12, 1, LA57, memory="1G", crashkernel="128M", append="vmcapture.compress=none"),
)  # fmt: skip
# Much to do: what is saved first is far less than half of its dump.
BUSY = Case("busy", LINUX_6_1, 1, LA48, memory="1G", workloads=("files", "processes"))

# Looked at with debug symbols as well, which are a download of about 300 MB a kernel.
WITH_DEBUGINFO = ("6.1-la57-smp-file", "6.12-la57-smp-load")
DEBUGINFO_CASES: tuple[Case, ...] = tuple(case for case in CASES if case.name in WITH_DEBUGINFO)
