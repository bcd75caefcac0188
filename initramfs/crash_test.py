"""A crash on purpose: its id is left on the disk and in the kernel's log, so that the next boot knows it again."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.errors import UsageError
from initramfs import state
from initramfs.crashes import SavedCrash, log_has
from initramfs.errors import KexecError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
KMSG = Path("/dev/kmsg")
SYSRQ, TRIGGER = Path("/proc/sys/kernel/sysrq"), Path("/proc/sysrq-trigger")
MARK = "vmcapture: crash test "
CLOCK = 120
"""Seconds that two clocks may differ by: a capture kernel reads the time that the dead kernel had."""
WAIT = 5
"""Seconds after which a kernel that was told to crash has not."""


@dataclass(frozen=True, slots=True)
class CrashTest:
    """One of them. ``result`` is None until a later boot has looked for it; ``saved`` then says whether it is there."""

    id: str
    time: float  # seconds since 1970
    boot_id: str
    host: str
    targets: tuple[str, ...] = ()
    saved: bool | None = None
    result: str | None = None

    @property
    def when(self) -> str:
        """When the machine was crashed, for a person."""
        return f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M} UTC"


def record() -> Path:
    """Return where the last test is remembered."""
    return state.DIRECTORY / "crash-test.json"


def last() -> CrashTest | None:
    """Return the last test; None where there never was one."""
    values = state.read(record())
    if values is None:
        return None
    try:
        found = CrashTest(**{**values, "targets": tuple(values.get("targets", ()))})
        texts = (found.id, found.boot_id, found.host, found.result or "", *found.targets, found.when)
    except (TypeError, ValueError, OverflowError):
        return None
    numbers = isinstance(found.time, int | float) and isinstance(found.saved, bool | None)
    return found if numbers and all(isinstance(text, str) for text in texts) else None


def confirm(host: str, ask: Callable[[str], str]) -> None:
    """Have a person say twice that this machine is to crash.

    Raises:
        UsageError: they did not.
    """
    try:
        answer = ask(f"This crashes {host} NOW; everything that runs on it ends. Type the name of this host: ")
        if answer.strip() != host:
            raise UsageError(f"{answer.strip()!r} is not the name of this host: nothing was done")
        answer = ask("All file systems are synced, then the kernel panics. Type 'crash' to go on: ")
    except EOFError:
        answer = ""
    if answer.strip() != "crash":
        raise UsageError("nothing was done")


def begin(host: str, targets: Sequence[str]) -> CrashTest:
    """Remember that a test is about to be made.

    Raises:
        StateError: it cannot be remembered.
        KexecError: the kernel does not take a line for its log.
    """
    made = CrashTest(secrets.token_hex(8), round(time.time(), 3), _boot_id(), host, tuple(targets))
    try:
        KMSG.write_text(f"<5>{MARK}{made.id}\n", encoding="utf-8")
    except OSError as error:
        raise KexecError(f"{KMSG}: {error.strerror}; nothing was done") from None
    state.write(record(), asdict(made))
    return made


def crash(before: CrashTest | None) -> None:
    """Crash the machine: it does not come back.

    Raises:
        KexecError: it does; the test before this one is the last one again.
    """
    os.sync()
    try:
        _trigger()
    except KexecError:
        if before is None:
            record().unlink(missing_ok=True)
        else:
            state.write(record(), asdict(before))
        raise


def _trigger() -> None:
    try:
        SYSRQ.write_text("1\n", encoding="utf-8")
        TRIGGER.write_text("c", encoding="utf-8")
    except OSError as error:
        raise KexecError(f"{error.filename}: {error.strerror}: the machine was not crashed") from None
    time.sleep(WAIT)
    raise KexecError(f"{TRIGGER} was told to crash the machine, and it did not")


def find(test: CrashTest, crashes: Sequence[SavedCrash]) -> SavedCrash | None:
    """Return the crash that a test made: its log has the id in it; an encrypted one is known by its time."""
    for crash in crashes:
        if not crash.encrypted and log_has(crash, MARK + test.id):
            return crash
    close = [crash for crash in crashes if crash.encrypted and abs(crash.when.timestamp() - test.time) <= CLOCK]
    return min(close, key=lambda crash: abs(crash.when.timestamp() - test.time), default=None)


def is_over(test: CrashTest) -> bool:
    """Return whether the machine was booted since."""
    return test.boot_id != _boot_id()


def finish(test: CrashTest, *, saved: bool, result: str) -> CrashTest:
    """Remember what became of it."""
    values: dict[str, Any] = {**asdict(test), "saved": saved, "result": result}
    state.write(record(), values)
    return CrashTest(**{**values, "targets": test.targets})


def _boot_id() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip()
