"""x86_64: where the kernel image lies in physical memory, and what its page tables look like."""

from __future__ import annotations

from capture.kernel.pagetable import MAX_PHYSICAL_BITS, Geometry, Level
from capture.notes.vmcoreinfo import VmcoreInfo

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map, arch/x86/include/asm/page_64_types.h."""
DEFAULT_IMAGE_SIZE = 1 << 30
"""KERNEL_IMAGE_SIZE with KASLR, arch/x86/include/asm/page_64_types.h."""

_PRESENT, _LARGE = 1 << 0, 1 << 7
"""_PAGE_PRESENT and _PAGE_PSE, arch/x86/include/asm/pgtable_types.h."""
_ADDRESS = 0x000F_FFFF_FFFF_F000
"""PHYSICAL_PAGE_MASK. Bit 12 of a large entry is _PAGE_PAT_LARGE: below the size of what it maps, it falls away."""
_LARGE_SHIFTS = (30, 21)


def kernel_image_physical(address: int, info: VmcoreInfo) -> int | None:
    """Translate an address of the kernel image: NUMBER(phys_base) already includes KASLR. None outside of it."""
    if address < START_KERNEL_MAP:
        return None
    phys_base = info.number("phys_base")
    size = info.number("KERNEL_IMAGE_SIZE") or DEFAULT_IMAGE_SIZE
    if phys_base is None or address >= START_KERNEL_MAP + size:
        return None
    physical = address - START_KERNEL_MAP + phys_base
    return physical if 0 <= physical < 1 << MAX_PHYSICAL_BITS else None


def geometry(info: VmcoreInfo) -> Geometry | None:
    """Return the format of the kernel's page tables, None where VMCOREINFO does not lead to the first of them.

    SYMBOL(init_top_pgt), as swapper_pg_dir of every kernel since 4.13; four or five levels by
    NUMBER(pgtable_l5_enabled); with memory encryption, NUMBER(sme_mask) is no part of an address.
    """
    table = info.symbol("init_top_pgt") or info.symbol("swapper_pg_dir")
    root = None if table is None else kernel_image_physical(table, info)
    if root is None:
        return None
    five = bool(info.number("pgtable_l5_enabled"))
    shifts = (48, 39, 30, 21, 12) if five else (39, 30, 21, 12)
    levels = tuple(
        Level(shift, 9, _PRESENT | _LARGE, _PRESENT | _LARGE)
        if shift in _LARGE_SHIFTS
        else Level(shift, 9, _PRESENT if shift == 12 else 0, _PRESENT)
        for shift in shifts
    )
    return Geometry(
        root=root,
        page_size=4096,
        levels=levels,
        first=(1 << 64) - (1 << (56 if five else 47)),
        last=(1 << 64) - 1,
        present_mask=_PRESENT,
        present_value=_PRESENT,
        table_mask=_PRESENT,
        table_value=_PRESENT,
        address_mask=_ADDRESS & ~(info.number("sme_mask") or 0),
    )
