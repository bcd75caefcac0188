"""aarch64: where the kernel image lies in physical memory, and what its page tables look like.

The facts are those of Documentation/arch/arm64/memory.rst and arch/arm64/include/asm/{memory,pgtable-hwdef,
pgtable-prot,assembler}.h.
"""

from __future__ import annotations

from capture.kernel.pagetable import MAX_PHYSICAL_BITS, Geometry, Level
from capture.notes.vmcoreinfo import VmcoreInfo

KERNEL_IMAGE_MAX = 1 << 31
"""The image lies within 2 GiB above MODULES_END's neighbour KIMAGE_VADDR (arch/arm64/include/asm/memory.h)."""

_VALID, _TYPE, _BLOCK, _TABLE = 0b01, 0b11, 0b01, 0b11
"""PTE_VALID; PMD_TYPE_MASK, PMD_TYPE_SECT and PMD_TYPE_TABLE (of the last level PTE_TYPE_PAGE)."""
_BLOCK_SHIFTS = {4096: (30, 21), 16384: (25,), 65536: (29,)}
_BLOCK_SHIFTS_52 = {4096: (39, 30, 21), 16384: (36, 25), 65536: (42, 29)}
"""With 52-bit physical addresses one level more may map memory itself."""


def kernel_image_physical(address: int, info: VmcoreInfo) -> int | None:
    """Translate an address of the kernel image: virtual minus NUMBER(kimage_voffset). None outside of it."""
    voffset = info.number("kimage_voffset")
    stext = info.symbol("_stext")
    if voffset is None or stext is None or not stext - KERNEL_IMAGE_MAX <= address < stext + KERNEL_IMAGE_MAX:
        return None
    physical = (address - voffset) % (1 << 64)
    return physical if physical < 1 << MAX_PHYSICAL_BITS else None


def geometry(info: VmcoreInfo) -> Geometry | None:
    """Return the format of the kernel's page tables (TTBR1), None where VMCOREINFO does not lead to the first of them.

    The width of addresses is 64 - NUMBER(TCR_EL1_T1SZ), what the machine can do, else NUMBER(VA_BITS), what the kernel
    was built for.
    """
    built, narrow = info.number("VA_BITS"), info.number("TCR_EL1_T1SZ")
    width = built if narrow is None else 64 - narrow
    page_size = info.page_size
    page_shift = page_size.bit_length() - 1
    table = info.symbol("swapper_pg_dir")
    if width is None or table is None or not page_shift + 9 < width <= 52:
        return None
    root = kernel_image_physical(table, info)
    if root is None:
        root = _linear_physical(table, built or width, info)
    if root is None:
        return None
    # LPA2 (4 KiB, 16 KiB pages) goes with 52-bit virtual addresses; LPA (64 KiB) is there when the kernel knows it.
    wide = info.number("MAX_PHYSMEM_BITS") == 52 if page_size == 65536 else width == 52
    blocks = (_BLOCK_SHIFTS_52 if wide else _BLOCK_SHIFTS)[page_size]
    step = page_shift - 3
    shifts = list(range(page_shift, width, step))[::-1]
    # With 64 KiB pages a kernel built for 52 bits uses the end of its larger first table where the machine has 48
    # (TTBR1_BADDR_4852_OFFSET): an index of all 52 bits finds it, for the bits above are ones.
    top = max(width, built or 0) if page_size == 65536 and (built or 0) <= 52 else width
    levels = tuple(
        Level(
            shift,
            min(step, top - shift) if shift == shifts[0] else step,
            _TYPE if shift == page_shift or shift in blocks else 0,
            _TABLE if shift == page_shift else _BLOCK,
        )
        for shift in shifts
    )
    in_place = (1 << (50 if wide and page_size != 65536 else 48)) - page_size
    return Geometry(
        root=root,
        page_size=page_size,
        levels=levels,
        first=(1 << 64) - (1 << width),
        last=(1 << 64) - 1,
        present_mask=_VALID,
        present_value=_VALID,
        table_mask=_TYPE,
        table_value=_TABLE,
        address_mask=in_place,
        high_bits=None if not wide else (12, 4, 48) if page_size == 65536 else (8, 2, 50),
    )


def _linear_physical(address: int, width: int, info: VmcoreInfo) -> int | None:
    """Translate an address of the linear map: PAGE_OFFSET is -(1 << VA_BITS) since 5.4."""
    offset = info.number("PHYS_OFFSET")
    if offset is None or not 1 <= width <= 64:
        return None
    start = (1 << 64) - (1 << width)
    if not start <= address < start + (1 << (width - 1)):
        return None
    physical = address - start + offset
    return physical if 0 <= physical < 1 << MAX_PHYSICAL_BITS else None
