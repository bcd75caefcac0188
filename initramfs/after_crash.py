"""After the reboot: crashes that nobody was told of yet are verified, written to the journal, and made known.

Which ones were is remembered in a file. Who could not be told is told by the next run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.console import Console
from capture.dumpfile.output import digests_of
from capture.dumpfile.reader import KdumpFile
from capture.errors import CaptureError, IncompleteError
from capture.verify import verify
from initramfs import crash_test, crashes, journal, notify, state
from initramfs.crash_view import state as state_text
from initramfs.crashes import WHOLE, SavedCrash
from initramfs.errors import StateError
from initramfs.notify import News, Receiver
from initramfs.places import Place
from initramfs.units import size_text

KNOWN_DAYS = 7
"""Crashes that were older than this when the first report was made are not told of: they are no news."""
MESSAGE_ID = "8e0f4c1d9ac24f7d9f0a6a1c3b5e7d21"
"""Of the line in the journal: ``journalctl MESSAGE_ID=…`` finds all of them."""
TEST_MESSAGE_ID = "8e0f4c1d9ac24f7d9f0a6a1c3b5e7d22"
DAMAGED = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading a crash back came to: 0 all is right and there; 3 what is there is right; 1 damaged."""

    status: int
    text: str


@dataclass(slots=True)
class Reported:
    """What was done by one run."""

    news: list[News] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    test: crash_test.CrashTest | None = None


def record() -> Path:
    """Return where it is remembered who was told of what."""
    return state.DIRECTORY / "reported.json"


