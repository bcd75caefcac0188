"""Progress: a bar on a terminal, plain lines elsewhere, silence when asked."""

from __future__ import annotations

import io
import os
import re
import threading
from types import SimpleNamespace

import pytest

from capture import progress as module
from capture.progress import LINE_INTERVAL, Progress

MIB = 1 << 20


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=turned))
    return turned


def lines_after(clock: Clock, total: int, steps: list[tuple[float, int]]) -> list[str]:
    """The plain lines of a job that handles (seconds, bytes) step by step."""
    file = io.StringIO()
    with Progress("saving memory", total, file=file) as progress:
        for seconds, count in steps:
            clock.now += seconds
            progress.advance(count)
    return file.getvalue().splitlines()


def test_a_plain_line_has_share_amount_rate_and_time_left(clock: Clock) -> None:
    (line,) = lines_after(clock, 100 * MIB, [(10, 25 * MIB)])
    assert re.fullmatch(r"saving memory:  25% 25\.0M/100M 2\.[56]\d*MB/s, 00:30 left", line)


def test_plain_lines_come_every_few_seconds_and_not_with_every_chunk(clock: Clock) -> None:
    lines = lines_after(clock, 100 * MIB, [(0.5, MIB)] * 100)
    assert len(lines) == 50 / LINE_INTERVAL
    shares = [int(re.findall(r"(\d+)%", line)[0]) for line in lines]
    assert shares == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_a_short_job_prints_no_line(clock: Clock) -> None:
    assert lines_after(clock, 100 * MIB, [(0.1, 50 * MIB), (0.1, 50 * MIB)]) == []


def test_plain_lines_are_ascii_and_fit_an_80_column_console(clock: Clock) -> None:
    for line in lines_after(clock, 1 << 50, [(3600, 1 << 40), (86_400, 1 << 41)]):
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 80


def test_nothing_to_do_is_no_division_by_zero(clock: Clock) -> None:
    (line,) = lines_after(clock, 0, [(10, 0)])
    assert line.startswith("saving memory:   0%")


def test_a_job_that_has_not_moved_yet_says_so(clock: Clock) -> None:
    (line,) = lines_after(clock, 100 * MIB, [(10, 0)])
    assert "  0% 0.00/100M" in line
    assert line.endswith("? left")


def test_quiet_prints_nothing_but_still_tells_the_time(clock: Clock) -> None:
    file = io.StringIO()
    with Progress("saving memory", 100 * MIB, enabled=False, file=file) as progress:
        clock.now += 60
        progress.advance(50 * MIB)
        assert progress.seconds == 60
    assert file.getvalue() == ""


def test_by_default_it_goes_to_standard_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("saving memory", 100 * MIB) as progress:
        clock.now += 10
        progress.advance(MIB)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("saving memory:")


def on_a_terminal(*, enabled: bool = True) -> str:
    """What a terminal of 80 columns gets from a job of two halves."""
    master, slave = os.openpty()
    with (
        os.fdopen(slave, "w") as terminal,
        Progress("saving memory", 100 * MIB, enabled=enabled, file=terminal) as progress,
    ):
        progress.advance(50 * MIB)
        progress.advance(50 * MIB)
    with os.fdopen(master, "rb", buffering=0) as screen:
        return b"".join(iter(lambda: read_until_hung_up(screen), b"")).decode()


def read_until_hung_up(screen: io.RawIOBase) -> bytes:
    """What the kernel has brought over by now; it needs a moment, and says EIO once all is there and no one writes."""
    try:
        return screen.read(1 << 16) or b""
    except OSError:
        return b""


def test_a_terminal_gets_one_bar_that_ends_at_100_percent() -> None:
    shown = on_a_terminal()
    assert "saving memory: 100%" in shown
    assert "100M/100M" in shown
    assert "B/s" in shown
    assert shown.count("\n") == 1  # the one that ends the bar; before, it is redrawn in place


def test_a_quiet_terminal_stays_empty() -> None:
    assert on_a_terminal(enabled=False) == ""


def test_the_bar_starts_no_thread() -> None:
    """A thread more is a stack more, in a kernel with 26 MB to spare."""
    before = threading.active_count()
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, Progress("saving memory", MIB, file=terminal) as progress:
        progress.advance(MIB // 2)
        assert threading.active_count() == before
    os.close(master)
