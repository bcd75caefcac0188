"""A job in a process of its own, disturbed at one operation: ``python -m tests.lab.run --at N --fault NAME -- save …``.

The process is forked from this one, which has all that a job imports: a save of a few hundred pages takes some tens of
milliseconds. Steps and chunks are made small in it, so that a small vmcore has all the seams of a large one.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import capture.boot.save  # everything that a job imports, before the fork
import capture.dump
from capture import cli
from capture.boot import job
from capture.dumpfile import output, writer
from capture.memory import image
from tests.builders import PAGE
from tests.lab.faults import FAULTS, Fault
from tests.lab.tap import Event, Operation, Tap, Visit

assert capture.boot.save
assert capture.dump


class Outcome(NamedTuple):
    """How a job ended. ``hit`` is the operation that was disturbed first, None where there was no such one."""

    status: int
    said: str
    hit: Operation | None
    operations: list[Operation]
    events: list[Event]
    visited: list[Any]


def small_steps() -> None:
    """Have many steps, chunks and writes in a small vmcore; in a process that is thrown away."""
    image.CHUNK_PAGES = 4
    writer.SYNC_BYTES = 12 * PAGE
    writer.FIRST_SYNC_BYTES = 6 * PAGE
    writer.LEAST_SYNC_BYTES = 12 * PAGE
    output._TABLE_BLOCK = 8
    job._WRITE_SIZE = 64


def run(
    arguments: Sequence[str | Path],
    root: Path,
    fault: Fault | None = None,
    at: int = 0,
    *,
    small: bool = True,
    record: bool = False,
    visit: Visit | None = None,
) -> Outcome:
    """Run the command line in a child; its ``at``-th operation below ``root`` that ``fault`` is about is disturbed.

    ``visit`` is called in the child.
    """
    hits_from, hits_to = os.pipe()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        child = os.fork()
        if not child:
            status = 1
            gc.disable()  # it would copy the pages of all that was imported
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (pytest's own go elsewhere)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                if small:
                    small_steps()
                tell = partial(_tell, hits_to)
                tap = Tap(root, fault, at, hit=tell, record=record, visit=visit)
                with tap.listening():
                    status = cli.main([str(argument) for argument in arguments])
                told.write(pickle.dumps((tap.operations, tap.events, tap.visited)))
                told.flush()
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            except BaseException as error:
                os.write(2, f"escaped: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        os.close(hits_to)
        with os.fdopen(hits_from, "rb") as hits:
            found = hits.read()
        hit = pickle.loads(found) if found else None  # the first one; of a lasting fault, more follow
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        told.seek(0)
        whole = told.read()
        operations, events, visited = pickle.loads(whole) if whole else ([], [], [])
        return Outcome(status, said.read().decode(errors="replace"), hit, operations, events, visited)


def _tell(pipe: int, hit: Operation) -> None:
    os.write(pipe, pickle.dumps(hit))


def main() -> int:
    """Run one job with one fault; the root that is watched is its last argument."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.run", description=__doc__)
    parser.add_argument("--fault", choices=FAULTS, help="what goes wrong; nothing when left out")
    parser.add_argument("--at", type=int, default=1, metavar="N", help="at which operation that the fault is about")
    parser.add_argument("--real-steps", action="store_true", help="steps and chunks as large as they are")
    parser.add_argument("arguments", nargs="+", metavar="-- save …")
    options = parser.parse_args()
    fault = FAULTS[options.fault] if options.fault else None
    outcome = run(
        options.arguments, Path(options.arguments[-1]), fault, options.at, small=not options.real_steps, record=False
    )
    sys.stderr.write(outcome.said)
    for operation in outcome.operations:
        print(f"{operation.number:5} {operation.describe()}")
    print(f"status {outcome.status}; disturbed: {outcome.hit.describe() if outcome.hit else 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
