"""Half the room that a dump needs: nothing is missing that a crash is understood with, and more room makes it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import drgn
import numpy as np
import pytest
from drgn.helpers.linux.pid import for_each_task
from numpy.typing import NDArray

from capture.kernel.pages import FIRST, LAST, SLAB, TABLES, TYPED
from capture.pagefilter import PageFilter
from capture.vmcore import open_vmcore
from tests.builders import PAGE
from tests.guest import disk
from tests.guest.cache import Kernel
from tests.guest.cases import BUSY
from tests.guest.crash import (
    SAVE_TIMEOUT,
    TARGET_LABEL,
    ImageStore,
    demand,
    rescue_shell,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT, Disk
from tests.outcome import manifest_of, read_back
from tests.readers import bitmaps, drgn_program

pytestmark = pytest.mark.debuginfo

THREAD_SIZE = 16 << 10
PAGE_TABLE, NO_TYPE = 0x200, 0xF000_0000
"""PG_table and PAGE_TYPE_BASE of 6.1, include/linux/page-flags.h: the bit of a page's type is taken away."""


class Dumps(NamedTuple):
    """The same crash three times: saved to a disk with room, cut short for want of it, and that one gone on with."""

    whole: Path
    cut: Path
    resumed: Path
    vmlinux: Path


