"""Kernel virtual addresses → bytes: the kernel image, the direct map, and what nobody maps."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.kernel.address import KernelMemory
from capture.kernel.arch import aarch64, x86_64
from capture.memory.image import UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import DIRECT_MAP, PAGE, U64, filled, vmcoreinfo_note

WriteFile = Callable[[bytes], str]
Load = tuple[int, int, bytes]

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""arch/x86/include/asm/page_64_types.h."""
GIB = 1 << 30
EM_AARCH64 = 183
ARM_DIRECT_MAP = 0xFFFF_0000_0000_0000
"""PAGE_OFFSET with 48-bit addresses, arch/arm64/include/asm/memory.h."""
ARM_RAM = 0x4000_0000
"""Where QEMU's virt machine has its memory."""
KIMAGE_VADDR = 0xFFFF_8000_0800_0000


@contextmanager
def memory_of(name: str) -> Iterator[KernelMemory]:
    with open_vmcore(name) as vmcore:
        yield KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)


def core(keys: Mapping[str, str | int], loads: Sequence[Load], machine: int = 62) -> bytes:
    return elf_core([vmcoreinfo_note(keys)], loads, machine=machine)


def info(**numbers: int) -> VmcoreInfo:
    return VmcoreInfo({f"NUMBER({name})": str(value) for name, value in numbers.items()})


# --- x86_64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phys_base", "address", "physical"),
    [
        (0, 0xFFFF_FFFF_8100_0000, 0x100_0000),
        (0x1A00_0000, 0xFFFF_FFFF_8100_0000, 0x1B00_0000),
        (-0x20_0000, 0xFFFF_FFFF_8100_0000, 0xE0_0000),
        (0x1A00_0000, START_KERNEL_MAP, 0x1A00_0000),
        (0x1A00_0000, START_KERNEL_MAP + GIB - 1, 0x1A00_0000 + GIB - 1),
    ],
)
def test_the_kernel_image_lies_at_phys_base(phys_base: int, address: int, physical: int) -> None:
    # __phys_addr_nodebug(), arch/x86/include/asm/page_64.h: x - __START_KERNEL_map + phys_base.
    assert x86_64.kernel_image_physical(address, info(phys_base=phys_base)) == physical


@pytest.mark.parametrize("address", [0, DIRECT_MAP, START_KERNEL_MAP - 1, START_KERNEL_MAP + GIB, U64])
def test_beyond_the_kernel_image_its_rule_says_nothing(address: int) -> None:
    assert x86_64.kernel_image_physical(address, info(phys_base=0)) is None


