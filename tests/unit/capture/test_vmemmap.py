"""The vmemmap exclusion never brings a page into a dump: not one that there is not, not one that must not be read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.dump import DumpReport, write_dump
from capture.options import DumpOptions
from capture.vmcore import open_vmcore
from tests import builders
from tests.builders import PAGE, patched
from tests.fuzz.kernel import MEM_MAP_PAGES, MEM_MAP_PFN, MEM_MAP_SEGMENT, Oddity, kernel_seed
from tests.readers import by_hand

WriteFile = Callable[..., str]


def dumped(core: str, target: Path, *, exclude: bool) -> DumpReport:
    options = DumpOptions(levels=(31,), progress=False, exclude_vmemmap=exclude)
    with open_vmcore(core) as vmcore:
        return write_dump(vmcore, target, options)


def test_pages_of_mem_map_that_are_not_in_the_vmcore_stay_out(vmcore_file: WriteFile, tmp_path: Path) -> None:
    core = patched(kernel_seed().data, builders.program_header(MEM_MAP_SEGMENT, 0), "I", 0)  # PT_NULL
    report = dumped(vmcore_file(core), tmp_path / "out", exclude=True)
    assert report.whole
    assert report.pages == dumped(vmcore_file(core), tmp_path / "all", exclude=False).pages
    assert not set(range(MEM_MAP_PFN, MEM_MAP_PFN + MEM_MAP_PAGES)) & set(by_hand(tmp_path / "out").pages)


@pytest.mark.parametrize("exclude", [False, True])
def test_a_poisoned_page_of_mem_map_is_never_read(exclude: bool, vmcore_file: WriteFile, tmp_path: Path) -> None:
    core, poisoned = kernel_seed(oddity=Oddity.POISONED_MEM_MAP).data, MEM_MAP_PFN + 1
    assert dumped(vmcore_file(core), tmp_path / "out", exclude=exclude).whole
    pages = by_hand(tmp_path / "out").pages
    assert poisoned not in pages
    assert MEM_MAP_PFN in pages


def test_a_mem_map_that_lies_beyond_all_memory_costs_nothing(vmcore_file: WriteFile, tmp_path: Path) -> None:
    """One damaged entry of the kernel's page tables."""
    core, entry = kernel_seed().data, struct.pack("<Q", MEM_MAP_PFN * PAGE | 1 << 63 | 0x63)
    assert core.count(entry) == 1
    core = core.replace(entry, struct.pack("<Q", 1 << 45 | 1 << 63 | 0x63))
    assert dumped(vmcore_file(core), tmp_path / "out", exclude=True).whole
