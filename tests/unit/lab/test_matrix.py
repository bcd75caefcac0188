"""No crash is lost: a save that is killed, refused or cut from its power at any operation keeps every promise.

``python -m tests.lab.matrix`` prints all of it as a table, and takes more points of the errors.
"""

from __future__ import annotations

import pytest

from tests.lab.faults import FAULTS, KILLED, Fault
from tests.lab.matrix import Laboratory, Point, kill_points, points


def all_kept(found: list[Point]) -> None:
    broken = [f"{point.fault} {point.at} ({point.operation}): {line}" for point in found for line in point.broken]
    assert not broken, "\n".join(broken)


def test_killed_at_any_operation_a_save_leaves_what_is_promised_and_goes_on(laboratory: Laboratory) -> None:
    plan = kill_points(laboratory.operations)
    assert len(plan) >= 200
    found = [laboratory.disturbed(fault, at) for fault, at in plan]
    all_kept(found)
    assert {point.status for point in found} == {KILLED}
    assert all(point.operation != "none" for point in found)
    assert {point.kind for point in found} >= {
        "mkdir", "open", "pwritev", "posix_fallocate", "fdatasync", "fsync", "rename",
    }  # fmt: skip
    assert {point.fault for point in found} == {"kill-before", "kill-within", "kill-after"}
    assert len({point.left for point in found}) > 30, "dumps of many sizes"
    assert sum(point.again.startswith("went on") for point in found) > 100


def test_killed_while_it_goes_on_a_save_leaves_what_is_promised_and_goes_on_again(laboratory: Laboratory) -> None:
    operations = laboratory.operations_of(going_on=True)
    found = [laboratory.disturbed(fault, at, going_on=True) for fault, at in kill_points(operations, 30)]
    all_kept(found)
    assert {point.status for point in found} == {KILLED}
    assert {point.kind for point in found} >= {"unlink", "pwritev", "fdatasync", "fsync", "rename"}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS.values() if not fault.kills], ids=lambda fault: fault.name)
def test_what_a_target_refuses_is_named_and_costs_nothing_else(fault: Fault, laboratory: Laboratory) -> None:
    found = [
        laboratory.disturbed(fault, at) for at in points(laboratory.operations, fault, 5, every_kind=not fault.lasting)
    ]
    all_kept(found)
    assert found or fault.name in ("ftruncate", "unlink"), "only a save that goes on, or has no room, does these"
    assert any(point.operation != "none" for point in found) or not found


@pytest.mark.parametrize("name", ["enospc-from-here", "eio-from-here", "rename", "unlink", "fsync-directory"])
def test_what_a_target_refuses_of_a_save_that_goes_on_costs_nothing_else(name: str, laboratory: Laboratory) -> None:
    operations = laboratory.operations_of(going_on=True)
    plan = points(operations, FAULTS[name], 4, every_kind=False)
    found = [laboratory.disturbed(FAULTS[name], at, going_on=True) for at in plan]
    assert found
    all_kept(found)


@pytest.mark.parametrize("going_on", [False, True], ids=["new", "going on"])
def test_after_a_power_cut_the_disk_has_what_is_promised(going_on: bool, laboratory: Laboratory) -> None:
    found = list(laboratory.power_cuts(step=6, seed=1, going_on=going_on))
    all_kept(found)
    assert len(found) > 30
    assert len({point.left for point in found}) > 8
