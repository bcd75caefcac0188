"""What is left where no disk took the log: its end and the registers, on the console.

A serial console is often kept by somebody: the management controller, a terminal server. EFI variables and pstore are
not written to: user space has no way into pstore but /dev/pmsg0, which Debian's kernels are built without, and
firmware has been bricked by variables that filled its memory.
"""

from __future__ import annotations

import os
from collections import deque

from capture import pulse
from capture.boot.supervisor import Watch
from capture.boot.watchdog import Watchdog
from capture.console import Console, print_line, printable
from capture.errors import CaptureError
from capture.options import RECIPIENTS

LINES = 100
"""Lines of the log, its last: at 115,200 baud about a second."""
LIMIT = 60
"""Seconds without a sign of life, after which even that is given up."""


def print_last_words(console: Console, dog: Watchdog | None = None) -> None:
    """Print the end of the dead kernel's log and every CPU's registers; says why where that cannot be had.

    Not where saves are encrypted: whoever reads the console need not be who has the key.
    """
    if os.path.lexists(RECIPIENTS):
        console.say("no disk took the log; it is not printed, because saves are encrypted: vmcapture dmesg")
        return
    with Watch(LIMIT, console, dog) as watch:
        _, end = watch.run(lambda _tell: _print(console))
    if end.line:
        console.say(f"last words: {end.line}")


def _print(console: Console) -> None:
    def put(text: str) -> None:
        print_line(printable(text))
        pulse.beat()  # a serial console is slow

    try:
        from capture import report  # what takes memory is not for the process that watches
        from capture.boot.job import default_source
        from capture.vmcore import open_vmcore

        with open_vmcore(default_source()) as vmcore:
            panic = report.find_panic(vmcore)
            console.say(f"no disk took the log; its last {LINES} lines, and the registers:")
            try:
                for line in deque(report.log_lines(report.open_log(vmcore).records()), LINES):
                    put(line.decode("utf-8", "backslashreplace").rstrip("\n"))
            except CaptureError as error:
                console.say(str(error))
            for text in report.registers_text(vmcore, panic).splitlines():
                put(text)
    except CaptureError as error:
        console.say(f"last words: {error}")
    except Exception as error:  # (no memory, a bug)
        console.say(f"last words: {type(error).__name__}: {error}")
