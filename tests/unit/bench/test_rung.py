"""Rows of the reservation benchmark, and what a console says of a capture kernel that failed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import rung
from tests.bench.rung import Figures, Rung

MIB = 1 << 20
CRASH = "[   24.4] Kernel panic - not syncing: sysrq triggered crash\n"
FIGURES = Figures(
    complete=True, memory_total=89 * MIB, memory_least=27 * MIB, peak_rss=40 * MIB, start=4.9, first_byte=5.1, end=10.0,
    dump_seconds=4.86, dump_pages=12000, dump_size=int(29.4 * MIB),
)  # fmt: skip


def manifest(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "complete": True,
        "failures": [],
        "capture_machine": {
            "uptime_at_start": 4.5, "cpus": 1, "memory_total": 89 * MIB, "memory_available_least": 27 * MIB,
            "peak_rss": 40 * MIB,
        },
        "seconds": {"vmcore-dmesg.txt": 0.25, "registers.txt": 0.5, "vmcore": 4.0, "manifest.json": 0.125},
        "dump": {"file": "vmcore", "pages_written": 77},
        "files": {"vmcore": {"size": 12345}, "vmcore-dmesg.txt": {"size": 5}},
    }  # fmt: skip
    return values | changes


def words(found: Rung) -> dict[str, str]:
    """A row by the words of the heading that stand above it."""
    names = ["kernel", "memory", "crashkernel", "who", "saved", "total", "least", "RSS", "init", "start", "first",
             "end", "dump", "pages", "MiB"]  # fmt: skip
    return dict(zip(names, found.row().split(), strict=True))


def test_a_row_has_a_column_for_each_word_of_the_heading() -> None:
    row = Rung("6.1", "1G", 128, "ours", FIGURES, 2.34).row()
    assert len(row) == len(rung.HEADING)
    assert words(Rung("6.1", "1G", 128, "-c", FIGURES, 2.34)) == {
        "kernel": "6.1", "memory": "1G", "crashkernel": "128M", "who": "-c", "saved": "yes", "total": "89",
        "least": "27", "RSS": "40", "init": "2.3", "start": "4.9", "first": "5.1", "end": "10.0", "dump": "4.9",
        "pages": "12000", "MiB": "29.4",
    }  # fmt: skip


def test_what_saved_nothing_is_a_row_with_the_reason_in_one_short_line() -> None:
    row = Rung("6.12", "4G", 96, "ours", None, reason="no such\n  thing " + "x" * 500).row()
    assert row.startswith("6.12        4G         96M  ours     no  no such thing xxx")
    assert row.endswith("…")
    assert len(row.splitlines()) == 1


def test_a_part_is_a_row_with_figures_and_a_reason() -> None:
    part = Figures(**{name: getattr(FIGURES, name) for name in Figures.__slots__} | {"complete": False, "reason": "no"})
    row = Rung("6.1", "1G", 96, "-l", part, reason=part.reason).row()
    assert " part " in row
    assert "?" in row.split()
    assert row.endswith("  29.4  no")


def test_a_manifest_is_read() -> None:
    found = rung.of_manifest(manifest())
    assert (found.complete, found.memory_total, found.memory_least, found.peak_rss) == (
        True, 89 * MIB, 27 * MIB, 40 * MIB,
    )  # fmt: skip
    assert (found.start, found.first_byte, found.end, found.dump_seconds) == (4.5, 4.75, 9.375, 4.0)
    assert (found.dump_pages, found.dump_size) == (77, 12345)
    assert not found.reason


def test_a_manifest_without_a_dump_is_no_dump() -> None:
    found = rung.of_manifest(manifest(complete=False, dump=None, failures=["vmcore: no room", "registers.txt: no"]))
    assert (found.complete, found.dump_pages, found.dump_size) == (False, 0, 0)
    assert found.reason == "vmcore: no room; registers.txt: no"


@pytest.mark.parametrize(
    ("console", "seconds"),
    [
        (f"[    1.0] Run /init as init process\n{CRASH}[    2.345] Run /init as init process\n", 2.345),
        (f"[    1.0] Run /init as init process\n{CRASH}[    0.1] Linux version\n", None),
        ("[    1.0] Run /init as init process\n", None),
    ],
)
def test_the_capture_kernels_init_is_found(console: str, seconds: float | None) -> None:
    assert rung.init_time(console) == seconds


def test_the_console_is_quoted_from_the_crash_on_each_line_once() -> None:
    console = (
        "[    1.0] Out of memory: Killed process 1 (before)\n" + CRASH + "[    0.5] Linux version 6.1\n"
        "[    3.1] Initramfs unpacking failed: write error\n"
        "vmcapture: the image did not unpack whole: reserve more memory, crashkernel=\n"
        "vmcapture: the system in the image does not mount: Invalid argument\n"
        "vmcapture: vmcore-dmesg.txt: 350 records, [ 24.4] Kernel panic - not syncing: sysrq triggered crash\n"
        "[    4.0] Out of memory: Killed process 77 (python3.11) total-vm:100kB\n"
        "[    4.1] Out of memory: Killed process 77 (python3.11) total-vm:100kB\n"
        "[    5.0] Kernel panic - not syncing: System is deadlocked on memory\n"
    )
    failure = "the machine still runs after 300 s (console: /tmp/x/console.log)\n[    5.0] its last lines"
    assert rung.why(failure, console).split("; ") == [
        "the machine still runs after 300 s",
        "Initramfs unpacking failed: write error",
        "vmcapture: the image did not unpack whole: reserve more memory, crashkernel=",
        "vmcapture: the system in the image does not mount: Invalid argument",
        "Out of memory: Killed process 77 (python3.11)",
        "Kernel panic - not syncing: System is deadlocked on memory",
    ]


def test_a_console_that_says_nothing_leaves_what_was_noticed() -> None:
    assert rung.why("no such folder", CRASH + "[    0.5] Linux version 6.1\n") == "no such folder"
