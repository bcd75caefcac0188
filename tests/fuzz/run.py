"""The long run: mutates what a dead kernel may hand us until the time is up.

``python -m tests.fuzz.run --seconds 60`` takes the targets in turn. A target that breaks is put aside, its input kept
as a file, and the run goes on with the others. ``--target NAME --replay FILE`` runs such a file again, with the whole
traceback.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import TARGETS, FindingError, Target, check, inputs

REPRODUCERS = Path(__file__).resolve().parents[2] / "build" / "fuzz"
_TURN = 25
"""Inputs of one target before the next has its turn."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz the parsers.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", help="repeat the inputs of an earlier run")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one (may be repeated)")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, default=REPRODUCERS, help="where inputs that break are kept"
    )
    parser.add_argument("--replay", metavar="FILE", type=Path, help="run this input again, once")
    args = parser.parse_args(argv)
    if args.replay is not None:
        if args.target is None or len(args.target) != 1:
            parser.error("--replay needs the one --target that FILE was found for")
        return replay(TARGETS[args.target[0]], args.replay)
    seed = args.seed or secrets.token_hex(4)
    targets = [TARGETS[name] for name in args.target or TARGETS]
    print(f"seed {seed}, {args.seconds:g} seconds, targets: {', '.join(target.name for target in targets)}", flush=True)
    return fuzz(targets, args.seconds, seed, args.keep)


def fuzz(targets: Sequence[Target], seconds: float, seed: str, keep: Path) -> int:
    """Fuzz ``targets`` in turn; return 1 when one of them broke."""
    streams = {target.name: inputs(target, seed) for target in targets}
    counts = {target.name: 0 for target in targets}
    waiting = list(targets)
    broken = 0
    deadline = time.monotonic() + seconds
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "input"
            while waiting and time.monotonic() < deadline:
                target = waiting.pop(0)
                for data in streams[target.name]:
                    counts[target.name] += 1
                    try:
                        check(target, data, path)
                    except FindingError as finding:
                        broken += 1
                        print(f"{target.name}: input {counts[target.name]}: {finding}")
                        print(f"  {_keep(keep, target, seed, counts[target.name], data)}; seed {seed}", flush=True)
                        break
                    if counts[target.name] % _TURN == 0 or time.monotonic() >= deadline:
                        waiting.append(target)
                        break
    finally:
        tracemalloc.stop()
    for name, count in counts.items():
        print(f"{name:<11}{count:>8} inputs")
    print(f"{broken} of {len(counts)} targets broke" if broken else "nothing broke", flush=True)
    return 1 if broken else 0


def replay(target: Target, file: Path) -> int:
    """Run one kept input again; the traceback of what breaks goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        check(target, file.read_bytes(), Path(folder) / "input")
    print(f"{target.name}: {file} breaks nothing")
    return 0


def _keep(keep: Path, target: Target, seed: str, number: int, data: bytes) -> str:
    """Write the input to a file; return the command that runs it again."""
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / f"{target.name}-{seed}-{number}"
    file.write_bytes(data)
    return f"python -m tests.fuzz.run --target {target.name} --replay {file}"


if __name__ == "__main__":
    sys.exit(main())
