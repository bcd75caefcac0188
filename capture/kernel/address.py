"""Kernel virtual addresses → bytes, as far as the ELF header and VMCOREINFO alone can tell.

Two linear maps cover what the log needs: the kernel image (its place is in VMCOREINFO) and the direct map (``p_vaddr``
of the PT_LOADs). Both are looked up, not walked: an address that neither covers is "not mapped".
"""

from __future__ import annotations

from collections.abc import Callable

from capture.kernel.arch import aarch64, x86_64
from capture.memory.image import LinearMap, MemoryImage, UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

_IMAGE_RULES: dict[str, Callable[[int, VmcoreInfo], int | None]] = {
    "x86_64": x86_64.kernel_image_physical,
    "aarch64": aarch64.kernel_image_physical,
}


class KernelMemory:
    """Reads the dead kernel's memory by virtual address."""

    def __init__(self, image: MemoryImage, info: VmcoreInfo, machine: str) -> None:
        self._image = image
        self._info = info
        self._rule = _IMAGE_RULES[machine]
        self._last: LinearMap | None = None
        """Where the last address lay: the next one is near it, and there may be thousands of maps."""

    def physical(self, address: int) -> int | None:
        """Return the physical address, or None: not mapped as far as we can tell."""
        found = self._rule(address, self._info)
        if found is not None:
            return found
        if self._last is None or not 0 <= address - self._last.virtual < self._last.size:
            maps = (linear for linear in self._image.linear_maps if 0 <= address - linear.virtual < linear.size)
            self._last = next(maps, None)
        return None if self._last is None else self._last.physical + address - self._last.virtual

    def read(self, address: int, length: int) -> bytes:
        """Return ``length`` bytes at a virtual address.

        Raises:
            UnreadableMemory: it is not mapped, or its memory is not in the source.
        """
        physical = self.physical(address)
        if physical is None:
            raise UnreadableMemory(f"virtual address {address:#x} is not mapped")
        return self._image.read(physical, length)

    def read_unsigned(self, address: int, size: int) -> int:
        """Return a little-endian unsigned number of ``size`` bytes; raises as ``read`` does."""
        return int.from_bytes(self.read(address, size), "little")
