"""Pages that are kept whatever struct page says: that looking for them ends, however damaged what leads to them is."""

from __future__ import annotations

import pytest

from capture.kernel import protect
from capture.kernel.pagetable import Mapping
from tests.builders import PAGE, image_of


class Memory:
    """Kernel memory of which every second page is mapped, or none."""

    tables = None

    def __init__(self, *, mapped: bool) -> None:
        self.mapped = mapped
        self.asked = 0

    def image_physical(self, _start: int, _end: int) -> int | None:
        return None

    def mapping(self, address: int) -> Mapping | None:
        self.asked += 1
        start = address - address % PAGE
        return Mapping(start, start % (1 << 40), PAGE) if self.mapped and start // PAGE % 2 else None


@pytest.mark.parametrize("mapped", [True, False], ids=["every second page", "nothing"])
def test_a_range_of_terabytes_ends_early_and_says_so(mapped: bool) -> None:
    memory = Memory(mapped=mapped)
    with image_of([(0, bytes(PAGE))]) as image:
        finder = protect._Finder(image, memory)  # type: ignore[arg-type]
        finder.virtual(protect.STACKS, 0, 4 * PAGE)
        finder.virtual(protect.PER_CPU, 0, 1 << 44)
        finder.virtual(protect.PER_CPU, 1 << 44, 1 << 45)
        found = finder.result()
    assert memory.asked <= 2 * protect._MAX_GAPS + 8
    assert found.cut_short == ("per-CPU areas",)
    assert ("stacks" in found.found) == mapped
