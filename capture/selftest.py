"""A whole save of a tiny vmcore that it makes itself, read back page by page.

It shows that this interpreter, with these libraries, can do the job; the set-up side runs it to learn which modules and
shared objects the job loads.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capture.boot import job
from capture.boot.config import BootConfig
from capture.boot.save import save_to_target
from capture.console import Console
from capture.dump import DumpOptions
from capture.dumpfile.reader import KdumpFile
from capture.errors import CaptureError
from capture.memory import elfcore
from capture.notes.elfnote import NOTE_ALIGNMENT, NOTE_HEADER
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
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    et_core, version = 4, 1
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", et_core, machine, version, 0, elfcore.ELF_HEADER_SIZE, 0, 0, elfcore.ELF_HEADER_SIZE,
        elfcore.PROGRAM_HEADER.itemsize, count, 0, 0, 0,
    )  # fmt: skip
    return b"".join([header, table.tobytes(), *contents])


def run() -> None:
    """Save and verify, with every codec.

    Raises:
        CaptureError: something does not work here.
    """
    pages = bytes(PAGE) + b"kernel memory ".ljust(PAGE, b"x") + np.random.default_rng(1).bytes(PAGE)
    vmcoreinfo = b"OSRELEASE=0.0.0-selftest\nPAGESIZE=4096\nCRASHTIME=1\n"
    core = elf_core([note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, vmcoreinfo)], [(0, 0x10_0000, pages)])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "core"
        source.write_bytes(core)
        for compression in ("zstd", "zlib", "none"):
            console = Console(file=io.StringIO())
            options = DumpOptions(compression=compression, progress=False)
            with open_vmcore(str(source)) as vmcore:
                saved = job.save(vmcore, Path(folder), options, console)
                if saved.dump is None or not saved.dump.whole:
                    raise CaptureError(f"selftest: {compression}: {'; '.join(saved.failures)}")
                result = verify(KdumpFile(saved.dump.path), vmcore.image, progress=False)
            if not result.good:
                raise CaptureError(f"selftest: {compression}: {result.text()}")
        try:
            save_to_target(BootConfig(target=f"LABEL={'x' * 12}", wait=0), console, source=str(source))
        except CaptureError:
            return
    raise CaptureError("selftest: a target that does not exist was found")
