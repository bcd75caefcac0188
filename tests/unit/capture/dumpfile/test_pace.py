"""zstd:auto: the level at which neither the disk nor the CPUs wait."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.dumpfile.codec import codec
from capture.dumpfile.pace import ASSUMED_SPEED, FIRST_LEVEL, LEVELS, NEARLY, PAGE_SECONDS, SAMPLE_EVERY, Cost, Pace
from capture.dumpfile.writer import Step
from tests.builders import PAGE, numbered
from tests.dumps import ZSTD
from tests.readers import DECOMPRESS

MIB = 1 << 20
COSTS = {level: Cost(5e-6 + 2e-6 * index, 2400 - 200 * index) for index, level in enumerate(LEVELS)}
"""A level more takes 2 µs a page more, and makes it 200 bytes smaller."""


def waiting_for(speed: float, size: int = 16 * MIB) -> Step:
    """A step to a disk that takes ``speed`` bytes a second and is what everything waits for."""
    seconds = size / speed
    return Step(size, seconds, seconds, 0.9 * seconds)


def settled(speed: float, *, threads: int = 1) -> int:
    pace = Pace()
    pace.threads = threads
    pace.sampled({level: Cost(cost.seconds, cost.size) for level, cost in COSTS.items()})
    for _ in range(10):
        pace.stepped(waiting_for(speed))
    return pace.level


def best(speed: float, threads: int = 1) -> float:
    return max(reached(cost, speed, threads) for cost in COSTS.values())


def reached(cost: Cost, speed: float, threads: int) -> float:
    return min(threads / (cost.seconds + PAGE_SECONDS), speed / cost.size)


def test_a_slow_disk_is_given_small_pages_and_a_fast_one_many() -> None:
    assert settled(20 * MIB) == max(LEVELS)
    assert settled(10_000 * MIB) == min(LEVELS)
    levels = [settled(speed * MIB) for speed in (20, 80, 120, 160, 240, 400, 10_000)]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) >= 4


def test_more_threads_compress_harder_for_the_same_disk() -> None:
    assert settled(200 * MIB, threads=4) > settled(200 * MIB, threads=1)


@given(st.floats(1e6, 1e10), st.integers(1, 8))
def test_no_level_is_much_faster_than_the_one_taken_and_none_as_fast_is_smaller(speed: float, threads: int) -> None:
    level = settled(speed, threads=threads)
    enough = NEARLY * best(speed, threads)
    assert reached(COSTS[level], speed, threads) >= enough * 0.99
    assert all(reached(COSTS[other], speed, threads) < enough * 1.01 for other in LEVELS if other > level)


def test_a_disk_that_nothing_waits_for_is_taken_for_faster_step_by_step() -> None:
    pace = Pace()
    pace.stepped(waiting_for(50e6))
    assert pace.target_speed == pytest.approx(50e6)
    pace.stepped(Step(16 * MIB, 0.01, 1.0, 0.0))  # written back before it was synced: no measure of the disk
    assert pace.target_speed == pytest.approx(62.5e6)
    for _ in range(30):
        pace.stepped(Step(16 * MIB, 0.01, 1.0, 0.0))
    assert pace.target_speed == pytest.approx(16 * MIB / 0.01)
    for _ in range(20):
        pace.stepped(waiting_for(20e6))
    assert pace.target_speed == pytest.approx(20e6, rel=0.01)


def test_before_a_step_reaches_the_disk_it_is_taken_for_a_common_one() -> None:
    pace = Pace()
    assert pace.target_speed is None
    pace.sampled({level: Cost(cost.seconds, cost.size) for level, cost in COSTS.items()})
    assert pace.target_speed is None
    assert pace.level == settled(ASSUMED_SPEED)
    assert min(LEVELS) < pace.level < max(LEVELS)


def test_a_speed_that_was_only_a_bound_is_forgotten_once_the_disk_is_waited_for() -> None:
    pace = Pace()
    pace.stepped(Step(4 * MIB, 0.004, 0.1, 0.0))  # swallowed by a cache
    assert pace.target_speed == pytest.approx(4 * MIB / 0.004)
    pace.stepped(waiting_for(20e6))
    assert pace.target_speed == pytest.approx(20e6)


def test_a_sample_is_taken_first_and_then_now_and_then() -> None:
    pace = Pace()
    wanted = [pace.begin(SAMPLE_EVERY // 4)[1] for _ in range(12)]
    assert wanted == [True, False, False, False] * 3
    assert pace.pages == {FIRST_LEVEL: 3 * SAMPLE_EVERY}


@given(st.lists(st.tuples(st.integers(0, 1 << 40), *[st.floats(0, 1e3)] * 3), max_size=20))
def test_odd_measurements_never_raise(steps: list[tuple[int, float, float, float]]) -> None:
    pace = Pace()
    pace.sampled({level: Cost(0.0, 0.0) for level in LEVELS})
    for step in steps:
        pace.stepped(Step(*step))
    assert pace.level in LEVELS


def test_the_codec_changes_its_level_and_every_page_comes_back() -> None:
    auto = codec("zstd:auto")
    assert auto.pace is not None
    assert auto.pack is not None
    assert (auto.name, auto.flag) == ("zstd:auto", ZSTD)
    assert auto.largest.name == f"zstd:{LEVELS[0]}"
    buffer = numbered(0, 100)
    offsets = np.arange(100, dtype=np.uint64) * np.uint64(PAGE)
    for speed in (1e3, 1e12, 1e3):
        data, sizes = auto.pack(memoryview(buffer), offsets, PAGE)
        ends = np.cumsum(sizes)
        pages = [data[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
        assert b"".join(map(DECOMPRESS[ZSTD], pages)) == buffer
        for _ in range(40):
            auto.pace.stepped(Step(1 << 20, (1 << 20) / speed, (1 << 20) / speed, time.monotonic()))
    assert set(auto.pace.pages) > {max(LEVELS)}
