"""The long run: mutates what a dead kernel may hand us until the time is up.

``python -m tests.fuzz.run --seconds 60`` takes the targets in turn. What an input reaches is counted
(tests/fuzz/reach.py): one that reaches something new is mutated further. An input that breaks is kept as a file, once
for each place where that happens, and the run goes on. ``--target NAME --replay FILE`` runs such a file again, with the
whole traceback.

``--coverage`` prints, instead, how much of each parser the seeds and the kept corpus reach; ``--minimise`` makes the
kept corpus anew, of it and of what runs have found since.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.reach import Novelty, Reach, Seen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tests.fuzz.bounds import FindingError, Target
    from tests.fuzz.mutation import Seed

# ``capture``, and what imports it, is imported once it is known whether what it reaches is to be counted or traced.

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "fuzz"
_TURN_SECONDS = 0.5
"""Of one target before the next has its turn."""
_MEASURED = 64
"""Of so many inputs that reach nothing new, the memory of one is measured exactly."""
_QUICK = 0.2
"""Seconds of processor time: what an input of the kept corpus may take, unless it alone reaches something."""
_SAVED_EVERY = 600.0
"""Seconds between two times that what was found is brought to the disk."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz the parsers.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", help="begin with the inputs of an earlier run")
    parser.add_argument("--target", metavar="NAME", action="append", help="only this one (may be repeated)")
    parser.add_argument("--keep", metavar="DIR", type=Path, default=BUILD, help="where what is found is kept")
    parser.add_argument("--replay", metavar="FILE", type=Path, help="run this input again, once")
    parser.add_argument("--coverage", action="store_true", help="print what of each parser the corpus reaches")
    parser.add_argument("--missing", action="store_true", help="with --coverage: and what it does not reach")
    parser.add_argument("--minimise", action="store_true", help="make the kept corpus anew, with what runs have found")
    args = parser.parse_args(argv)
    if args.coverage:
        return _coverage(args.target, args.keep, missing=args.missing)
    reach = Reach()
    reach.install()
    from tests.fuzz.targets import TARGETS

    if unknown := set(args.target or ()) - set(TARGETS):
        parser.error(f"no target {min(unknown)}; there are {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in args.target or TARGETS]
    if args.replay is not None:
        if args.target is None or len(targets) != 1:
            parser.error("--replay needs the one --target that FILE was found for")
        return replay(targets[0], args.replay)
    if args.minimise:
        return _minimise(targets, reach, args.keep)
    seed = args.seed or secrets.token_hex(4)
    print(f"seed {seed}, {args.seconds:g} seconds, targets: {', '.join(target.name for target in targets)}", flush=True)
    return fuzz(targets, args.seconds, seed, args.keep, reach)


def fuzz(targets: Sequence[Target], seconds: float, seed: str, keep: Path, reach: Reach | None = None) -> int:
    """Fuzz ``targets`` in turn; return 1 when an input broke what must hold.

    ``keep`` gets such inputs, and in ``corpus`` what reached something new.
    """
    from tests.fuzz.bounds import limit_address_space, scratch_folder

    findings = _Findings(keep, seed)
    deadline = time.monotonic() + seconds
    saved = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        work = [_Work(target, seed, Path(folder) / "input", reach or Reach()) for target in targets]
        with limit_address_space() as renew:
            while time.monotonic() < deadline:
                for each in work:
                    renew()
                    each.turn(min(deadline, time.monotonic() + _TURN_SECONDS), findings)
                if time.monotonic() - saved > _SAVED_EVERY:
                    saved = time.monotonic()
                    for each in work:
                        each.save(keep / "corpus")
                        print(each.line(), flush=True)
    for each in work:
        each.save(keep / "corpus")
        print(each.line())
    print(f"{sum(each.count for each in work)} inputs; {findings.line()}", flush=True)
    return 1 if findings.counts else 0


class _Work:
    """One target's share of a run."""

    def __init__(self, target: Target, seed: str, path: Path, reach: Reach) -> None:
        from tests.fuzz import corpus
        from tests.fuzz.mutation import Inputs, numbered

        self._target = target
        self._path = path
        self._reach = reach
        self._seen = Seen()
        self._inputs = Inputs([*numbered(target.seeds()), *corpus.load(target)], f"{seed}/{target.name}")
        self._kept: list[Seed] = []
        self.count = 0
        self.seconds = 0.0

    def turn(self, until: float, findings: _Findings) -> None:
        """Run inputs for a while, at least one."""
        from tests.fuzz.bounds import FindingError, check

        started = time.monotonic()
        while True:
            entry = next(self._inputs)
            self.count += 1
            self._reach.clear()
            measured = self.count % _MEASURED == 0
            begun = time.process_time()
            try:
                check(self._target, entry.data, self._path, measured=measured)
                seconds = time.process_time() - begun
                new = self._seen.add(self._reach.found())
                long = self._inputs.took(seconds) or measured
                if new == Novelty.BRANCH and not measured:
                    check(self._target, entry.data, self._path)
            except FindingError as finding:
                findings.add(self._target, self.count, entry.data, finding)
            else:
                # It is no merit to have gone through a loop more often when it takes long.
                if new == Novelty.BRANCH or (new and not long):
                    self._inputs.keep(entry, seconds)
                    self._kept.append(entry)
            if time.monotonic() >= until:
                break
        self.seconds += time.monotonic() - started

    def save(self, folder: Path) -> None:
        """Bring what reached something new to the disk, beside what is there of other runs."""
        from tests.fuzz import corpus

        if self._kept:
            known = {entry.data for entry in corpus.load(self._target, folder)}
            fresh = [entry for entry in self._kept if entry.data not in known]
            corpus.save(self._target, [*corpus.load(self._target, folder), *fresh], folder, level=3)
            self._kept.clear()

    def line(self) -> str:
        """Return what became of it so far."""
        return (
            f"{self._target.name:<15}{self.count:>9} inputs{self.count / max(self.seconds, 1e-3):>7.0f}/s"
            f"{self._seen.branches:>7} branches"
        )


class _Findings:
    """What broke: by target and place the number of inputs, and the first of them as a file."""

    def __init__(self, keep: Path, seed: str) -> None:
        self._keep = keep
        self._seed = seed
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, target: Target, number: int, data: bytes, finding: FindingError) -> None:
        """Count one; say and keep it when it is the first of its kind."""
        key = (target.name, finding.where)
        self.counts[key] += 1
        if self.counts[key] > 1:
            return
        self._keep.mkdir(parents=True, exist_ok=True)
        file = self._keep / f"{target.name.replace(' ', '-')}-{self._seed}-{number}"
        file.write_bytes(data)
        print(f"{target.name}: input {number}: {finding}")
        print(f"  python -m tests.fuzz.run --target '{target.name}' --replay {file}; seed {self._seed}", flush=True)

    def line(self) -> str:
        """Return what broke, for a person."""
        if not self.counts:
            return "nothing broke"
        found = ", ".join(f"{target}: {where} ({count})" for (target, where), count in self.counts.items())
        return f"{len(self.counts)} findings: {found}"


