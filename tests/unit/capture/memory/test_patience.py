"""Memory that takes long to fail: what it may cost, and what is saved all the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.dump import write_dump
from capture.memory import patience
from capture.memory.patience import Patience
from tests.builders import MEMORY_AT, PAGE, crashed_core
from tests.faults import open_poisoned
from tests.outcome import dump_options, read_back

WriteFile = Callable[[bytes], str]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region is a MiB and has 0.2 seconds; all of them together 0.5."""
    monkeypatch.setattr(patience, "REGION", MIB)
    monkeypatch.setattr(patience, "REGION_SECONDS", 0.2)
    monkeypatch.setattr(patience, "MOST_SECONDS", 0.5)


def fail(watched: Patience, offset: int, seconds: float) -> None:
    with contextlib.suppress(OSError), watched.reading(offset):
        time.sleep(seconds)
        raise OSError(5, "Input/output error")


def test_a_region_is_given_up_when_its_time_is_over_and_no_other_one() -> None:
    watched = Patience()
    fail(watched, 5 * MIB, 0.15)
    assert not watched.given_up(5 * MIB)
    fail(watched, 6 * MIB - 1, 0.06)
    assert watched.given_up(5 * MIB)
    assert watched.given_up(6 * MIB - 1)
    assert not watched.given_up(6 * MIB)
    assert not watched.given_up(5 * MIB - 1)


def test_when_the_time_of_all_is_over_each_region_has_one_read() -> None:
    watched = Patience()
    for region in range(3):
        fail(watched, region * MIB, 0.18)
    assert not watched.given_up(3 * MIB)
    fail(watched, 3 * MIB, 0.0)
    assert watched.given_up(3 * MIB)


def test_what_works_costs_nothing() -> None:
    watched = Patience()
    for _ in range(3):
        with watched.reading(0):
            time.sleep(0.3)
    assert not watched.given_up(0)


def test_no_more_regions_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_MOST_REGIONS", 3)
    watched = Patience()
    for region in range(10):
        fail(watched, region * MIB, 0.0)
    assert list(watched._lost) == [7, 8, 9]


def test_a_save_loses_no_more_time_than_that_and_says_what_was_not_tried(
    vmcore_file: WriteFile, tmp_path: Path
) -> None:
    """Six MiB of pages; from the middle of the second to the end of the fourth all fail, after 50 ms each.

    One by one they would take half a minute.
    """
    pages = b"".join(number.to_bytes(8, "little") * (PAGE // 8) for number in range(1, 6 * MIB // PAGE + 1))
    name = vmcore_file(crashed_core(pages=pages))
    data = Path(name).read_bytes()
    start = data.index(pages)
    bad = range(start + 3 * MIB // 2, start + 4 * MIB)
    started = time.monotonic()
    report = write_dump(open_poisoned(name, bad, 0.05), tmp_path / "dump", dump_options(level=0, threads=2))
    took = time.monotonic() - started
    assert took < 6
    lost = {pfn for first, last in report.statistics.unreadable.ranges for pfn in range(first, last + 1)}
    first = MEMORY_AT // PAGE
    within = {first + number for number in range(len(pages) // PAGE)
              if start + number * PAGE < bad.stop and bad.start < start + (number + 1) * PAGE}  # fmt: skip
    assert within <= lost
    assert 0 < report.pages_not_tried <= len(lost)
    assert f"{report.pages_not_tried} of them not tried" in (report.shortfall() or "")
    assert not report.whole
    good, _ = read_back(tmp_path / "dump")
    for pfn in set(range(first, first + len(pages) // PAGE)) - lost:
        assert good[pfn] == pages[(pfn - first) * PAGE : (pfn - first + 1) * PAGE]
    spared = [number for number in range(len(pages) // PAGE) if not 1 <= number * PAGE // MIB <= 4]
    assert not {first + number for number in spared} & lost