def check(crash: SavedCrash) -> Verdict:
    """Read a crash back: each file against the manifest's SHA-256, each page of the dump that can be read here."""
    problems = []
    for name, said in crashes.manifest_files(crash).items():
        if crash.dump is not None and name == crash.dump.name and not crash.encrypted:
            continue  # verify does that
        path = crash.directory / name
        try:
            found = digests_of(path)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if found != (said.get("sha256_blocks") or [said.get("sha256")]):
            problems.append(f"{name}: its SHA-256 is not the manifest's")
    if crash.dump is not None and not crash.encrypted:
        try:
            with KdumpFile(crash.dump) as dump:
                report = verify(dump, None, progress=False)
        except (CaptureError, OSError) as error:
            problems.append(str(error))
        else:
            if report.exit_status not in (0, IncompleteError.exit_status):
                problems.append(f"{crash.dump.name}: {report.text().splitlines()[0]}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Verdict(DAMAGED, f"damaged: {problems[0]}{more}")
    if crash.state == WHOLE:
        return Verdict(0, "whole, SHA-256 as in the manifest" if crash.encrypted else "whole, every page read back")
    why = f": {crash.problems[0]}" if crash.problems else ""
    return Verdict(IncompleteError.exit_status, f"{state_text(crash)}{why}")


def report(
    places: Sequence[Place], receivers: Sequence[Receiver], console: Console, *, quiet: bool = False
) -> Reported:
    """Tell of each crash in these places that was not told of yet; of a crash test, what became of it.

    Raises:
        StateError: it cannot be remembered.
    """
    with _alone(console):
        found = crashes.find(places)[::-1]  # the oldest first
        run = _Run(receivers, console, quiet=quiet)
        for crash in found:
            run.tell(crash)
        run.forget_what_is_gone({crash.shown for crash in found}, {place.shown for place in places})
        run.tell_test(found)
        return run.done


@contextmanager
def _alone(console: Console) -> Iterator[None]:
    """Wait for another report: the boot's may read a dump back while somebody asks for one."""
    lock = record().with_name("report.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(state.alone(lock, lambda: console.say("another report is being made: waiting for it")))
        except OSError as error:
            raise StateError(f"{lock}: {error.strerror}") from None
        yield


class _Run:
    """One report: what is remembered of the earlier ones, and what this one did."""

    def __init__(self, receivers: Sequence[Receiver], console: Console, *, quiet: bool) -> None:
        self.done = Reported()
        self._receivers = receivers
        self._console = console
        self._quiet = quiet
        known = state.read(record())
        self._first = known is None
        entries = None if known is None else known.get("crashes")
        self._entries: dict[str, Any] = entries if isinstance(entries, dict) else {}
        self._verdicts: dict[str, Verdict] = {}

    def tell(self, crash: SavedCrash) -> None:
        """Tell of one crash whom nobody has told yet."""
        entry = self._entries.get(crash.shown)
        if entry is not None and not entry.get("pending"):
            return
        if self._first and time.time() - crash.when.timestamp() > KNOWN_DAYS * 86400:
            self._console.say(f"{crash.shown}: more than {KNOWN_DAYS} days old, not reported")
            self._remember(crash, reported=False)
            return
        verdict = self._verdicts[crash.shown] = check(crash)
        news = _news(crash, verdict)
        if entry is None:
            _to_journal(news, crash, quiet=self._quiet)
        self.done.news.append(news)
        waiting = [receiver for receiver in self._receivers if entry is None or str(receiver) in entry["pending"]]
        # At once: a run that is cut short does not tell everything again.
        self._remember(crash, pending=[receiver for receiver in waiting if not self._told(receiver, news)])

    def _told(self, receiver: Receiver, news: News) -> bool:
        try:
            notify.tell(receiver, news)
        except CaptureError as error:
            self.done.failures.append(str(error))
            self._console.say(f"{error}; the next report tries again")
            return False
        return True

    def _remember(self, crash: SavedCrash, *, reported: bool = True, pending: Sequence[Receiver] = ()) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds") if reported else None
        self._entries[crash.shown] = {"reported": now, "pending": [str(receiver) for receiver in pending]}
        state.write(record(), {"crashes": self._entries})

    def forget_what_is_gone(self, there: set[str], looked_at: set[str]) -> None:
        """Forget crashes that are not there any more, but not those on a disk that was not looked at."""
        kept = {
            shown: entry
            for shown, entry in self._entries.items()
            if shown in there or shown.rpartition("/")[0] not in looked_at
        }
        if self._first or kept != self._entries:
            self._entries = kept
            state.write(record(), {"crashes": kept})

    def tell_test(self, found: Sequence[SavedCrash]) -> None:
        """Tell what became of the last crash on purpose, once."""
        test = crash_test.last()
        if test is None or test.saved is not None:
            return
        crash = crash_test.find(test, found)
        if crash is not None:
            verdict = self._verdicts.get(crash.shown) or check(crash)
            saved, result = verdict.status != DAMAGED, f"{verdict.text}: {crash.shown}"
        elif crash_test.is_over(test):
            elsewhere = f"; look for it on {', '.join(test.targets)}" if test.targets else ""
            saved, result = False, f"nothing of it was found here{elsewhere}"
        else:
            return
        self.done.test = crash_test.finish(test, saved=saved, result=result)
        _tell_test(self.done.test, quiet=self._quiet)


def _news(crash: SavedCrash, verdict: Verdict) -> News:
    panic = crash.panic or ("encrypted" if crash.encrypted else "no announcement in the log")
    summary = (
        f"{crash.host} crashed at {crash.when:%Y-%m-%d %H:%M:%S} UTC: {panic}; {crash.shown}: {verdict.text}, "
        f"{size_text(crash.size)}"
    )
    values = {**crash.values(), "verified": verdict.text, "status": verdict.status}
    return News(summary, crash.shown, verdict.status, values)


def _to_journal(news: News, crash: SavedCrash, *, quiet: bool) -> None:
    journal.log(
        news.summary,
        journal.WARNING if news.status == 0 else journal.CRITICAL,
        {
            "MESSAGE_ID": MESSAGE_ID,
            "VMCAPTURE_DIRECTORY": news.directory,
            "VMCAPTURE_STATUS": news.status,
            "VMCAPTURE_STATE": crash.state,
            "VMCAPTURE_HOST": crash.host,
            "VMCAPTURE_TIME": crash.when.isoformat(),
            "VMCAPTURE_RELEASE": crash.release,
            "VMCAPTURE_PANIC": crash.panic,
            "VMCAPTURE_BYTES": crash.size,
        },
        quiet=quiet,
    )


def _tell_test(test: crash_test.CrashTest, *, quiet: bool) -> None:
    what = "saved" if test.saved else "NOT SAVED"
    journal.log(
        f"crash test {test.id} of {test.when}: {what}: {test.result}",
        journal.NOTICE if test.saved else journal.CRITICAL,
        {"MESSAGE_ID": TEST_MESSAGE_ID, "VMCAPTURE_TEST": test.id, "VMCAPTURE_TEST_SAVED": int(bool(test.saved))},
        quiet=quiet,
    )
