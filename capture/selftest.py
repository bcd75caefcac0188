"""A whole save of a tiny vmcore that it makes itself, read back page by page.

It shows that this interpreter, with these libraries, can do the job; the set-up side runs it to learn which modules and
shared objects the job loads.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capture.boot import job, mounting
from capture.boot.config import BootConfig
from capture.boot.supervisor import save_to_targets
from capture.console import Console
from capture.dump import write_dump
from capture.dumpfile.reader import KdumpFile
from capture.errors import CaptureError, TargetError
from capture.memory import elfcore
from capture.notes.elfnote import NOTE_ALIGNMENT, NOTE_HEADER
from capture.options import DumpOptions
from capture.verify import verify
from capture.vmcore import open_vmcore

PAGE = 4096
EM_X86_64 = 62


def note(name: bytes, note_type: int, descriptor: bytes) -> bytes:
    """Return one ELF note."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % NOTE_ALIGNMENT)

    return NOTE_HEADER.pack(len(name) + 1, len(descriptor), note_type) + padded(name + b"\0") + padded(descriptor)


def elf_core(notes: Sequence[bytes], loads: Sequence[tuple[int, int, bytes]], *, machine: int = EM_X86_64) -> bytes:
    """Return an ELF core with one PT_NOTE for each of ``notes`` and a PT_LOAD for each (virtual, physical, bytes)."""
    count = len(notes) + len(loads)
    table = np.zeros(count, dtype=elfcore.PROGRAM_HEADER)
    table["p_type"] = [elfcore.PT_NOTE] * len(notes) + [elfcore.PT_LOAD] * len(loads)
    contents = [*notes, *(data for _, _, data in loads)]
    sizes = np.array([len(data) for data in contents], dtype="<u8")
    table["p_filesz"] = table["p_memsz"] = sizes
    table["p_offset"] = elfcore.ELF_HEADER_SIZE + table.nbytes + np.cumsum(sizes) - sizes
    table["p_vaddr"][len(notes) :] = [virtual for virtual, _, _ in loads]
    table["p_paddr"][len(notes) :] = [physical for _, physical, _ in loads]
    et_core, version = 4, 1
    header = elfcore.IDENTITY + struct.pack(
        "<HHIQQQIHHHHHH", et_core, machine, version, 0, elfcore.ELF_HEADER_SIZE, 0, 0, elfcore.ELF_HEADER_SIZE,
        elfcore.PROGRAM_HEADER.itemsize, count, 0, 0, 0,
    )  # fmt: skip
    return b"".join([header, table.tobytes(), *contents])


def _noise(size: int) -> bytes:
    """Return bytes that no codec shrinks, without numpy.random, which the image would then have to hold."""
    return b"".join(hashlib.sha256(bytes((count,))).digest() for count in range(size // 32))


def run() -> None:
    """Save and verify, with every codec; filter pages of every class.

    Raises:
        CaptureError: something does not work here.
    """
    _filter()
    pages = bytes(PAGE) + b"kernel memory ".ljust(PAGE, b"x") + _noise(PAGE)
    vmcoreinfo = b"OSRELEASE=0.0.0-selftest\nPAGESIZE=4096\nCRASHTIME=1\n"
    core = elf_core([note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, vmcoreinfo)], [(0, 0x10_0000, pages)])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "core"
        source.write_bytes(core)
        for compression in ("zstd:auto", "zstd", "zlib", "none"):
            console = Console(file=io.StringIO())
            options = DumpOptions(compression=compression, progress=False)
            with open_vmcore(str(source)) as vmcore:
                saved = job.save(vmcore, Path(folder), options, console, usual_recipients=False)
                if saved.dump is None or not saved.dump.whole:
                    raise CaptureError(f"selftest: {compression}: {'; '.join(saved.failures)}")
                result = verify(KdumpFile(saved.dump.path), vmcore.image, progress=False)
            if not result.good:
                raise CaptureError(f"selftest: {compression}: {result.text()}")
        mounting.MOUNT_POINT = Path(folder) / "run" / "target"  # where no other build, nor a save, is in the way
        boot = BootConfig(targets=(f"LABEL={'x' * 12}",), wait=0)
        outcome = save_to_targets(boot, console, source=str(source))
        if outcome.status != TargetError.exit_status:  # (or findfs is not there to look for it)
            raise CaptureError(f"selftest: a target that does not exist: {outcome.line}")


def _filter() -> None:
    """Filter a kernel of 64 pages with one or a few of each class, the size predicted first."""
    direct_map, size, count, orders = 0xFFFF_8880_0000_0000, 64, 64, 11
    info = (
        f"PAGESIZE=4096\nSIZE(page)={size}\nOFFSET(page.flags)=0\nOFFSET(page.compound_head)=8\n"
        "OFFSET(page.mapping)=24\nOFFSET(page.private)=40\nOFFSET(page._mapcount)=48\nOFFSET(page._refcount)=52\n"
        f"LENGTH(zone.free_area)={orders}\nSYMBOL(mem_map)={direct_map:x}\nNUMBER(PG_lru)=1\nNUMBER(PG_private)=2\n"
        "NUMBER(PG_hwpoison)=3\nNUMBER(PG_head_mask)=16\nNUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129\n"
        "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-257\nNUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=-513\n"
        "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)=-1025\n"
    )
    table = bytearray(count * size)
    lru, private, poison, head, anonymous = 1 << 1, 1 << 2, 1 << 3, 1 << 4, direct_map + 1
    for pfn, flags, mapping, order, mapcount in (
        (16, 0, 0, 4, -129), (2, lru, 0, 0, -1), (3, lru | private, 0, 0, -1), (4, lru, anonymous, 0, 0),
        (5, poison, 0, 0, -1), (6, 0, 0, 0, -257), (7, 0, 0, 0, -513), (8, head | poison, 0, 0, -1025),
        (9, 3, 0, 0, -1), (32, head | lru, anonymous, 0, 0), (33, 5, 0, 0, -1),
    ):  # fmt: skip
        struct.pack_into("<QQQQQQi", table, pfn * size, flags, 0, 0, mapping, 0, order, mapcount)
    pages = struct.pack("<Q", direct_map + PAGE).ljust(PAGE, b"x") + bytes(table).ljust(62 * PAGE, b"y") + bytes(PAGE)
    core = elf_core([note(b"VMCOREINFO", 0, info.encode())], [(direct_map, 0, pages)])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "core", Path(folder) / "dump"
        source.write_bytes(core)
        options = DumpOptions(levels=(1, 31), progress=False, exclude_vmemmap=True)
        with open_vmcore(str(source)) as vmcore:
            report = write_dump(vmcore, target, options)
            whole = write_dump(vmcore, target.with_name("31"), DumpOptions(levels=(31,), progress=False))
    # Left out: 16 free pages, 2 of cache, 1 and 32 of user, 1 and 8 that are poisoned, 1 offline.
    if report.level != 1 or whole.pages != count - 61:
        raise CaptureError(f"selftest: level {report.level}, {whole.pages} pages kept of a small kernel")
