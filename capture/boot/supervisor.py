"""Watches over the job: tries the targets one after another, and ends what hangs or was killed.

The job runs in a process of its own, because there is no other way out of a disk that stopped answering: whoever writes
to it stays in the kernel, signals or not. This process touches no disk. It looks at the job's signs of life
(capture.pulse) and imports nothing that takes memory: that is the job's.

| what happens to the job | what is done |
| --- | --- |
| everything is saved, or the source or the deadline is the reason that it is not | that is the outcome |
| the target is missing, full, read-only, broken | the next target |
| no byte moved for ``vmcapture.timeout=`` seconds | it is killed; the next target |
| killed by a signal (out of memory, SIGBUS) | once more, going on where it was: one thread, reading, not mapping |
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from capture import pulse
from capture.boot import mounting, targets
from capture.boot.config import BootConfig
from capture.boot.watchdog import Watchdog
from capture.console import Console
from capture.errors import CaptureError, IncompleteError, TargetError, UsageError
from capture.options import DumpOptions
from capture.pulse import Pulse

if TYPE_CHECKING:
    from capture.boot.job import SaveReport

TICK = 1.0
"""Seconds between two looks at the job."""
_LOOK_UP = 60
"""Seconds that looking for all targets may take, when there are several."""
_DEATH = 5.0
"""Seconds that a killed process has to be gone; one that waits for a disk never is."""
_SYS_PIDFD_OPEN, _SYS_PROCESS_MRELEASE = 434, 448
"""The same number on every architecture (include/uapi/asm-generic/unistd.h, since 5.3 and 5.15)."""
_PR_SET_PDEATHSIG = 1


class Outcome(NamedTuple):
    """What was saved at one target.

    ``status`` is the exit status of ``vmcapture save``; ``what`` is ``saved``, ``saved in part`` or ``not saved``;
    ``settled``: no other target could change it.
    """

    target: str
    status: int
    what: str
    directory: str = ""
    reasons: tuple[str, ...] = ()
    settled: bool = False
    log_saved: bool = False
    pages: int = 0

    @property
    def complete(self) -> bool:
        """Whether everything was done that can be; a dump may still lack pages that nobody can read."""
        return self.what == "saved"

    @property
    def line(self) -> str:
        """Everything in one line."""
        where = f" in {self.target}{self.directory}" if self.directory else ""
        return f"{self.what}{where}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")

    @property
    def rank(self) -> tuple[bool, bool, bool, int]:
        """The more is saved, the higher."""
        return self.complete, self.log_saved, self.what != "not saved", self.pages


def save_to_targets(
    boot: BootConfig,
    console: Console,
    options: DumpOptions | None = None,
    source: str | None = None,
    dog: Watchdog | None = None,
) -> Outcome:
    """Save the dead kernel to the first of ``boot.targets`` that takes it; ``dog`` is fed meanwhile.

    Raises:
        UsageError: the command line names no target.
        TargetError: another save is running.
    """
    if not boot.targets:
        raise UsageError(
            "no vmcapture.target= on this kernel's command line: mount a disk and name a directory: vmcapture save DIR"
        )
    if options is None:
        deadline = time.monotonic() + boot.deadline if boot.deadline else None
        options = DumpOptions(levels=boot.levels, compression=boot.compression, deadline=deadline)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with _only_one():
        devices = _devices(boot.targets, console, dog)
        with Watch(boot.timeout, console, dog, "vmcapture.timeout=") as watch:
            for number, target in enumerate(boot.targets, 1):
                late = targets.kind_of(target) in targets.WAITS_FROM_ITS_TURN
                gone = 0 if late else int(time.monotonic() - started)
                left = max(0, targets.patience(target, boot.wait) - gone)
                outcome = _save(boot._replace(wait=left), target, devices.get(target), console, options, source, watch)
                outcomes.append(outcome)
                over = options.deadline is not None and time.monotonic() >= options.deadline
                if outcome.settled or over or watch.interrupted or number == len(boot.targets):
                    break
                console.say(f"{outcome.line}; trying the next target, {boot.targets[number]}")
    best = max(outcomes, key=lambda outcome: outcome.rank)
    if best.what != "not saved" and outcomes[-1] is not best:
        console.say(outcomes[-1].line)
    if best.what == "not saved":
        return best._replace(reasons=tuple(dict.fromkeys(line for found in outcomes for line in found.reasons)))
    return best


def _devices(names: tuple[str, ...], console: Console, dog: Watchdog | None) -> dict[str, str]:
    """Return the devices of several targets; of one there is no need to know before it is its turn."""
    if len(names) < 2:
        return {}
    with Watch(_LOOK_UP, console, dog) as watch:
        found, end = watch.run(lambda tell: tell(targets.devices_of(names)))
    if end.line:
        console.say(f"looking for the targets: {end.line}")
    return found or {}


def _save(
    boot: BootConfig,
    target: str,
    device: str | None,
    console: Console,
    options: DumpOptions,
    source: str | None,
    watch: Watch,
) -> Outcome:
    """Save at one target; when that is killed, once more with as little as can be."""

    at_target = partial(_at_target, boot, target, device, console, source)
    found, ended = watch.run(partial(at_target, options, can_map=True))
    log_saved = watch.pulse.log_saved
    if found is None and ended.signal is not None and not watch.interrupted:
        console.say(f"{ended.line}; once more, with one thread and reading instead of mapping")
        found, ended = watch.run(partial(at_target, options._replace(threads=1), can_map=False))
        log_saved |= watch.pulse.log_saved  # what the first one has saved is there, whatever becomes of this one
    if ended.hung:  # also where it could be killed: its mount may come through later
        mounting.give_up_mount_points()
    if found is None:
        outcome = Outcome(target, TargetError.exit_status, "not saved", reasons=(f"{target}: {ended.line}",))
    else:
        if ended.line:
            console.say(f"{target}: {ended.line}, after the save")
        outcome = Outcome(**{**found, "reasons": tuple(found["reasons"])})
    if log_saved and not outcome.log_saved:
        status = IncompleteError.exit_status
        outcome = outcome._replace(what="saved in part", status=status, log_saved=True)
    return outcome


# --- the job's process ----------------------------------------------------------------------------------------------

Tell = Callable[[Any], None]
"""Hands a value that JSON can have to the process that watches."""


def _at_target(
    boot: BootConfig,
    target: str,
    device: str | None,
    console: Console,
    source: str | None,
    options: DumpOptions,
    tell: Tell,
    *,
    can_map: bool,
) -> None:
    """Save at one target, and tell what came of it."""
    told = False

    def saved(found: SaveReport) -> None:
        nonlocal told
        told = True
        tell(
            Outcome(
                target,
                exit_status(found),
                found.outcome,
                str(found.directory),
                tuple(found.failures),
                settled=not found.target_failed,
                log_saved=found.log_saved,
                pages=found.dump.pages_written if found.dump is not None else 0,
            )._asdict()
        )

    def failed(reason: str, status: int = CaptureError.exit_status, *, settled: bool = False) -> None:
        if told:  # what came after it: older crashes, unmounting
            console.say(reason)
        else:
            tell(Outcome(target, status, "not saved", reasons=(reason,), settled=settled)._asdict())

    try:
        from capture.boot.job import exit_status  # what takes memory is not for the process that watches
        from capture.boot.save import save_to_target

        save_to_target(boot, target, console, options, source, device=device, can_map=can_map, tell=saved)
    except CaptureError as error:
        failed(str(error), error.exit_status, settled=not isinstance(error, TargetError))
    except KeyboardInterrupt:
        failed("interrupted", settled=True)
    except MemoryError:
        failed("out of memory")
    except Exception as error:  # (whatever it is, a person or the failure action must get the machine)
        failed(f"internal error: {type(error).__name__}: {error}")


# --- the process that watches ---------------------------------------------------------------------------------------


class _End(NamedTuple):
    """How a process ended. ``hung``: it did not, and was killed. ``line`` says why it did not end well, if so."""

    line: str = ""
    signal: int | None = None
    hung: bool = False


class Watch:
    """Runs jobs, one after another, each in a process of its own.

    ``limit`` is how many seconds no byte may move, 0: for ever. ``dog`` is fed while bytes move, and until that limit:
    a disk that is given up costs a disk, a reset costs the dump. SIGINT and SIGTERM are the job's, which ends in an
    orderly way; on the second one it is killed.
    """

    def __init__(self, limit: int, console: Console, dog: Watchdog | None = None, word: str = "") -> None:
        self.pulse = Pulse()
        self.interrupted = 0
        """How many times somebody asked for an end."""
        self._limit = limit
        self._word = f" ({word})" if word else ""
        """What sets the limit, for a message."""
        self._console = console
        self._dog = dog or Watchdog([], console)
        self._child = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        pulse.share(self.pulse)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        pulse.share(None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, job: Callable[[Tell], None]) -> tuple[dict[str, Any] | None, _End]:
        """Run ``job``; return what it told, None where it did not live to tell, and how it ended."""
        self.pulse.reset()
        reading, writing = os.pipe()
        try:
            self._child = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            return None, _End(error.strerror or "no process can be made")
        if self._child == 0:
            os.close(reading)
            self._dog.let_go()
            _be_the_job(job, writing, self._console)
        os.close(writing)
        try:
            told, hung = self._listen(reading)
        finally:
            os.close(reading)
        if hung:
            self._kill()
        end = self._ended(hung)
        self._child = 0
        with contextlib.suppress(ValueError):
            value, said = json.loads(told)
            self._console.lines += said  # the log of the next job tells what happened before
            return value, end
        return None, end

    def _listen(self, reading: int) -> tuple[bytes, bool]:
        """Return what the job tells until it ends, and whether it hangs instead of ending."""
        told = b""
        beats, since = self.pulse.beats, time.monotonic()
        while True:
            if select.select([reading], [], [], TICK)[0]:
                piece = os.read(reading, 1 << 16)
                if not piece:
                    return told, False
                told += piece
            now = time.monotonic()
            moved = self.pulse.beats != beats
            if moved:
                beats, since = self.pulse.beats, now
            if (self._limit and now - since >= self._limit) or self.interrupted > 1:
                return told, True
            if moved or self._limit:
                self._dog.feed()

    def _ended(self, hung: bool) -> _End:
        """Wait for the job's end and say how it was."""
        status = self._wait()
        alive = ", and cannot even be killed" if status is None else ""
        if self.interrupted > 1:
            return _End(f"interrupted{alive}", hung=hung or status is None)
        if hung:
            who = "no answer from the target" if self.pulse.waits_for_target else "nothing moved"
            return _End(f"{who} for {self._limit} s{self._word}{alive}", hung=True)
        if status is None:
            return _End("it does not come to its end", hung=True)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            memory = " (out of memory)" if -code == signal.SIGKILL else ""
            return _End(f"the save was killed by signal {-code}{memory}", signal=-code)
        if self.interrupted and code:  # its second Ctrl-C may be there before ours
            return _End("interrupted")
        return _End(f"the save ended with status {code}" if code else "")

    def _kill(self) -> None:
        """Kill the job, and give its memory back even where it waits for a disk in the kernel."""
        os.kill(self._child, signal.SIGKILL)
        import ctypes  # not before it is needed: what this process takes, the job lacks

        libc = ctypes.CDLL(None)
        process = libc.syscall(_SYS_PIDFD_OPEN, self._child, 0)
        if process >= 0:
            libc.syscall(_SYS_PROCESS_MRELEASE, process, 0)
            os.close(process)

    def _wait(self) -> int | None:
        """Return the wait status of the job, None when it does not come to an end."""
        patience = time.monotonic() + _DEATH
        while time.monotonic() < patience:
            child, status = os.waitpid(self._child, os.WNOHANG)
            if child:
                return status
            time.sleep(_DEATH / 100)
        return None

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        self.interrupted += 1
        if self._child and number == signal.SIGTERM:  # the terminal sends SIGINT to both of us
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGINT)


def _be_the_job(job: Callable[[Tell], None], writing: int, console: Console) -> None:
    """Run ``job`` in this process, which was forked for it, and end."""
    heard = len(console.lines)

    def tell(value: Any) -> None:  # noqa: ANN401
        text = json.dumps([value, console.lines[heard:]]).encode()
        while text:
            text = text[os.write(writing, text) :]

    status = 1
    try:
        import ctypes

        # An orphan would go on, and the next save could work in the same directory.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        job(tell)
        status = 0
    finally:
        os._exit(status)


@contextmanager
def _only_one() -> Iterator[None]:
    """Keep a second save from the target while there is one.

    The job does not hold on to it: one that cannot be killed must not be in the way for ever.

    Raises:
        TargetError: another one is running.
    """
    folder = mounting.MOUNT_POINT.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise TargetError(f"{folder}: {error.strerror}; only root can mount a target: vmcapture save DIR") from None
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # (of this process alone: not inherited)
        except OSError:
            raise TargetError("another save is running: wait for it, or kill it") from None
        yield
    finally:
        os.close(lock)
