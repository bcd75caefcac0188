"""x86_64: where the kernel image lies in physical memory."""

from __future__ import annotations

from capture.notes.vmcoreinfo import VmcoreInfo

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map, arch/x86/include/asm/page_64_types.h."""
DEFAULT_IMAGE_SIZE = 1 << 30
"""KERNEL_IMAGE_SIZE with KASLR, arch/x86/include/asm/page_64_types.h."""


def kernel_image_physical(address: int, info: VmcoreInfo) -> int | None:
    """Translate an address of the kernel image: NUMBER(phys_base) already includes KASLR. None outside of it."""
    phys_base = info.number("phys_base")
    size = info.number("KERNEL_IMAGE_SIZE") or DEFAULT_IMAGE_SIZE
    if phys_base is None or not START_KERNEL_MAP <= address < START_KERNEL_MAP + size:
        return None
    physical = address - START_KERNEL_MAP + phys_base
    return physical if physical >= 0 else None
