"""Which record of the log says why the kernel died, and which CPU it was.

The printk ring stores for each record who printed it: a task's PID, or a CPU in interrupt context. NT_PRSTATUS stores
for each CPU the PID that it was running. The CPU that panicked is known when exactly one fits (PID 0 is the idle task
of every CPU).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from capture.kernel.announcement import is_oops, is_panic
from capture.kernel.printk import CALLER_CPU, Record
from capture.notes.prstatus import CpuRegisters

_WHERE = re.compile(rb"^CPU: (\d{1,5}) (?:UID: \d+ )?PID: (\d{1,10}) Comm: ")
"""dump_stack_print_info(), lib/dump_stack.c; UID since 6.12."""


class Panic(NamedTuple):
    """``line`` is the first line of the record that announces the crash, "" when there is none.

    ``cpu`` and ``pid`` are what the log itself names in what follows that record.
    """

    line: str = ""
    cpu: int | None = None
    caller_id: int | None = None
    pid: int | None = None


class PanicFinder:
    """Watches records go by, oldest first, and keeps the last announcement; fixed memory."""

    def __init__(self) -> None:
        self.panic = Panic()

    def watch(self, records: Iterable[Record]) -> Iterable[Record]:
        """Yield ``records`` unchanged."""
        for record in records:
            self._see(record)
            yield record

    def _see(self, record: Record) -> None:
        if is_panic(record.text) or (is_oops(record.text) and not self._goes_on(record)):
            line = record.text.split(b"\n", 1)[0].decode("utf-8", "replace")
            printable = "".join(letter if letter.isprintable() else "?" for letter in line)
            self.panic = Panic(printable, caller_id=record.caller_id)
        elif self._goes_on(record):
            where = _WHERE.match(record.text)
            if where:
                self.panic = self.panic._replace(cpu=int(where[1]), pid=int(where[2]))

    def _goes_on(self, record: Record) -> bool:
        """Whether the announcement before is still being explained: its first line says most."""
        panic = self.panic
        return bool(panic.line) and panic.cpu is None and record.caller_id == panic.caller_id


def panicked_cpu(panic: Panic, cpus: list[CpuRegisters]) -> int | None:
    """Return the ``cpu`` of the entry that panicked, or None when that cannot be known.

    Entries count notes, the log counts CPUs: after one went offline the two differ. An entry is the log's CPU only if
    it ran the task that the log names.
    """
    if not panic.line:
        return None
    caller, number, pid = panic.caller_id, panic.cpu, panic.pid
    if caller is not None and caller & CALLER_CPU:
        number = caller & ~CALLER_CPU
    elif caller is not None:
        pid = caller
    entries = {entry.cpu: entry for entry in cpus}
    if number in entries and pid in (None, entries[number].pid):
        return number
    running = [entry.cpu for entry in cpus if entry.pid == pid]
    return running[0] if len(running) == 1 else None
