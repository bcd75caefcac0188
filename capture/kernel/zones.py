"""The kernel's own count of free pages: zone.free_area[order].nr_free of every zone of every node.

struct zone, struct free_area, struct pglist_data: include/linux/mmzone.h. ``nr_free`` follows the free lists, whose
number and size VMCOREINFO names.
"""

from __future__ import annotations

import struct

import numpy as np

from capture.kernel.address import KernelMemory
from capture.memory.image import UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

MAX_NODES, MAX_ZONES, MAX_ORDERS = 1 << 12, 16, 64
_MAX_STRUCTURE = 1 << 20


def free_pages(memory: KernelMemory, info: VmcoreInfo) -> int | None:
    """Return how many pages lie in the buddy allocator's free lists, None where that cannot be found out."""
    try:
        return _free_pages(memory, info)
    except (UnreadableMemory, struct.error):
        return None


def _free_pages(memory: KernelMemory, info: VmcoreInfo) -> int | None:
    zone_size, area_size = info.size("zone"), info.size("free_area")
    zones_at, count_at = info.offset("pglist_data.node_zones"), info.offset("pglist_data.nr_zones")
    areas_at, orders = info.offset("zone.free_area"), info.length("zone.free_area")
    lists, list_size = info.length("free_area.free_list"), info.size("list_head")
    known = (zone_size, area_size, zones_at, count_at, areas_at, orders, lists, list_size)
    if any(value is None for value in known):
        return None
    zone_size, area_size, zones_at, count_at, areas_at, orders, lists, list_size = (value or 0 for value in known)
    if not 0 < orders <= MAX_ORDERS or areas_at + orders * area_size > zone_size or zone_size > _MAX_STRUCTURE:
        return None
    count_field = lists * list_size
    if count_field + 8 > area_size:
        return None
    total = 0
    nodes = _nodes(memory, info)
    for node in nodes:
        for zone in range(min(memory.read_unsigned(node + count_at, 4), MAX_ZONES)):
            raw = memory.read(node + zones_at + zone * zone_size + areas_at, orders * area_size)
            free = np.ndarray((orders,), "<u8", buffer=raw, offset=count_field, strides=(area_size,))
            total += sum(int(blocks) << order for order, blocks in enumerate(free.tolist()))
    return total if nodes else None


def _nodes(memory: KernelMemory, info: VmcoreInfo) -> list[int]:
    """Return the addresses of every node's struct pglist_data."""
    table = info.symbol("node_data")
    if table is None:
        only = info.symbol("contig_page_data")
        return [] if only is None else [only]
    count = min(info.length("node_data") or 1, MAX_NODES)
    return [node for node in struct.unpack(f"<{count}Q", memory.read(table, 8 * count)) if node]
