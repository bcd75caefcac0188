"""What a job takes of its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capture import footprint
from capture.footprint import Footprint


def test_memory_is_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       90836 kB\nMemFree:        5 kB\nMemAvailable:   27000 kB\n")
    monkeypatch.setattr(footprint, "MEMINFO", tmp_path / "meminfo")
    assert footprint.memory("MemTotal") == 90836 << 10
    assert footprint.memory("MemAvailable") == 27000 << 10
    assert footprint.memory("Mem") is None


def test_a_kernel_that_does_not_tell_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "MEMINFO", tmp_path / "missing")
    monkeypatch.setattr(footprint, "STATUS", tmp_path / "missing")
    values = Footprint().values()
    assert values["memory_total"] is values["memory_available_least"] is values["peak_rss"] is None


def test_the_least_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "MEMINFO", tmp_path / "meminfo")
    taken = Footprint()
    for available in (50, 20, 40):
        (tmp_path / "meminfo").write_text(f"MemAvailable: {available} kB\n")
        taken.sample()
    assert taken.values()["memory_available_least"] == 20 << 10


def test_this_process_has_a_peak_and_cpus() -> None:
    assert (footprint.peak_rss() or 0) > 1 << 20
    assert footprint.cpus() == len(os.sched_getaffinity(0))
    assert footprint.uptime() > 0
