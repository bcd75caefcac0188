"""A vmcore of a large machine for benchmarks: a guest in use, stopped, its memory written by QEMU (no crash needed)."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from capture.kernel.address import KernelMemory
from capture.memory.elfcore import PROGRAM_HEADER
from capture.vmcore import open_vmcore
from initramfs.image import ImageRequest, build_image
from tests.guest import cache, disk, host
from tests.guest.cache import Kernel
from tests.guest.crash import MODULES, demand
from tests.guest.qemu import BOOT_TIMEOUT, Disk, GuestError, Hardware, Machine

KERNEL = "linux-image-cloud-amd64"
WORKLOAD = Path(__file__).with_name("workload.py")
IN_GUEST = "/usr/share/workload.py"

# Its driver tells QEMU where VMCOREINFO lies, and QEMU puts it into the dump as a note.
TELLS_VMCOREINFO = "qemu_fw_cfg"

WORKLOAD_TIMEOUT = 900.0
DUMP_TIMEOUT = 600.0

PAGE_SIZE = 4096
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr, elf(5)


def make_vmcore(vmcore: Path, memory: str, say: Callable[[str], object]) -> None:
    """Write the memory of a guest with ``memory`` ("4G") to an ELF file.

    Raises:
        GuestError: a step did not end as it should.
        HostError: the host lacks something.
    """
    kernel = cache.kernel(KERNEL)
    with tempfile.TemporaryDirectory(prefix="vmcapture-bench-", dir=host.SCRATCH) as name:
        scratch = Path(name)
        say(f"building a guest with {kernel.release}")
        hardware = Hardware(
            kernel=kernel.vmlinuz,
            initrd=_system(kernel, scratch),
            append="console=ttyS0",
            memory=memory,
            cpus=2,
            disks=(Disk(_files(kernel, scratch)),),
            arguments=("-device", "vmcoreinfo"),
        )
        with Machine(hardware, scratch / "console.log") as machine:
            say(f"booting it with {memory}")
            machine.shell(BOOT_TIMEOUT)
            say("filling its memory")
            _fill(machine)
            say("writing its memory")
            _write_memory(machine, scratch / "memory.elf")
        say(f"laying {vmcore} out as /proc/vmcore is")
        _lay_out(scratch / "memory.elf", vmcore)


def _system(kernel: Kernel, scratch: Path) -> Path:
    """The guest's initramfs: our own image, with the workload in it."""
    image = scratch / "guest.img"
    build_image(
        ImageRequest(
            output=image,
            kernel_release=kernel.release,
            modules_dir=kernel.modules_dir,
            modules=(*MODULES, TELLS_VMCOREINFO),
            files=((IN_GUEST, WORKLOAD),),
        )
    )
    return image


def _files(kernel: Kernel, scratch: Path) -> Path:
    """A file system with some thousand small files, and room."""
    content = scratch / "files"
    shutil.copytree(kernel.modules_dir, content, symlinks=True)
    return disk.make(scratch / "files.ext4", "4G", "files", content=content)


def _fill(machine: Machine) -> None:
    demand(machine, "mkdir -p /run/files /run/tmpfs && mount -t ext4 LABEL=files /run/files")
    demand(machine, "mount -t tmpfs -o size=50% workload /run/tmpfs")
    # The image's launcher knows how its Python is started.
    demand(machine, "sed 's/-m capture /\"$@\" #/' /usr/bin/vmcapture > /run/python && chmod +x /run/python")
    machine.send(f"/run/python {IN_GUEST} /run/files /run/tmpfs &")
    machine.expect("workload held", WORKLOAD_TIMEOUT)
    demand(machine, "sync", WORKLOAD_TIMEOUT)


def _write_memory(machine: Machine, output: Path) -> None:
    machine.qmp("stop")
    # Detached: it takes longer than a QMP command may.
    machine.qmp("dump-guest-memory", paging=False, protocol=f"file:{output}", detach=True)
    deadline = time.monotonic() + DUMP_TIMEOUT
    while (state := machine.qmp("query-dump"))["status"] == "active":
        if time.monotonic() > deadline:
            raise GuestError(f"QEMU's dump is not done after {DUMP_TIMEOUT:.0f} s")
        time.sleep(0.5)
    if state["status"] != "completed":
        raise GuestError(f"QEMU could not write {output}: {state}")


def _lay_out(raw: Path, vmcore: Path) -> None:
    """Write what QEMU wrote as a capture kernel shows it.

    makedumpfile wants the program headers next to the ELF header, and the virtual addresses of the direct map; pages
    lie at multiples of their size, where QEMU puts them anywhere.
    """
    with open_vmcore(str(raw)) as source, raw.open("rb") as old, vmcore.open("wb") as new:
        header = ELF_HEADER.unpack(source.source.read(0, ELF_HEADER.size))
        memory = KernelMemory(source.image, source.info, source.core.machine)
        mem_section = source.info.symbol("mem_section") or 0  # lies in the direct map
        physical = memory.physical(mem_section)
        if physical is None:
            raise GuestError(f"{raw}: mem_section ({mem_section:#x}) is not mapped: no VMCOREINFO?")
        was = np.concatenate([source.core.notes, source.core.loads])
        table = was.copy()
        loads = table[len(source.core.notes) :]
        loads["p_vaddr"] = loads["p_paddr"] + np.uint64(mem_section - physical)
        loads["p_align"] = PAGE_SIZE
        at = ELF_HEADER.size + table.nbytes
        for segment in table:
            at += -at % (PAGE_SIZE if segment["p_align"] else 4)
            segment["p_offset"] = at
            at += int(segment["p_filesz"])
        # e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum; no sections
        sizes = (ELF_HEADER.size, 0, 0, ELF_HEADER.size, PROGRAM_HEADER.itemsize, len(table), 0, 0, 0)
        new.write(ELF_HEADER.pack(*header[:5], *sizes))
        new.write(table.tobytes())
        for before, after in zip(was, table, strict=True):
            new.seek(int(after["p_offset"]))
            _copy(old, new, int(before["p_offset"]), int(before["p_filesz"]))


def _copy(old: BinaryIO, new: BinaryIO, offset: int, length: int) -> None:
    new.flush()
    while length and (sent := os.sendfile(new.fileno(), old.fileno(), offset, length)):
        offset, length = offset + sent, length - sent
