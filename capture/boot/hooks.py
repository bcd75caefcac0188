"""The administrator's own programs: those before the save may call it off, those after it are told what came of it.

``vmcapture initramfs`` puts them into the image (kdump_pre and kdump_post in vmcapture.conf): links with numbers as
names, to be followed in their order. Each runs in a process group of its own, watched like a save, so that one that
hangs is killed and does not keep the machine: a hook that gives no answer has not said that nothing is to be saved.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture import pulse
from capture.boot.supervisor import Outcome, Tell, Watch
from capture.boot.watchdog import Watchdog
from capture.console import Console

if TYPE_CHECKING:
    from subprocess import Popen

BEFORE = "/etc/vmcapture/pre.d"
AFTER = "/etc/vmcapture/post.d"
MAX_LINES = 1000
MAX_LINE = 1000
"""What of a hook's output is shown: lines, and characters of each."""
_GRACE = 10
"""Seconds that the process which runs a hook has to end it, before it is itself taken to hang."""
_TICK = 0.5


def run_before(limit: int, console: Console, dog: Watchdog) -> str | None:
    """Run the programs for before the save; ``limit`` is how many seconds each of them may take, 0: any number.

    Return None when all is well, or a line on the first one that ended with another status than 0: nothing is to be
    saved. One that was killed, or could not be started, is said, and the save goes on.
    """
    for program in _programs(BEFORE):
        status = _run(program, (), {}, limit, console, dog)
        if status:
            return f"{program} ended with status {status}: nothing is saved, as it asks"
    return None


def run_after(outcome: Outcome, limit: int, console: Console, dog: Watchdog) -> None:
    """Run the programs for after the save, with its exit status as argument, and what else is known as variables."""
    known = {
        "VMCAPTURE_OUTCOME": outcome.what,
        "VMCAPTURE_TARGET": outcome.target,
        "VMCAPTURE_DIRECTORY": outcome.directory,
    }
    for program in _programs(AFTER):
        status = _run(program, (str(outcome.status),), known, limit, console, dog)
        if status:
            console.say(f"{program} ended with status {status}")


def _programs(folder: str) -> list[Path]:
    """Return the programs that the links in a folder name, in the order of their names."""
    there = Path(folder)
    return [link.readlink() for link in sorted(there.iterdir())] if there.is_dir() else []


def _run(
    program: Path, arguments: tuple[str, ...], known: Mapping[str, str], limit: int, console: Console, dog: Watchdog
) -> int | None:
    """Run one program; return its exit status, None where it gave none, which is said."""
    console.say(f"running {program}")
    with Watch(limit and limit + _GRACE, console, dog) as watch:
        found, end = watch.run(partial(_follow, program, arguments, known, limit, console))
    if found is None:
        console.say(f"{program}: {end.line}; going on")
        return None
    if found["failure"]:
        console.say(f"{program}: {found['failure']}; going on")
        return None
    return int(found["status"])


def _follow(
    program: Path, arguments: tuple[str, ...], known: Mapping[str, str], limit: int, console: Console, tell: Tell
) -> None:
    """Run one program in this process, show its output, and tell how it ended."""
    import subprocess  # the process that watches has no need of it

    def ended(status: int = 0, failure: str = "") -> None:
        tell({"status": status, "failure": failure})

    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **known},
            start_new_session=True,
        )
    except OSError as error:
        ended(failure=f"cannot be run: {error.strerror}")
        return
    try:
        in_time = _show_output(process, program.name, limit, console)
        status = process.wait() if in_time else 0
    except KeyboardInterrupt:
        _kill(process)
        ended(failure="interrupted")
        return
    if not in_time:
        _kill(process)
        ended(failure=f"no end after {limit} s (vmcapture.timeout=), killed")
    elif status < 0:
        ended(failure=f"was killed by signal {-status}")
    else:
        ended(status)


def _show_output(process: Popen[Any], name: str, limit: int, console: Console) -> bool:
    """Show what a program prints until it ends, and return whether it did within ``limit`` seconds.

    Not until its output ends: a child that it leaves behind may hold on to that.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    until = time.monotonic() + limit
    shown, rest, open_ = 0, b"", True
    while True:
        over = process.poll() is not None
        ready = open_ and bool(select.select([pipe], [], [], 0 if over else _TICK)[0])
        piece = os.read(pipe, 1 << 16) if ready else b""
        open_ = open_ and (bool(piece) or not ready)
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LINE or (over and not piece and rest):
            lines, rest = [*lines, rest], b""
        for line in lines:
            shown += 1
            if shown <= MAX_LINES:
                console.say(f"{name}: {line[:MAX_LINE].decode(errors='replace').rstrip()}")
            elif shown == MAX_LINES + 1:
                console.say(f"{name}: more than {MAX_LINES} lines: the rest is not shown")
        if piece:
            pulse.beat()
        elif over:
            return True
        elif not open_:
            time.sleep(_TICK)
        if limit and time.monotonic() >= until:
            return False


def _kill(process: Popen[Any]) -> None:
    """Kill a program and its children; one that waits in the kernel for a disk is left to itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
