"""NT_PRSTATUS → registers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.notes import prstatus
from capture.notes.elfnote import Note
from capture.vmcore import open_vmcore
from tests.builders import prstatus_note
from tests.readers import mapped, prstatus_descriptors

HEADER = 12 + 8
"""An Nhdr, and the name CORE padded to 4 bytes."""


def entry(data: bytes) -> Note:
    return Note(b"CORE", 1, data[HEADER:], 0, 0)


def test_x86_64_registers_stand_in_the_order_of_user_regs_struct() -> None:
    (cpu,), problems = prstatus.parse((entry(prstatus_note(42, 100)),), "x86_64")
    assert cpu.pid == 42
    # arch/x86/include/asm/user_64.h: r15 is the first, rip the 17th, rsp the 20th, gs the last of 27.
    found = cpu.registers
    assert (found["r15"], found["rip"], found["rsp"], found["gs"]) == (100, 116, 119, 126)
    assert len(found) == 27
    assert problems == []


def test_aarch64_registers_stand_in_the_order_of_user_pt_regs() -> None:
    (cpu,), _ = prstatus.parse((entry(prstatus_note(-1, 500, registers=34)),), "aarch64")
    assert cpu.pid == -1
    found = cpu.registers
    assert (found["x0"], found["x30"], found["sp"], found["pc"], found["pstate"]) == (500, 530, 531, 532, 533)
    assert len(found) == 34


def test_a_short_note_costs_its_own_cpu_only() -> None:
    whole = entry(prstatus_note(1, 1))
    short = Note(b"CORE", 1, whole.descriptor[: 112 + 27 * 8 - 1], 0, 0)
    cpus, problems = prstatus.parse((whole, short, Note(b"CORE", 1, b"", 0, 0), whole), "x86_64")
    assert [cpu.cpu for cpu in cpus] == [0, 3]
    assert len(problems) == 2


@pytest.mark.parametrize(("name", "cpus"), [("linux-6.1-la57", 4), ("linux-6.12", 2)])
def test_registers_of_a_real_crash_are_the_bytes_of_its_notes(
    name: str, cpus: int, corpus_file: Callable[[str], Path]
) -> None:
    path = corpus_file(name)
    descriptors = prstatus_descriptors(mapped(path))
    assert len(descriptors) == cpus
    with open_vmcore(str(path)) as vmcore:
        found, problems = prstatus.parse(vmcore.notes.prstatus(), vmcore.core.machine)
    assert problems == []
    for cpu, descriptor in zip(found, descriptors, strict=True):
        r15, rbp, rax, rip, cs, rsp = (struct.unpack_from("<Q", descriptor, 112 + 8 * at)[0]
                                       for at in (0, 4, 10, 16, 17, 19))  # fmt: skip
        registers = cpu.registers
        assert (registers["r15"], registers["rbp"], registers["rax"]) == (r15, rbp, rax)
        assert (registers["rip"], registers["cs"], registers["rsp"]) == (rip, cs, rsp)
        assert cpu.pid == struct.unpack_from("<i", descriptor, 32)[0]
        assert cs == 0x10  # __KERNEL_CS: the right place in the structure
        assert rip >= 0xFFFF_FFFF_8000_0000