@pytest.fixture(scope="module")
def dumps(
    kernels: Callable[[str], Kernel],
    debug_vmlinux: Callable[[Kernel], Path],
    image_store: ImageStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Dumps:
    """The second disk has ballast, so that half of what the first dump took is free; it is removed then."""
    vmlinux = debug_vmlinux(kernels(BUSY.kernel))
    folder = tmp_path_factory.mktemp("half-disk")
    with rescue_shell(BUSY, image_store, folder, target="LABEL=none", append="vmcapture.wait=1") as machine:
        demand(machine, f"mkdir /run/target /run/half && mount LABEL={TARGET_LABEL} /run/target")
        demand(machine, "vmcapture save /run/target/whole", SAVE_TIMEOUT)
        needed = int(demand(machine, "stat -c %s /run/target/whole/*/vmcore"))
        half = disk.make(folder / "half.ext4", f"{(needed >> 20) + 32}M", "half")
        machine.attach(Disk(half))
        demand(machine, "for i in $(seq 30); do mount LABEL=half /run/half && break; sleep 1; done")
        free = int(demand(machine, "df -k /run/half | awk 'NR == 2 { print $4 }'"))
        ballast = -(-(free - (needed >> 11)) // 1024)
        demand(machine, f"dd if=/dev/zero of=/run/half/ballast bs=1M count={ballast}", SAVE_TIMEOUT)
        status, said = machine.run("vmcapture save /run/half/saved", SAVE_TIMEOUT)
        assert status == 3, said
        assert "no room left" in said
        demand(machine, "cp -a /run/half/saved /run/target/cut && rm /run/half/ballast", SAVE_TIMEOUT)

        said = demand(machine, "vmcapture save /run/half/saved", SAVE_TIMEOUT)

        assert "where it was cut short before" in said
        verified = demand(machine, "vmcapture verify /run/half/saved/*/vmcore --against /proc/vmcore", SAVE_TIMEOUT)
        assert "pages equal the source" in verified
        demand(machine, "umount /run/half /run/target")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    target = target_image(folder)
    saved = [
        disk.extract(target, "/whole", folder / "1"),
        disk.extract(target, "/cut", folder / "2"),
        disk.extract(half, "/saved", folder / "3"),
    ]
    ((whole,), (cut,), (resumed,)) = ([*parent.iterdir()] for parent in saved)
    return Dumps(whole, cut, resumed, vmlinux)


def pages_of(path: Path) -> dict[int, bytes]:
    return read_back(path)[0]


def test_it_is_cut_at_half_and_says_so(dumps: Dumps) -> None:
    manifest = manifest_of(dumps.cut)
    assert not manifest["complete"]
    assert "no room left" in manifest["failures"][0]
    needed, had = ((folder / name).stat().st_size for folder, name in (
        (dumps.whole, "vmcore"), (dumps.cut, "vmcore.incomplete")))  # fmt: skip
    assert 0.4 * needed < had < 0.5 * needed
    assert len(pages_of(dumps.cut / "vmcore.incomplete")) == manifest["dump"]["pages_written"]


def test_gone_on_with_it_equals_the_one_that_was_never_cut(dumps: Dumps) -> None:
    manifest = manifest_of(dumps.resumed)
    assert manifest["complete"]
    assert manifest["dump"]["pages_found"] == manifest_of(dumps.cut)["dump"]["pages_written"]
    whole, resumed = dumps.whole / "vmcore", dumps.resumed / "vmcore"
    for ours, theirs in zip(bitmaps(resumed), bitmaps(whole), strict=True):
        assert bool((ours == theirs).all())
    assert pages_of(resumed) == pages_of(whole)


def test_what_is_saved_first_is_there_to_the_last_page(dumps: Dumps) -> None:
    """As the program itself counts: all turns before the one that was cut."""
    turns: dict[int, set[int]] = {turn: set() for turn in range(LAST)}

    def note(first_pfn: int, passes: Iterable[NDArray[np.bool_]]) -> None:
        for turn, pages in enumerate(passes):
            turns[turn].update((np.flatnonzero(pages) + first_pfn).tolist())

    with open_vmcore(str(dumps.whole / "vmcore")) as vmcore:
        for _ in PageFilter(vmcore).kept(31, note=note):
            pass
    whole, cut = pages_of(dumps.whole / "vmcore"), pages_of(dumps.cut / "vmcore.incomplete")
    share = {turn: len(pages & whole.keys()) / len(whole) for turn, pages in turns.items()}
    assert 0.1 < sum(share[turn] for turn in (TABLES, FIRST, TYPED, SLAB)) < 0.6, share
    for turn in (TABLES, FIRST, TYPED, SLAB):
        pages = turns[turn] & whole.keys()
        assert pages
        assert len(pages - cut.keys()) == 0, f"turn {turn}: {len(pages - cut.keys())} of {len(pages)} are missing"
    assert whole.keys() - cut.keys(), "and what was cut is not there"


@pytest.fixture(scope="module")
def programs(dumps: Dumps) -> tuple[drgn.Program, drgn.Program]:
    """drgn on the cut dump, and on the whole one."""
    names = (dumps.cut / "vmcore.incomplete", dumps.whole / "vmcore")
    cut, whole = (drgn_program(core, dumps.vmlinux) for core in names)
    return cut, whole


def alike(programs: tuple[drgn.Program, drgn.Program], ranges: Iterable[tuple[int, int]], *, physical: bool) -> int:
    """Hold that ranges (address, bytes) read alike; returns how many bytes those are."""
    cut, whole = programs
    size = 0
    for address, length in ranges:
        assert cut.read(address, length, physical) == whole.read(address, length, physical), hex(address)
        size += length
    return size


def mem_map(program: drgn.Program, dump: Path) -> Iterator[tuple[int, int]]:
    """Where the struct pages are of all memory that there is: (virtual address, bytes), whole pages."""
    size = drgn.sizeof(program.type("struct page"))
    existing = np.flatnonzero(bitmaps(dump)[0])
    for page in np.unique(existing * size // PAGE).tolist():
        yield program["vmemmap_base"].value_() + page * PAGE, PAGE


def page_tables(program: drgn.Program, dump: Path) -> NDArray[np.int64]:
    """PFNs that mem_map says are page tables."""
    page = program.type("struct page")
    size = drgn.sizeof(page)
    existing, (_, in_dump) = np.flatnonzero(bitmaps(dump)[0]), bitmaps(dump)
    offset = drgn.offsetof(page, "page_type")
    found = []
    for first in range(0, len(existing), 1024):
        for pfn in existing[first : first + 1024].tolist():
            address = program["vmemmap_base"].value_() + pfn * size + offset
            kind = program.read_u32(address)
            if kind & (NO_TYPE | PAGE_TABLE) == NO_TYPE:
                found.append(pfn)
    tables = np.array(found, dtype=np.int64)
    assert bool(in_dump[tables].all())
    return tables


def test_kernel_text_mem_map_page_tables_and_stacks_are_there_for_drgn(
    dumps: Dumps, programs: tuple[drgn.Program, drgn.Program]
) -> None:
    _, whole = programs
    text, end = (whole.symbol(name).address for name in ("_stext", "_etext"))
    assert alike(programs, ((at, PAGE) for at in range(text, end, PAGE)), physical=False) > 4 << 20
    core = dumps.whole / "vmcore"
    assert alike(programs, mem_map(whole, core), physical=False) > 8 << 20
    tables = page_tables(whole, core)
    assert alike(programs, ((pfn * PAGE, PAGE) for pfn in tables.tolist()), physical=True) > 1000 * PAGE
    stacks = ((task.stack.value_(), THREAD_SIZE) for task in for_each_task(whole))
    assert alike(programs, stacks, physical=False) > 160 * THREAD_SIZE


def test_drgn_walks_all_tasks_and_their_stacks(programs: tuple[drgn.Program, drgn.Program]) -> None:
    cut, whole = (
        [
            (task.pid.value_(), task.comm.string_(), [frame.pc for frame in opened.stack_trace(task)])
            for task in for_each_task(opened)
        ]
        for opened in programs
    )
    assert cut == whole
    assert len(cut) > 160
    assert sum(len(frames) > 3 for _, _, frames in cut) > 160
