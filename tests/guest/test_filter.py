"""Machines with pages of every class: what is left out is what makedumpfile leaves out, and what the kernel says."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from capture.kernel.pages import FREE, HWPOISON, OFFLINE, USER, excluded_classes
from capture.pagefilter import PageFilter
from capture.vmcore import open_vmcore
from tests.guest import host
from tests.guest.cache import Kernel
from tests.guest.cases import FILTER_CASES, Case, parameters
from tests.guest.conftest import unavailable
from tests.guest.crash import BALLOON_BYTES, CrashOfKinds, ImageStore, crash_of_kinds
from tests.guest.reference import different_pages
from tests.readers import bitmaps

# makedumpfile 1.7.2 knows 6.1; of 6.12 it keeps far too much.
KNOWN_TO_MAKEDUMPFILE = tuple(case for case in FILTER_CASES if "6.12" not in case.name)
LEVELS = range(32)
WITH_MAKEDUMPFILE = (0, 1, 2, 4, 8, 16, 27, 31)

# What makedumpfile --show-stats calls the classes.
STATISTICS = {
    "cache": "Non-private cache pages", "cache_private": "Private cache pages", "user": "User process data pages",
    "free": "Free pages", "hwpoison": "Hwpoison pages", "offline": "Offline pages",
}  # fmt: skip


@pytest.fixture(scope="session")
def crash_kinds(
    image_store: ImageStore, kernels: Callable[[str], Kernel], guest_folder: Path
) -> Callable[[Case], CrashOfKinds]:
    @functools.cache
    def crash(case: Case) -> CrashOfKinds:
        kernels(case.kernel)  # skips here, where it can say why
        return crash_of_kinds(case, image_store, guest_folder / case.name)

    return crash


@pytest.fixture(scope="session", params=parameters(FILTER_CASES), ids=str)
def crashed(request: pytest.FixtureRequest, crash_kinds: Callable[[Case], CrashOfKinds]) -> CrashOfKinds:
    """A machine with pages of every class, crashed."""
    return crash_kinds(request.param)


@contextmanager
def filtering(crashed: CrashOfKinds) -> Iterator[PageFilter]:
    with open_vmcore(str(crashed.elf)) as vmcore:
        page_filter = PageFilter(vmcore)
        for _ in page_filter.windows():
            pass
        yield page_filter


def kinds_of(page_filter: PageFilter) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Class of every page, and which pages there are."""
    windows = list(page_filter.windows())
    assert [window.first_pfn for window in windows] == sorted(window.first_pfn for window in windows)
    count = windows[-1].first_pfn + len(windows[-1].kinds)
    kinds, there = np.zeros(count, dtype=np.uint8), np.zeros(count, dtype=np.bool_)
    for window in windows:
        place = slice(window.first_pfn, window.first_pfn + len(window.kinds))
        kinds[place], there[place] = window.kinds, window.there
    return kinds, there


def makedumpfile(crashed: CrashOfKinds, level: int, target: Path) -> dict[str, int]:
    """Filter with Debian's makedumpfile; return its own statistics."""
    if (line := host.missing(["makedumpfile"])) is not None:
        unavailable(line)
    command = [str(host.find("makedumpfile")), "-l", "-d", str(level), "--show-stats", str(crashed.elf), str(target)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        name: int(found[1], 16)
        for name, title in STATISTICS.items()
        if (found := re.search(rf"^ *{title} *: (0x[0-9a-f]+)$", said, re.MULTILINE))
    }


