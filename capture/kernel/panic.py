"""Which record of the log says why the kernel died, and which CPU it was.

The printk ring stores for each record who printed it: a task's PID, or a CPU in interrupt context. NT_PRSTATUS stores
for each CPU the PID that it was running. The CPU that panicked is known when exactly one fits (PID 0 is the idle task
of every CPU).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from capture.kernel.printk import CALLER_CPU, Record
from capture.notes.prstatus import CpuRegisters

_PANIC = re.compile(rb"Kernel panic - not syncing|^(BUG|Oops|general protection fault|Unable to handle kernel)\b")
_WHERE = re.compile(rb"^CPU: (\d+) (?:UID: \d+ )?PID: (\d+) Comm: ")
"""dump_stack_print_info(), lib/dump_stack.c; UID since 6.12."""


@dataclass(frozen=True, slots=True)
class Panic:
    """``line`` is the first line of the last record that announces a crash, "" when there is none."""

    line: str = ""
    cpu: int | None = None
    """The CPU as the log itself names it in what follows that record."""
    caller_id: int | None = None


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
        if _PANIC.search(record.text):
            line = record.text.split(b"\n", 1)[0].decode("utf-8", "replace")
            printable = "".join(letter if letter.isprintable() else "?" for letter in line)
            self.panic = Panic(printable, None, record.caller_id)
        elif self.panic.line and self.panic.cpu is None and record.caller_id == self.panic.caller_id:
            where = _WHERE.match(record.text)
            if where and len(where[1]) < 6:  # a CPU number, not damage
                self.panic = Panic(self.panic.line, int(where[1]), self.panic.caller_id)


def panicked_cpu(panic: Panic, cpus: list[CpuRegisters]) -> int | None:
    """Return the ``cpu`` of the entry that panicked, or None when that cannot be known."""
    if not panic.line:
        return None
    numbers = {entry.cpu for entry in cpus}
    if panic.caller_id is not None and panic.caller_id & CALLER_CPU:
        number = panic.caller_id & ~CALLER_CPU
        return number if number in numbers else None
    running = [entry.cpu for entry in cpus if panic.caller_id is not None and entry.pid == panic.caller_id]
    if len(running) == 1:
        return running[0]
    return panic.cpu if panic.cpu in (running or numbers) else None
