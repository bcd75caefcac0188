"""One save, a copy of which is killed at every operation: many points where a single save takes long, as in a guest.

At each operation the job stands still. A fork of it goes on, is killed before the operation, in its midst or right
after it, and what is on the disk then is held against what is promised: a kill costs the process, not what is in the
page cache, so it is what the job itself would have left. Then the job goes on. Some of what was left is kept, and gone
on with at the end.

``python -m tests.lab.walk SOURCE FOLDER`` prints a line a point; the exit status is 1 where a promise was broken. It
runs in the capture kernel, with the image's own interpreter: no other reader is asked.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.lab.faults import FAULTS, KILLED, Fault
from tests.lab.invariants import Known, look
from tests.lab.matrix import BELOW, Laboratory, Point, row, summary
from tests.lab.tap import BY_DESCRIPTOR, Attempt, Operation, boundary_within

UNDISTURBED = "undisturbed"
WENT_ON = "went-on"
GO_ON = slice(1, None, 3)
"""Which of what was kept is gone on with: a save takes long; of the first there is nothing yet."""


class Walk:
    """A walk through one save of ``laboratory``.

    ``wanted`` says at which operations there is a point, ``kept`` of which of them what was left is kept. ``tell`` is
    told of each point as soon as it is known.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        *,
        wanted: Callable[[Operation], bool] = lambda _operation: True,
        kept: Callable[[Operation], bool] = lambda _operation: False,
        tell: Callable[[Point], object] = lambda _point: None,
    ) -> None:
        self._laboratory = laboratory
        self._wanted, self._kept, self._tell = wanted, kept, tell
        self._known: Known = {}
        self._root = Path()

    def run(self) -> list[Point]:
        """Walk, and go on with what was kept."""
        self._root = self._laboratory.new_target()
        outcome = self._laboratory.save(self._root, visit=self._visit)
        found: list[Point] = outcome.visited
        seen = look(self._root / BELOW, self._laboratory.reference, self._known)
        broken = [*seen.wrong] if outcome.status == 0 else [*seen.wrong, outcome.said]
        left = self._laboratory.left(seen)
        found.append(Point("none", 0, "the job, with copies of it killed", "none", outcome.status, left, "", broken))
        self._tell(found[-1])
        self._laboratory.keep(self._root, UNDISTURBED)
        kept = [point for point in found if point.again]
        return [*found, *(self._gone_on(point) for point in kept[GO_ON])]

    def _visit(self, operation: Operation, attempt: Attempt) -> Iterator[Point]:
        if not self._wanted(operation):
            return
        for fault in kills(operation):
            status = attempt(fault)
            seen = look(self._root / BELOW, self._laboratory.reference, self._known)
            broken = [*seen.wrong] if status == KILLED else [*seen.wrong, f"status {status}"]
            kept = ""
            if fault.action == "kill before" and seen.states and self._kept(operation):
                kept = f"{fault.name}-{operation.number}"
                self._laboratory.keep(self._root, kept)
            point = Point(
                fault.name, operation.number, operation.describe(), operation.kind, status,
                self._laboratory.left(seen), kept, broken,
            )  # fmt: skip
            self._tell(point)
            yield point

    def _gone_on(self, point: Point) -> Point:
        root = self._laboratory.kept(point.again)
        seen = look(root / BELOW, self._laboratory.reference)
        broken: list[str] = []
        again = self._laboratory.again(root, seen, broken)
        done = Point(WENT_ON, point.at, point.operation, point.kind, 0, self._laboratory.left(seen), again, broken)
        self._tell(done)
        return done


def kills(operation: Operation) -> list[Fault]:
    """The kills that an operation can have: none after what cannot be done twice, the job does it again."""
    found = [FAULTS["kill-before"]]
    if boundary_within(operation):
        found.append(FAULTS["kill-within"])
    if operation.kind in BY_DESCRIPTOR:
        found.append(FAULTS["kill-after"])
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.walk", description=__doc__)
    parser.add_argument("source", type=Path, help="the vmcore to save")
    parser.add_argument("folder", type=Path, help="an empty directory")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="points at every N-th operation only")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="of those, from this one on")
    parser.add_argument("--keep-every", type=int, default=10, metavar="N", help="keep what each N-th of those left")
    options = parser.parse_args()
    started = time.monotonic()
    # zstd:auto would take the time that the job stands still for a slow disk's, and compress ever harder.
    laboratory = Laboratory(options.folder, options.source, None, small=False, codec="zstd:1")

    first, every, keep_every = int(options.first), int(options.every), int(options.keep_every)

    def wanted(operation: Operation) -> bool:
        return operation.number >= first and (operation.number - first) % every == 0

    def kept(operation: Operation) -> bool:
        return (operation.number - first) // every % keep_every == 0

    with os.fdopen(os.dup(1), "w") as console:  # the job's own output goes elsewhere

        def tell(point: Point) -> None:
            console.write(row(point) + "\n")
            console.flush()

        found = Walk(laboratory, wanted=wanted, kept=kept, tell=tell).run()
    print(f"\n{summary(found)}\n{time.monotonic() - started:.0f} s")
    return 1 if any(point.broken for point in found) else 0


if __name__ == "__main__":
    sys.exit(main())
