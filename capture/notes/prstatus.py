"""NT_PRSTATUS → registers, per architecture.

One note for each CPU that was online when it was stopped, in the order of CPU numbers. The layout is ``struct
elf_prstatus`` (include/linux/elfcore.h): ``pr_pid`` at 32, the registers (``elf_gregset_t``) at 112.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from capture.notes.elfnote import Note, Notes

PR_PID_OFFSET = 32
PR_REG_OFFSET = 112
_PID = struct.Struct("<i")
PID_LIMIT = 1 << 22
"""PID_MAX_LIMIT of 64-bit kernels (include/linux/threads.h): no task has a PID from there on."""

X86_64_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
"""struct user_regs_struct, arch/x86/include/asm/user_64.h."""
AARCH64_REGISTERS = (*(f"x{number}" for number in range(31)), "sp", "pc", "pstate")
"""struct user_pt_regs, arch/arm64/include/uapi/asm/ptrace.h."""

REGISTERS = {"x86_64": X86_64_REGISTERS, "aarch64": AARCH64_REGISTERS}
INSTRUCTION_POINTER = {"x86_64": "rip", "aarch64": "pc"}
STACK_POINTER = {"x86_64": "rsp", "aarch64": "sp"}


class CpuRegisters(NamedTuple):
    """The registers of one CPU. ``cpu`` counts the notes; ``pid`` is that of the task it was running (0: idle)."""

    cpu: int
    pid: int
    registers: dict[str, int]


def parse(notes: tuple[Note, ...], machine: str) -> tuple[list[CpuRegisters], list[str]]:
    """Decode NT_PRSTATUS notes; return the CPUs and a line for each note that is too short to hold registers."""
    names = REGISTERS[machine]
    layout = struct.Struct(f"<{len(names)}Q")
    cpus: list[CpuRegisters] = []
    problems: list[str] = []
    for cpu, note in enumerate(notes):
        if len(note.descriptor) < PR_REG_OFFSET + layout.size:
            problems.append(
                f"CPU {cpu}: NT_PRSTATUS of {len(note.descriptor)} bytes is too short for {machine} registers"
            )
            continue
        (pid,) = _PID.unpack_from(note.descriptor, PR_PID_OFFSET)
        values = layout.unpack_from(note.descriptor, PR_REG_OFFSET)
        cpus.append(CpuRegisters(cpu, pid if pid < PID_LIMIT else 0, dict(zip(names, values, strict=True))))
    return cpus, problems


def told_apart(notes: Notes) -> bytes:
    """Return the notes' bytes with a PID of its own for each CPU: gdb takes CPUs of one PID for one thread.

    All idle CPUs have PID 0. They get numbers from PID_LIMIT on, which ``parse`` takes for 0.
    """
    blob = bytearray(notes.blob)
    seen = {0}
    for cpu, note in enumerate(notes.prstatus()):
        if len(note.descriptor) < PR_REG_OFFSET:
            continue
        (pid,) = _PID.unpack_from(note.descriptor, PR_PID_OFFSET)
        if pid in seen:
            pid = PID_LIMIT + cpu
            _PID.pack_into(blob, note.offset + PR_PID_OFFSET, pid)
        seen.add(pid)
    return bytes(blob)