def test_a_kernel_with_a_smaller_image_area_says_so() -> None:
    without_kaslr = info(phys_base=0, KERNEL_IMAGE_SIZE=GIB // 2)
    assert x86_64.kernel_image_physical(START_KERNEL_MAP + GIB // 2 - 1, without_kaslr) == GIB // 2 - 1
    assert x86_64.kernel_image_physical(START_KERNEL_MAP + GIB // 2, without_kaslr) is None


@pytest.mark.parametrize("phys_base", [-1, 1 << 52, 1 << 63, U64])
def test_a_phys_base_that_leads_to_where_no_memory_can_be_is_not_followed(phys_base: int) -> None:
    assert x86_64.kernel_image_physical(START_KERNEL_MAP, info(phys_base=phys_base)) is None


def test_without_phys_base_the_rule_of_the_image_says_nothing() -> None:
    assert x86_64.kernel_image_physical(START_KERNEL_MAP, VmcoreInfo({})) is None


IMAGE_AT = 0x100_0000
X86_LOADS: list[Load] = [
    (START_KERNEL_MAP + IMAGE_AT, IMAGE_AT, filled("k", "l")),  # the kernel image, which ...
    (DIRECT_MAP + IMAGE_AT - PAGE, IMAGE_AT - PAGE, filled("a", "k", "l", "b")),  # ... the direct map covers again
    (DIRECT_MAP + GIB, GIB, filled("h")),
]


def test_the_image_and_the_direct_map_lead_to_the_same_bytes(vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(core({"NUMBER(phys_base)": 0}, X86_LOADS))) as memory:
        image, direct = START_KERNEL_MAP + IMAGE_AT, DIRECT_MAP + IMAGE_AT
        assert memory.physical(image) == memory.physical(direct) == IMAGE_AT
        assert memory.read(image + PAGE - 2, 4) == memory.read(direct + PAGE - 2, 4) == b"kkll"
        assert memory.read(DIRECT_MAP + GIB, 3) == b"hhh"
        assert memory.read_unsigned(image, 8) == int.from_bytes(b"kkkkkkkk", "little")
        assert memory.read(image, 0) == b""


def test_a_range_of_the_image_is_told_as_one_and_no_other(vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(core({"NUMBER(phys_base)": 16 * PAGE}, X86_LOADS))) as memory:
        start = START_KERNEL_MAP + 16 * PAGE
        assert memory.image_physical(start + 5, start + 9 * PAGE) == memory.physical(start + 5)
        assert memory.image_physical(start, START_KERNEL_MAP + GIB) == memory.physical(start)
        assert memory.image_physical(start, START_KERNEL_MAP + GIB + 1) is None
        assert memory.image_physical(START_KERNEL_MAP - 1, start) is None
        assert memory.image_physical(DIRECT_MAP, DIRECT_MAP + PAGE) is None


def test_without_vmcoreinfo_the_elf_header_alone_maps_the_image(vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(elf_core([], X86_LOADS))) as memory:
        assert memory.read(START_KERNEL_MAP + IMAGE_AT + PAGE, 2) == b"ll"


def test_a_segment_without_virtual_address_maps_nothing(vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(elf_core([], [(0, 0x1000, filled("a"))]))) as memory:
        assert memory.physical(0) is None
        assert memory.physical(0x10) is None


@pytest.mark.parametrize(
    "address",
    [
        pytest.param(0, id="NULL"),
        pytest.param(0x7FFF_FFFF_F000, id="a user address"),
        pytest.param(0xDEAD_0000_0000_0108, id="not canonical"),
        pytest.param(DIRECT_MAP + IMAGE_AT - PAGE - 1, id="a byte before the direct map"),
        pytest.param(DIRECT_MAP + IMAGE_AT + 3 * PAGE, id="a byte behind it"),
        pytest.param(START_KERNEL_MAP + 2 * GIB, id="behind the image"),
        pytest.param(START_KERNEL_MAP, id="in the image, not in the file"),
        pytest.param(U64, id="the last address"),
        pytest.param(1 << 64, id="beyond the last address"),
        pytest.param(-1, id="below the first"),
    ],
)
def test_what_nobody_maps_is_said_to_be_unreadable(address: int, vmcore_file: WriteFile) -> None:
    with (
        memory_of(vmcore_file(core({"NUMBER(phys_base)": 0}, X86_LOADS))) as memory,
        pytest.raises(UnreadableMemory) as refused,
    ):
        memory.read(address, 1)
    assert str(refused.value).isprintable()


def test_a_read_that_begins_well_and_ends_in_a_hole_is_unreadable_as_a_whole(vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(core({"NUMBER(phys_base)": 0}, X86_LOADS))) as memory:
        end = DIRECT_MAP + IMAGE_AT + 3 * PAGE
        assert memory.read(end - 4096, 4096) == filled("b")[:4096]
        with pytest.raises(UnreadableMemory):
            memory.read(end - 4, 8)
        with pytest.raises(UnreadableMemory):
            memory.read_unsigned(end - 4, 8)


def test_memory_that_a_truncated_file_lost_is_unreadable(vmcore_file: WriteFile) -> None:
    whole = core({"NUMBER(phys_base)": 0}, X86_LOADS)
    with memory_of(vmcore_file(whole[: -PAGE // 2])) as memory:
        assert memory.read(DIRECT_MAP + GIB, 3) == b"hhh"
        with pytest.raises(UnreadableMemory):
            memory.read(DIRECT_MAP + GIB + PAGE, 1)


@pytest.mark.parametrize("phys_base", [1 << 40, (1 << 64) - 1, -(1 << 63)])
def test_a_damaged_phys_base_is_survived_and_the_direct_map_still_works(phys_base: int, vmcore_file: WriteFile) -> None:
    with memory_of(vmcore_file(core({"NUMBER(phys_base)": phys_base}, X86_LOADS))) as memory:
        assert memory.read(DIRECT_MAP + IMAGE_AT, 2) == b"kk"
        with contextlib.suppress(UnreadableMemory):  # the image may be lost: phys_base is all that tells its place
            assert memory.read(START_KERNEL_MAP + IMAGE_AT, 2) == b"kk"


# --- aarch64 --------------------------------------------------------------------------------------------------------


def arm_keys(*, image_at: int, stext: int = KIMAGE_VADDR) -> dict[str, str | int]:
    """Return what arch_crash_save_vmcoreinfo() of arm64 writes; kimage_voffset is virtual minus physical."""
    return {
        "NUMBER(kimage_voffset)": f"{(KIMAGE_VADDR - image_at) % (1 << 64):#x}",
        "NUMBER(PHYS_OFFSET)": f"{ARM_RAM:#x}",
        "SYMBOL(_stext)": f"{stext:x}",
    }


def arm_info(image_at: int) -> VmcoreInfo:
    return VmcoreInfo({key: str(value) for key, value in arm_keys(image_at=image_at).items()})


def test_an_arm_image_lies_kimage_voffset_below_its_addresses() -> None:
    # __kimg_to_phys(), arch/arm64/include/asm/memory.h: addr - kimage_voffset.
    known = arm_info(0x4020_0000)
    assert aarch64.kernel_image_physical(KIMAGE_VADDR, known) == 0x4020_0000
    assert aarch64.kernel_image_physical(KIMAGE_VADDR + 0x123_4567, known) == 0x4020_0000 + 0x123_4567


def test_an_arm_image_above_its_virtual_address_works_in_64_bits() -> None:
    known = VmcoreInfo({"NUMBER(kimage_voffset)": str(-0x10_0000), "SYMBOL(_stext)": "1000"})
    assert aarch64.kernel_image_physical(0x1000, known) == 0x10_1000


@pytest.mark.parametrize("address", [0, ARM_DIRECT_MAP, KIMAGE_VADDR - (4 << 30), KIMAGE_VADDR + (4 << 30), U64])
def test_addresses_far_from_the_arm_image_are_not_its(address: int) -> None:
    assert aarch64.kernel_image_physical(address, arm_info(0x4020_0000)) is None


@pytest.mark.parametrize("missing", ["NUMBER(kimage_voffset)", "SYMBOL(_stext)"])
def test_without_a_key_the_arm_rule_says_nothing(missing: str) -> None:
    keys = {key: str(value) for key, value in arm_keys(image_at=0x4020_0000).items() if key != missing}
    assert aarch64.kernel_image_physical(KIMAGE_VADDR, VmcoreInfo(keys)) is None


def test_an_arm_offset_that_leads_beyond_physical_memory_is_not_followed() -> None:
    known = VmcoreInfo({"NUMBER(kimage_voffset)": "0", "SYMBOL(_stext)": f"{KIMAGE_VADDR:x}"})
    assert aarch64.kernel_image_physical(KIMAGE_VADDR, known) is None


def test_an_arm_vmcore_is_read_through_its_image_and_its_direct_map(vmcore_file: WriteFile) -> None:
    image_at = ARM_RAM + 0x20_0000
    loads = [(ARM_DIRECT_MAP + image_at - ARM_RAM, image_at, filled("k", "l"))]
    with memory_of(vmcore_file(core(arm_keys(image_at=image_at), loads, EM_AARCH64))) as memory:
        assert memory.read(KIMAGE_VADDR + PAGE - 1, 2) == b"kl"
        assert memory.read(ARM_DIRECT_MAP + 0x20_0000 + PAGE, 2) == b"ll"
        for address in (0, ARM_DIRECT_MAP, KIMAGE_VADDR + 2 * PAGE):
            with pytest.raises(UnreadableMemory):
                memory.read(address, 1)


NUMBERS = st.integers(-(1 << 63), U64)


@given(address=st.integers(0, U64), first=NUMBERS, second=NUMBERS, third=NUMBERS)
def test_no_numbers_lead_the_rules_astray(address: int, first: int, second: int, third: int) -> None:
    damaged = VmcoreInfo(
        {
            "NUMBER(phys_base)": str(first),
            "NUMBER(KERNEL_IMAGE_SIZE)": str(second),
            "NUMBER(kimage_voffset)": str(first),
            "SYMBOL(_stext)": f"{third:x}",
        }
    )
    for rule in (x86_64.kernel_image_physical, aarch64.kernel_image_physical):
        physical = rule(address, damaged)
        assert physical is None or physical >= 0


# --- A real kernel --------------------------------------------------------------------------------------------------


def real_loads(path: Path) -> list[tuple[int, int, int, int]]:
    """Virtual address, physical address, offset and size of every PT_LOAD, by hand."""
    with path.open("rb") as file:
        header = file.read(64)
        phoff, phnum = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 56)[0]
        file.seek(phoff)
        rows = [struct.unpack("<IIQQQQQQ", file.read(56)) for _ in range(phnum)]
    return [(row[3], row[4], row[2], row[5]) for row in rows if row[0] == 1]


def test_every_segment_of_a_real_vmcore_is_found_at_its_virtual_address(corpus_vmcore: Path) -> None:
    loads = real_loads(corpus_vmcore)
    assert any(virtual >= START_KERNEL_MAP for virtual, _, _, _ in loads)  # the kernel image
    assert any(virtual < START_KERNEL_MAP for virtual, _, _, _ in loads)  # the direct map
    with memory_of(str(corpus_vmcore)) as memory, corpus_vmcore.open("rb") as file:
        for virtual, physical, offset, size in loads:
            for at in (0, size // 2 & ~0xFFF, size - 64):
                file.seek(offset + at)
                assert memory.physical(virtual + at) == physical + at
                assert memory.read(virtual + at, 64) == file.read(64)