def replay(target: Target, file: Path) -> int:
    """Run one kept input again; the traceback of what breaks goes to standard error."""
    from tests.fuzz.bounds import check

    with tempfile.TemporaryDirectory() as folder:
        check(target, file.read_bytes(), Path(folder) / "input")
    print(f"{target.name}: {file} breaks nothing")
    return 0


def _reached(target: Target, entries: Sequence[Seed], reach: Reach) -> list[tuple[Seed, NDArray[np.bool_], float]]:
    """Run inputs; return what each has reached, and in how many seconds. Those that break are left out."""
    from tests.fuzz.bounds import FindingError, check, scratch_folder

    found = []
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        for entry in entries:
            reach.clear()
            started = time.process_time()
            try:
                check(target, entry.data, Path(folder) / "input", measured=False)
            except FindingError as finding:
                print(f"{target.name}: {finding}")
                continue
            found.append((entry, reach.found() != 0, time.process_time() - started))
    return found


def _minimise(targets: Sequence[Target], reach: Reach, keep: Path) -> int:
    import numpy as np

    from tests.fuzz import corpus
    from tests.fuzz.mutation import numbered

    total = 0
    for target in targets:
        entries = [*corpus.load(target), *corpus.load(target, keep / "corpus")]
        seeds = numbered(target.seeds())
        _reached(target, [*seeds, *entries], reach)  # (what is imported only when it is needed has its counters now)
        covered = np.zeros(reach.branches, dtype=np.bool_)
        for _, reached, _ in _reached(target, seeds, reach):
            covered |= reached
        found = _reached(target, entries, reach)
        chosen: list[Seed] = []
        for quick in (True, False):  # one that takes long only for what no other reaches: `make test` runs them all
            some = [(entry, reached) for entry, reached, seconds in found if (seconds < _QUICK) == quick]
            more, covered = corpus.fewest(some, covered)
            chosen += more
        size = corpus.save(target, chosen)
        total += size
        print(f"{target.name:<15}{len(entries):>7} inputs: {len(chosen)} kept in {size} bytes", flush=True)
    print(f"{total} bytes")
    return 0


def _coverage(names: Sequence[str] | None, keep: Path, *, missing: bool) -> int:
    from tests.fuzz import figures

    with figures.traced() as found:
        from tests.fuzz import corpus
        from tests.fuzz.bounds import FindingError, check, scratch_folder
        from tests.fuzz.targets import TARGETS

        with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
            for target in (TARGETS[name] for name in names or TARGETS):
                entries = [*target.seeds(), *corpus.load(target), *corpus.load(target, keep / "corpus")]
                for entry in entries:
                    try:
                        check(target, entry.data, Path(folder) / "input", measured=False)
                    except FindingError as finding:
                        print(f"{target.name}: {finding}")
    print(figures.table(found, missing=missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