@pytest.mark.parametrize("crashed", parameters(KNOWN_TO_MAKEDUMPFILE), indirect=True, ids=str)
def test_bitmap_2_is_that_of_debians_makedumpfile(crashed: CrashOfKinds, tmp_path: Path) -> None:
    """But for pages that differ on purpose: those that are there in part, and poisoned ones; each is accounted for."""
    with filtering(crashed) as page_filter:
        kinds, there = kinds_of(page_filter)
    for level in WITH_MAKEDUMPFILE:
        target = tmp_path / f"level-{level}"
        said = makedumpfile(crashed, level, target)
        existing, theirs = bitmaps(target)
        target.unlink()
        ours = there & ~excluded_classes(level)[kinds]
        existing, theirs = existing[: len(there)], theirs[: len(there)]
        partial = there & ~existing
        assert int(partial.sum()) <= 1
        differ = np.flatnonzero((ours ^ theirs) & ~partial)
        poisoned = set(crashed.poisoned)
        unexplained = [pfn for pfn in differ.tolist() if pfn not in poisoned]
        assert not unexplained, (level, len(differ), unexplained[:10])
        counts = dict(zip(("kernel", "free", "cache", "cache_private", "user", "hwpoison", "offline"),
                          np.bincount(kinds[there], minlength=8).tolist(), strict=False))  # fmt: skip
        left_out = excluded_classes(level)
        for name, kind in (("free", FREE), ("user", USER), ("offline", OFFLINE)):
            if left_out[kind]:
                # A poisoned page is a poisoned page to us; to makedumpfile the class that matches first.
                assert abs(said[name] - counts[name]) <= len(poisoned), (level, name)


def test_every_level_keeps_what_its_bits_say_and_trusts_itself(crashed: CrashOfKinds) -> None:
    with filtering(crashed) as page_filter:
        kinds, there = kinds_of(page_filter)
        for level in LEVELS:
            verdict = page_filter.verdict(level)
            assert (verdict.level, verdict.reasons) == (level, ())
        assert page_filter.census.free_counted is not None
        assert abs(page_filter.census.free_found - page_filter.census.free_counted) < 64
        own = page_filter.census.protected[:, [FREE, USER]]
        assert int(own.sum()) == 0, "pages of the kernel's own look like others"
    assert int(there.sum()) > 100_000
    assert set(np.unique(kinds[there]).tolist()) <= set(range(7))


def test_classes_agree_with_what_the_kernel_said_right_before(crashed: CrashOfKinds) -> None:
    """The healthy system's own counts; it went on for a moment, loaded the capture kernel: within some per cent."""
    with filtering(crashed) as page_filter:
        classes = page_filter.census.by_name()
        free = page_filter.census.free_found
    buddy, huge = (crashed.kpageflags(name) for name in ("BUDDY", "HUGE"))
    anonymous = crashed.meminfo["AnonPages"] // 4
    assert abs(free - buddy) < 0.1 * buddy
    assert abs(classes["user"] - anonymous - huge) < 0.1 * (anonymous + huge) + 500
    assert crashed.kpageflags("THP") > 4000 or "thp" not in crashed.case.workloads
    assert crashed.kpageflags("SWAPCACHE") > 100 or "swap" not in crashed.case.workloads
    if "balloon" in crashed.case.workloads:
        assert classes["offline"] >= BALLOON_BYTES // 4096 // 2
    if "hugetlb" in crashed.case.workloads:
        assert huge >= 11 * 512


@pytest.mark.parametrize(
    "crashed", parameters(case for case in FILTER_CASES if "poison" in case.workloads), indirect=True, ids=str
)
def test_a_poisoned_page_is_in_no_dump(crashed: CrashOfKinds) -> None:
    assert crashed.poisoned
    with filtering(crashed) as page_filter:
        kinds, there = kinds_of(page_filter)
        assert page_filter.census.classes[HWPOISON] >= 2
    known = [pfn for pfn in crashed.poisoned if pfn < len(there) and there[pfn]]
    assert known
    assert all(kinds[pfn] == HWPOISON for pfn in known)
    _, saved = bitmaps(crashed.saved / "vmcore")
    assert not any(saved[pfn] for pfn in known)


def test_the_dump_that_was_saved_is_level_31_and_equals_its_source(crashed: CrashOfKinds) -> None:
    manifest = json.loads((crashed.saved / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["dump"]["level"] == 31
    assert manifest["dump"]["filter"]["checks_failed"] == []
    with filtering(crashed) as page_filter:
        assert manifest["dump"]["pages"] == page_filter.census.kept(31)
        assert manifest["dump"]["filter"]["classes"] == page_filter.census.by_name()
    pages, wrong = different_pages(crashed.saved / "vmcore", crashed.elf)
    assert (pages, wrong) == (manifest["dump"]["pages"], 0)
