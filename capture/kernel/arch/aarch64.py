"""aarch64: where the kernel image lies in physical memory."""

from __future__ import annotations

from capture.notes.vmcoreinfo import VmcoreInfo

KERNEL_IMAGE_MAX = 1 << 31
"""The image lies within 2 GiB above MODULES_END's neighbour KIMAGE_VADDR (arch/arm64/include/asm/memory.h)."""


def kernel_image_physical(address: int, info: VmcoreInfo) -> int | None:
    """Translate an address of the kernel image: virtual minus NUMBER(kimage_voffset). None outside of it."""
    voffset = info.number("kimage_voffset")
    stext = info.symbol("_stext")
    if voffset is None or stext is None or not stext - KERNEL_IMAGE_MAX <= address < stext + KERNEL_IMAGE_MAX:
        return None
    physical = (address - voffset) % (1 << 64)
    return physical if physical < 1 << 52 else None
