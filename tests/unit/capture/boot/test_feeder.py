"""A watchdog is fed as long as something moves, and no longer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from capture.boot import feeder, watchdog
from capture.boot.feeder import fed_while_it_moves
from capture.boot.watchdog import Watchdog, open_watchdogs
from capture.console import Console

INTERVAL, SECONDS = 0.2, 4.0
LOOKS = SECONDS / INTERVAL


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "watchdog").touch()
    monkeypatch.setattr(watchdog, "SYS", tmp_path)
    monkeypatch.setattr(watchdog, "DEV", tmp_path)
    monkeypatch.setattr(watchdog, "available", lambda: ["watchdog"])
    monkeypatch.setattr(feeder, "INTERVAL", INTERVAL)
    return tmp_path / "watchdog"


def fed(dog: Watchdog, device: Path, out: Path | None) -> int:
    with dog, fed_while_it_moves(dog):
        end = time.monotonic() + SECONDS
        with (out or Path("/dev/null")).open("wb", buffering=0) as file:
            while time.monotonic() < end:
                time.sleep(INTERVAL / 2)
                if out is not None:
                    file.write(b"x")
    return device.stat().st_size


def test_bytes_that_are_written_feed_it(device: Path, tmp_path: Path, console: Console) -> None:
    assert fed(open_watchdogs(60, console), device, tmp_path / "out") > LOOKS / 4


def test_a_job_that_hangs_does_not(device: Path, console: Console) -> None:
    assert fed(open_watchdogs(60, console), device, None) < LOOKS / 4  # (to look takes some CPU time)


def test_without_a_watchdog_nobody_looks(console: Console) -> None:
    with open_watchdogs(0, console) as dog, fed_while_it_moves(dog):
        assert dog.armed == ()
