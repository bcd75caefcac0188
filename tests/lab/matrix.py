"""The whole matrix: a save disturbed at every operation, and what was on the disk afterwards.

``python -m tests.lab.matrix [VMCORE]`` prints a table of points and outcomes; the exit status is 1 where a promise was
broken.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.builders import PAGE, crashed_core, filled, numbered
from tests.lab.faults import FAULTS, KILLED, Fault
from tests.lab.invariants import (
    OtherReader,
    Reference,
    Seen,
    directories,
    look,
    reference_of,
    wrong_after_again,
    wrong_in_the_end,
)
from tests.lab.powercut import before, disk_after, promised
from tests.lab.run import Outcome, run
from tests.lab.tap import Operation, Visit, boundary_within
from tests.outcome import FILES, listing

BELOW = Path("var/crash")
"""Where on the target crashes are saved; not there before the first one."""
KEPT = "kept"


class Point(NamedTuple):
    """One disturbed save, and what came of it; ``broken`` are the promises that were not kept, a line each."""

    fault: str
    at: int
    operation: str
    kind: str
    status: int | None
    left: str
    again: str
    broken: list[str]


def small_vmcore(path: Path) -> Path:
    """A crashed machine of some hundred pages: zeros, pages that shrink, pages that do not, in turn."""
    chance = random.Random(1)
    pages = b"".join(
        numbered(number * 100, 6) + chance.randbytes(13 * PAGE) + filled(".", "a", ".", "b") for number in range(12)
    )
    path.write_bytes(crashed_core(pages=pages))
    return path


@contextmanager
def disk() -> Iterator[Path]:
    """Where jobs save: in memory where that can be had, because each of them syncs some thirty times.

    A kill loses nothing of the page cache, wherever that goes in the end; power cuts are modelled.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="lab-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class Laboratory:
    """A vmcore, an undisturbed save of it, and room in ``folder`` for disturbed ones.

    ``codec`` is what they compress with, the default of a save where it is None.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        other_reader: OtherReader | None,
        *,
        small: bool = True,
        codec: str | None = None,
    ) -> None:
        self._folder = folder
        self._small = small
        self._options = ["--compress", codec] if codec else []
        self.source = source
        root = self.new_target()
        undisturbed = self.save(root)
        if undisturbed.status != 0:
            raise SystemExit(f"an undisturbed save ends with status {undisturbed.status}: {undisturbed.said}")
        self.operations = undisturbed.operations
        (saved,) = directories(root / BELOW)
        self.reference: Reference = reference_of(self.source, saved, other_reader)

    def new_target(self) -> Path:
        """A file system for one save, in the place of the one before."""
        root = self._folder / "target"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return root

    def keep(self, root: Path, name: str) -> None:
        """Copy what was saved below ``root`` to a directory ``name`` below ``folder``/kept."""
        there = self._folder / KEPT / name
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(root / BELOW, there)

    def kept(self, name: str) -> Path:
        """Return a new file system that has what was kept."""
        root = self.new_target()
        shutil.copytree(self._folder / KEPT / name, root / BELOW)
        return root

    def save(
        self, root: Path, fault: Fault | None = None, at: int = 0, *, record: bool = False, visit: Visit | None = None
    ) -> Outcome:
        arguments: list[str | Path] = ["save", "--no-progress", "--threads", "2", *self._options]
        arguments += ["--source", self.source, root / BELOW]
        return run(arguments, root, fault, at, small=self._small, record=record, visit=visit)

    def _target(self, *, going_on: bool) -> Path:
        """A file system with nothing on it, or with a save that was cut short."""
        root = self.new_target()
        if going_on:
            root.rmdir()
            shutil.copytree(self.begun(), root)
        return root

    def operations_of(self, *, going_on: bool) -> list[Operation]:
        """What an undisturbed save asks of the disk; or one that goes on where another was cut short."""
        return self.save(self._target(going_on=True)).operations if going_on else self.operations

    def begun(self) -> Path:
        """A save that a full disk cut short in the midst of its dump, manifest and all: to be gone on with."""
        root = self._folder / "begun"
        if not root.exists():
            root.mkdir()
            middle = [number for number, operation in enumerate(matching(self.operations, FAULTS["enospc-write"]), 1)
                      if operation.file == "vmcore.incomplete"]  # fmt: skip
            outcome = self.save(root, FAULTS["enospc-write"], middle[len(middle) // 2])
            assert outcome.status == 3, outcome.said
        return root

    def disturbed(self, fault: Fault, at: int, *, going_on: bool = False) -> Point:
        """Save with one fault, check; save again without it, check again."""
        root = self._target(going_on=going_on)
        parent = root / BELOW
        outcome = self.save(root, fault, at)
        seen = look(parent, self.reference)
        broken = [*seen.wrong]
        if outcome.hit is None:
            if outcome.status != 0:
                broken.append(f"nothing was disturbed, and the status is {outcome.status}")
        elif outcome.status not in fault.statuses:
            broken.append(f"status {outcome.status}: {outcome.said.splitlines()[-1:]}")
        if outcome.status != KILLED:
            broken += wrong_in_the_end(seen, self.reference, outcome.status, outcome.said, going_on=going_on)
        left = self.left(seen)
        again = self.again(root, seen, broken) if outcome.status != 0 else "not needed"
        hit = outcome.hit
        return Point(
            fault.name, at, hit.describe() if hit else "none", hit.kind if hit else "none", outcome.status, left, again,
            broken,
        )  # fmt: skip

    def left(self, seen: Seen) -> str:
        """Return what there is, in words."""
        if not seen.states:
            return "no directory"
        folder, state = list(seen.states.items())[-1]
        files = len([name for name in listing(folder) if name in FILES and name != "vmcore"])
        return f"{files} files, {state.text(self.reference)}"

    def again(self, root: Path, seen: Seen, broken: list[str]) -> str:
        """Save again, and add to ``broken`` what is not as promised then."""
        outcome = self.save(root)
        broken += wrong_after_again(root / BELOW, self.reference, seen.states, outcome.status)
        return "went on, whole" if "cut short before" in outcome.said else "whole"

    def power_cuts(self, *, step: int = 1, seed: int = 0, going_on: bool = False) -> Iterator[Point]:
        """Cut the power after every ``step``-th event of a save that nothing else disturbs."""
        root = self._target(going_on=going_on)
        had = before(root)
        events = self.save(root, record=True).events
        for moment in range(0, len(events) + 1, step):
            left = self._folder / "after-power-cut"
            shutil.rmtree(left, ignore_errors=True)
            disk_after(events, moment, random.Random(moment << 8 | seed), root, had, left)
            parent = left / BELOW
            seen = look(parent, self.reference)
            broken = [*seen.wrong]
            folders = directories(parent)
            there = listing(folders[0]) if folders else set()
            broken += [f"{name} is not on the disk" for name in promised(events, moment, FILES) if name not in there]
            found = self.left(seen)
            again = self.again(left, seen, broken)
            last = events[moment - 1] if moment else None
            what = f"{'after' if last.ended else 'in'} {last.operation.describe()}" if last else "at the start"
            yield Point("power-cut", moment, what, last.operation.kind if last else "none", None, found, again, broken)


def matching(operations: Iterable[Operation], fault: Fault) -> list[Operation]:
    """The operations that a fault is about, in their order: its points."""
    return [
        operation for operation in operations if operation.kind in fault.operations and fault.concerns(operation.file)
    ]


def points(
    operations: Sequence[Operation], fault: Fault, most: int | None = None, *, every_kind: bool = True
) -> list[int]:
    """At which operations to disturb: all of them, or about ``most``.

    With ``every_kind``, what is done to each file is among them, each kind of operation at least once.
    """
    found = matching(operations, fault)
    numbers = list(range(1, len(found) + 1))
    if fault.action == "kill within":
        numbers = [number for number in numbers if boundary_within(found[number - 1])]
    if most is None or len(numbers) <= most:
        return numbers
    first: dict[tuple[str, str], int] = {}
    for number in numbers if every_kind else ():
        first.setdefault((found[number - 1].kind, found[number - 1].file), number)
    step = len(numbers) / most
    return sorted({*first.values(), *(numbers[int(index * step)] for index in range(most)), numbers[-1]})


def kill_points(operations: Sequence[Operation], most: int | None = None) -> list[tuple[Fault, int]]:
    """Before each operation and, of those that are large, in their midst; the last also after it."""
    before, within = FAULTS["kill-before"], FAULTS["kill-within"]
    return [
        *((before, at) for at in points(operations, before, most)),
        *((within, at) for at in points(operations, within, most)),
        (FAULTS["kill-after"], len(matching(operations, FAULTS["kill-after"]))),
    ]


def fault_points(operations: Sequence[Operation], most: int) -> list[tuple[Fault, int]]:
    """Each fault that does not kill at some of its operations."""
    faults = [fault for fault in FAULTS.values() if not fault.kills]
    return [(fault, at) for fault in faults for at in points(operations, fault, most)]


def summary(found: Sequence[Point]) -> str:
    """Counts by fault and operation."""
    counts = Counter((point.fault, point.kind) for point in found)
    good = Counter((point.fault, point.kind) for point in found if not point.broken)
    statuses: dict[tuple[str, str], Counter[int | None]] = {}
    for point in found:
        statuses.setdefault((point.fault, point.kind), Counter())[point.status] += 1
    lines = [f"{'fault':18} {'at':16} {'points':>6} {'right':>6}  exit statuses"]
    for key in sorted(counts):
        said = ", ".join(f"{status} ×{times}" for status, times in statuses[key].items() if status is not None)
        lines.append(f"{key[0]:18} {key[1]:16} {counts[key]:6} {good[key]:6}  {said}")
    lines.append(f"{'all':35} {len(found):6} {sum(not point.broken for point in found):6}")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    from tests.lab.drgn_view import wrong_for_drgn  # guests use what is above, and have no drgn

    parser = argparse.ArgumentParser(prog="python -m tests.lab.matrix", description=__doc__)
    parser.add_argument("vmcore", nargs="?", type=Path, help="the vmcore to save (default: a small one, made here)")
    parser.add_argument("--most", type=int, default=None, help="points a fault, sampled (default: all; 12 for errors)")
    parser.add_argument("--real-steps", action="store_true", help="steps and chunks as large as they are")
    parser.add_argument("--only", action="append", metavar="FAULT", help="this fault alone, or power-cut; repeatable")
    parser.add_argument("--resumed", action="store_true", help="disturb the save that goes on with one cut short")
    options = parser.parse_args()
    started = time.monotonic()
    found: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="lab-") as folder, disk() as targets:
        source = options.vmcore or small_vmcore(Path(folder) / "vmcore.elf")
        laboratory = Laboratory(targets, source, wrong_for_drgn, small=not options.real_steps)
        operations = laboratory.operations_of(going_on=options.resumed)
        plan = [*kill_points(operations, options.most), *fault_points(operations, options.most or 12)]
        for fault, at in plan:
            if not options.only or fault.name in options.only:
                found.append(laboratory.disturbed(fault, at, going_on=options.resumed))
                print(row(found[-1]), flush=True)
        if not options.only or "power-cut" in options.only:
            for point in laboratory.power_cuts(going_on=options.resumed):
                found.append(point)
                print(row(point), flush=True)
    print(f"\n{summary(found)}\n{time.monotonic() - started:.0f} s")
    return 1 if any(point.broken for point in found) else 0


def row(point: Point) -> str:
    """Return a point's line of the table."""
    status = "" if point.status is None else point.status
    row = f"{point.fault:18} {point.at:4}  {point.operation:52} {status:>3}  {point.left:52} {point.again}"
    return row.rstrip() + "".join(f"\n    BROKEN: {line}" for line in point.broken)


if __name__ == "__main__":
    sys.exit(main())
