"""One save of which copies are killed: every operation has its points, and a job that breaks its word is found."""

from __future__ import annotations

import pytest

from tests.builders import PAGE
from tests.lab.faults import FAULTS, KILLED
from tests.lab.matrix import Laboratory, Point
from tests.lab.tap import Operation
from tests.lab.walk import WENT_ON, Walk, kills


def test_a_copy_is_killed_at_every_operation_and_the_job_ends_well(laboratory: Laboratory) -> None:
    told: list[Point] = []
    walk = Walk(laboratory, kept=lambda operation: operation.number % 25 == 0, tell=told.append)
    found = walk.run()
    assert [line for point in found for line in point.broken] == []
    (job,) = [point for point in found if point.fault == "none"]
    assert job.status == 0
    killed = [point for point in found if point.fault in FAULTS]
    assert {point.status for point in killed} == {KILLED}
    places = {point.at for point in killed}
    assert places == set(range(1, max(places) + 1))
    # Two threads write: which of them is first, and how much one step syncs, is not the same in every run.
    assert abs(max(places) - len(laboratory.operations)) < 5
    expected = [fault.name for operation in laboratory.operations for fault in kills(operation)]
    assert len(killed) > 200
    assert abs(len(killed) - len(expected)) < 10
    assert any(point.again == "went on, whole" for point in found if point.fault == WENT_ON)


def test_what_cannot_be_done_twice_is_not_done_by_a_copy() -> None:
    assert [fault.name for fault in kills(Operation(1, "rename", "/x/vmcore.incomplete"))] == ["kill-before"]
    write = Operation(1, "pwritev", "/x/vmcore.incomplete", 0, 4 * PAGE)
    assert [fault.name for fault in kills(write)] == ["kill-before", "kill-within", "kill-after"]


@pytest.mark.usefixtures("described_early")
def test_a_job_that_describes_pages_before_they_are_there_is_found(laboratory: Laboratory) -> None:
    found = Walk(laboratory).run()
    assert any("cannot be read back" in line or "differ" in line for point in found for line in point.broken)
