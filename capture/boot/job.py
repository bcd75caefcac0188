"""The whole job: log, registers, dump, manifest — each step on its own, what is small and precious first.

A step that fails is said, noted in the manifest, and the next one still runs. Each file is synced before the next one
begins, gets its name when everything is in it, and nothing is ever written over.

With recipients, nothing that comes from the dead kernel is written but encrypted: each file ends in .age, the dump is
flattened, and the manifest says in the clear only what a person without the key may know.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capture import __version__, pulse, report
from capture.boot.names import DUMP, ENCRYPTED_DUMP, LOG, REGISTERS, REGISTERS_TEXT
from capture.console import Console
from capture.dumpfile.encrypted import SUFFIX, EncryptedFile, check_recipients
from capture.dumpfile.output import (
    HASH_BLOCK,
    INCOMPLETE_SUFFIX,
    MANIFEST,
    OutputFile,
    digests_of,
    sync_directory,
    target_error,
)
from capture.errors import CaptureError, IncompleteError, TargetError
from capture.footprint import Footprint
from capture.kernel.address import KernelMemory
from capture.kernel.panic import Panic, PanicFinder, panicked_cpu
from capture.kernel.utsname import read_utsname
from capture.memory.source import OLDMEM, PROC_VMCORE, is_crash_boot
from capture.options import RECIPIENTS, DumpOptions
from capture.vmcore import Vmcore

if TYPE_CHECKING:
    from capture.dump import DumpReport, Filtered

DIRECTORY_MODE = 0o700
MANIFEST_FORMAT = 1
FULL_MANIFEST = "manifest-full.json"
"""What ``manifest.json`` says when nothing is encrypted, in an encrypted file."""
_WRITE_SIZE = 1 << 16
_MAX_NAME_TRIES = 100
_MAX_NUMBER = 9999
_HOST_LIMIT = 64
_CLEAR_OF_DUMP = (
    "file", "whole", "level", "compression", "pages", "pages_written", "unreadable_pages", "source_bytes_missing",
    "seconds",
)  # fmt: skip
"""What the manifest of an encrypted save says of its dump in the clear."""


class SavedFile(NamedTuple):
    """One finished file: size in bytes and SHA-256 of each 64 MiB block."""

    name: str
    size: int
    digests: list[str]


@dataclass(slots=True)
class SaveReport:
    """What a save has come to. ``failures`` are lines; ``dump`` is None when not even a part could be written."""

    directory: Path
    files: list[SavedFile] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    dump: DumpReport | None = None
    panic: Panic = field(default_factory=Panic)
    seconds: dict[str, float] = field(default_factory=dict)
    target_failed: bool = False
    """Whether the target is a reason for what is missing: another one might take it."""

    @property
    def complete(self) -> bool:
        """Whether every step did all that can be done; the dump may still lack pages that nobody can read."""
        return not self.failures

    @property
    def log_saved(self) -> bool:
        """Whether the dead kernel's log is there, whole."""
        return any(file.name in (LOG, LOG + SUFFIX) for file in self.files)

    @property
    def outcome(self) -> str:
        """What to call it: ``saved``, ``saved in part``, or ``not saved`` when there is not even one file."""
        if not self.files:
            return "not saved"
        return "saved" if self.complete else "saved in part"


def save(
    vmcore: Vmcore, parent: Path, options: DumpOptions, console: Console, *, usual_recipients: bool = True
) -> SaveReport:
    """Save ``vmcore`` into a new directory below ``parent``; or go on in one in which it was cut short.

    Encrypted to the recipients in ``options``, else to those that are in their usual place, unless that is not to be
    looked at: the self-test may run where there are some.

    Raises:
        TargetError: the directory cannot be made. What goes wrong after that is in the report.
    """
    # Even one that leads nowhere: plain is no way out.
    if usual_recipients and options.recipients is None and os.path.lexists(RECIPIENTS):
        options = options._replace(recipients=RECIPIENTS)
    if options.recipients is not None:
        check_recipients(options.recipients)
    unfinished = _unfinished_directory(vmcore, parent, options, console)
    if unfinished is not None:
        return _Job(vmcore, unfinished, options._replace(resume=True), console).run()
    missing = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
    work = _Job(vmcore, _make_directory(vmcore, parent), options._replace(resume=False), console)
    work.sync_names([parent, *(folder.parent for folder in missing)])
    return work.run()


class _Job:
    def __init__(self, vmcore: Vmcore, directory: Path, options: DumpOptions, console: Console) -> None:
        self._vmcore = vmcore
        self._options = options
        self._console = console
        self._report = SaveReport(directory)
        self._taken = Footprint()
        self._encrypted = options.recipients is not None
        self._crash_boot = vmcore.source.name == PROC_VMCORE or vmcore.source.name.startswith("/dev/")

    def sync_names(self, folders: Iterable[Path]) -> None:
        """Bring the names of new directories to the disk; what goes into them is worth saving even where that fails."""
        for folder in folders:
            try:
                sync_directory(folder)
            except TargetError as error:
                self._fail(folder.name, str(error))

    def run(self) -> SaveReport:
        going_on = ", where it was cut short before" if self._options.resume else ""
        encrypted = f", encrypted to the keys in {self._options.recipients}" if self._encrypted else ""
        self._console.say(f"saving to {self._report.directory}{going_on}{encrypted}")
        for line in self._vmcore.problems:
            self._console.say(line)
        if self._options.resume:
            self._forget_manifest()
        self._step(self._called(LOG), self._unless_there(self._save_log))
        self._step(self._called(REGISTERS_TEXT), self._unless_there(self._save_registers_text))
        self._step(self._called(REGISTERS), self._unless_there(self._save_registers_json))
        self._step(ENCRYPTED_DUMP if self._encrypted else DUMP, self._save_dump)
        self._step(self._called(_log_name(self._report.directory)), self._save_capture_log)
        if self._encrypted:
            self._step(self._called(FULL_MANIFEST), self._save_manifest)
            self._step(MANIFEST, self._save_clear_manifest)
        else:
            self._step(MANIFEST, self._save_manifest)
        if not self._report.files:
            with contextlib.suppress(OSError):  # not empty: a part of the log is better than none
                self._report.directory.rmdir()
        return self._report

    def _called(self, name: str) -> str:
        """Return what the file ``name`` is called in this directory."""
        return name + SUFFIX if self._encrypted else name

    def _forget_manifest(self) -> None:
        """Remove the manifest of the save that was cut short: what it says of the dump will be untrue."""
        path = self._report.directory / MANIFEST
        try:
            path.unlink(missing_ok=True)
            sync_directory(self._report.directory)
        except OSError as error:
            self._fail(MANIFEST, str(target_error(path, "removing that of the save before", error)))
        except CaptureError as error:
            self._fail(MANIFEST, str(error))

    def _unless_there(self, action: Callable[[str], None]) -> Callable[[str], None]:
        """Return ``action``, or what lists its file where the save before this one has finished it."""

        def keep(name: str) -> None:
            path = self._report.directory / name
            if not (self._options.resume and path.exists()):
                action(name)
                return
            self._list(path)
            if action == self._save_log:
                pulse.note_log()
                self._report.panic = report.find_panic(self._vmcore)

        return keep

    def _step(self, name: str, action: Callable[[str], None]) -> None:
        """Run one step; whatever it ends with, the next one runs. Only Ctrl-C outside the dump stops the job."""
        started = time.monotonic()
        try:
            action(name)
        except CaptureError as error:
            self._report.target_failed |= isinstance(error, TargetError)
            self._fail(name, str(error))
        except OSError as error:  # of a look at what is there: the disk or the server is gone
            self._report.target_failed = True
            self._fail(name, str(target_error(error.filename or self._report.directory, "looking at it", error)))
        except Exception as error:  # (a bug in one step must not cost the others)
            self._fail(name, f"internal error: {type(error).__name__}: {error}")
        self._report.seconds[name] = round(time.monotonic() - started, 3)

    def _fail(self, name: str, reason: str) -> None:
        self._report.failures.append(f"{name}: {reason}")
        self._console.say(f"{name}: {reason}")

    def _save_log(self, name: str) -> None:
        log = report.open_log(self._vmcore)
        finder = PanicFinder()
        try:
            self._write(name, report.log_lines(iter(finder.watch(log.records()))))
            self._report.panic = finder.panic
            pulse.note_log()
        except TargetError:  # what could not be written can be read all the same
            self._report.panic = report.find_panic(self._vmcore)
            raise
        statistics = log.statistics
        self._console.say(
            f"{name}: {statistics.records} records" + (f", {finder.panic.line}" if finder.panic.line else "")
        )
        if statistics.undecodable or statistics.dataless:
            lost = f"{statistics.undecodable} records could not be decoded, {statistics.dataless} had lost their text"
            self._console.say(f"{name}: {lost}")

    def _save_registers_text(self, name: str) -> None:
        self._write(name, [report.registers_text(self._vmcore, self._report.panic).encode()])

    def _save_registers_json(self, name: str) -> None:
        values = report.registers_json(self._vmcore, self._report.panic)
        self._write(name, [_json(values)])
        self._console.say(f"registers: {len(values['cpus'])} CPUs")

    def _save_dump(self, name: str) -> None:
        from capture.dump import write_dump  # a third of all imports: log and registers are on the disk before them

        path = self._report.directory / name
        try:
            result = self._report.dump = write_dump(self._vmcore, path, self._options, self._console.say, self._taken)
        except TargetError:
            unfinished = path.with_name(name + INCOMPLETE_SUFFIX)
            if os.path.lexists(unfinished):  # it could not be gone on with: it has what the save before this one saved
                self._list(unfinished)
            raise
        self._report.files.append(SavedFile(result.path.name, result.size, result.digests))
        shortfall = result.shortfall()
        rate = result.statistics.pages * self._vmcore.image.page_size / max(result.seconds, 1e-3) / (1 << 20)
        self._console.say(
            f"{result.path.name}: level {result.level}, {result.pages_written} of {result.pages} pages, "
            f"{result.size} bytes, "
            f"{result.seconds:.1f} s, {rate:.0f} MiB/s" + (f"; not whole: {shortfall}" if shortfall else "")
        )
        if result.failure is not None:
            self._report.failures.append(f"{name}: {result.failure}")
            self._report.target_failed = True  # (or the deadline, or Ctrl-C: whoever tries targets knows)
        if result.name_failure is not None:
            self._fail(name, result.name_failure)
            self._report.target_failed = True

    def _list(self, path: Path) -> None:
        """List a file that the save before this one made."""
        try:
            self._report.files.append(SavedFile(path.name, path.stat().st_size, digests_of(path)))
        except OSError as error:
            raise target_error(path, "reading it back", error) from None

    def _save_capture_log(self, name: str) -> None:
        lines = [line.encode() + b"\n" for line in self._console.lines]
        if self._crash_boot:
            lines.append(b"\n--- messages of the capture kernel ---\n")
            lines += kernel_messages()
        self._write(name, lines)

    def _save_manifest(self, name: str) -> None:
        self._write(name, [_json(_manifest(self._vmcore, self._report, self._taken))])

    def _save_clear_manifest(self, name: str) -> None:
        full = _manifest(self._vmcore, self._report, self._taken)
        self._write(name, [_json(_clear_manifest(full))], clear=True)

    def _write(self, name: str, pieces: Iterable[bytes], *, clear: bool = False) -> None:
        """Write one small file whole and bring it to the disk; then it gets its name, and that is brought there.

        It is encrypted when this save is, unless it is ``clear``.
        """
        path = self._report.directory / name
        unfinished = path.with_name(name + INCOMPLETE_SUFFIX)
        if self._options.resume:
            with contextlib.suppress(OSError):  # of the save that was cut short: what is in it is written anew
                unfinished.unlink()
        output: OutputFile | EncryptedFile
        if self._options.recipients is None or clear:
            output = OutputFile(unfinished)
        else:
            output = EncryptedFile(unfinished, self._options.recipients)
        try:
            for block in _blocks(pieces):
                output.append([block])
            output.end()
            output.sync()
            self._report.files.append(SavedFile(unfinished.name, output.size, output.digests()))
        except TargetError:
            output.discard_if_empty()
            raise
        finally:
            output.close()
        try:
            with pulse.at_target():
                unfinished.rename(path)
        except OSError as error:
            raise target_error(path, f"renaming {unfinished.name}", error) from None
        self._report.files[-1] = self._report.files[-1]._replace(name=name)
        sync_directory(self._report.directory)


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Put small pieces together to larger ones."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        if len(buffer) >= _WRITE_SIZE:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


def kernel_messages() -> list[bytes]:
    """Return the running kernel's own log from /dev/kmsg, as ``[seconds.microseconds] text``; empty when refused."""
    messages: list[bytes] = []
    with contextlib.suppress(OSError):
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                try:
                    record = os.read(fd, 8192)
                except BrokenPipeError:  # overwritten while we read: the next read goes on with what is left
                    continue
                head, _, text = record.partition(b";")
                microseconds = int(head.split(b",")[2])
                line = text.split(b"\n", 1)[0]
                messages.append(b"[%5d.%06d] %s\n" % (*divmod(microseconds, 1_000_000), line))
        except (BlockingIOError, IndexError, ValueError):
            pass
        finally:
            os.close(fd)
    return messages


def exit_status(saved: SaveReport) -> int:
    """0: everything; 3: something is missing or not whole; 5: there was no room for anything at all."""
    if not saved.files:
        return TargetError.exit_status
    whole = saved.complete and saved.dump is not None and saved.dump.whole
    return 0 if whole else IncompleteError.exit_status


def default_source() -> str:
    """Return /proc/vmcore, or the raw hand-over on a crash boot whose kernel has no /proc/vmcore."""
    return OLDMEM if is_crash_boot() and not Path(PROC_VMCORE).exists() else PROC_VMCORE


def _unfinished_directory(vmcore: Vmcore, parent: Path, options: DumpOptions, console: Console) -> Path | None:
    """Return the directory in which a save of this crash was cut short, None where there is none to go on in."""
    name = _directory_name(vmcore)
    try:
        taken = [parent / _numbered(name, number) for number in _numbers(parent, name)]
    except OSError:
        return None
    if options.recipients is not None:
        for directory in taken:
            if os.path.lexists(directory / f"{ENCRYPTED_DUMP}{INCOMPLETE_SUFFIX}"):
                console.say(
                    f"{directory}: was cut short, and is encrypted: this machine cannot go on with it; saving anew"
                )
        return None
    try:
        return next((path for path in taken if not path.is_symlink() and _can_go_on(vmcore, path, options)), None)
    except OSError:
        return None


def _can_go_on(vmcore: Vmcore, directory: Path, options: DumpOptions) -> bool:
    """Whether a save of this crash was cut short in ``directory``: its notes tell, else its log.

    A clock that stands may give two crashes the same name.
    """
    from capture.dump import unfinished_dump  # see _save_dump

    dump, unfinished = directory / DUMP, directory / f"{DUMP}{INCOMPLETE_SUFFIX}"
    if unfinished.exists():
        return unfinished_dump(vmcore, unfinished, options)
    if not dump.exists():
        return _is_the_log(vmcore, directory / LOG) if (directory / LOG).exists() else not any(directory.iterdir())
    if (directory / MANIFEST).exists() or dump.is_symlink() or not unfinished_dump(vmcore, dump, options):
        return False
    dump.rename(unfinished)  # it was killed before it could say what is in it: read back, it can be said
    return True


def _is_the_log(vmcore: Vmcore, path: Path) -> bool:
    """Whether the file at ``path`` is the dead kernel's log."""
    try:
        with path.open("rb") as file:
            for line in report.log_lines(report.open_log(vmcore).records()):
                if file.read(len(line)) != line:
                    return False
            return not file.read(1)
    except CaptureError:
        return False


def _log_name(directory: Path) -> str:
    """Return a name for the capture log that nothing in the directory has: each save that goes on there adds one."""
    names = ("capture-log.txt", *(f"capture-log-{number}.txt" for number in range(2, _MAX_NAME_TRIES)))
    return next((name for name in names if not os.path.lexists(directory / name)), names[0])


def _directory_name(vmcore: Vmcore) -> str:
    """Return <host>-<time of the crash>."""
    names = read_utsname(KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine), vmcore.info, vmcore.core.machine)
    nodename = names.text("nodename").replace("(none)", "")  # the kernel's name for a host that was given none
    host = re.sub(r"[^A-Za-z0-9._-]", "_", nodename).strip("._-")[:_HOST_LIMIT] or "localhost"
    when = datetime.fromtimestamp(vmcore.info.crash_time or time.time(), UTC).strftime("%Y-%m-%d-%H:%M:%S")
    return f"{host}-{when}"


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number}" if number else name


def _numbers(parent: Path, name: str) -> list[int]:
    """Return the numbers behind ``name`` that are taken, in order; 0 is the name itself."""
    found = (re.fullmatch(re.escape(name) + "(?:-([1-9][0-9]{0,3}))?", path.name) for path in parent.iterdir())
    return sorted(int(match[1] or 0) for match in found if match)


def _make_directory(vmcore: Vmcore, parent: Path) -> Path:
    """Make ``parent``/<host>-<time of the crash>, with a number behind when that exists already.

    It is higher than all that are there, also where lower ones were removed: it tells which is the newest.
    """
    name = _directory_name(vmcore)
    try:
        with _true_to_exists(parent):
            parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        for number in range(max(_numbers(parent, name), default=-1) + 1, _MAX_NUMBER + 1):
            directory = parent / _numbered(name, number)
            with contextlib.suppress(FileExistsError), _true_to_exists(directory):
                directory.mkdir(mode=DIRECTORY_MODE)
                with contextlib.suppress(OSError):  # some file systems have modes of their own
                    directory.chmod(DIRECTORY_MODE)  # an umask can only take away, even what root needs
                return directory
    except (FileExistsError, NotADirectoryError):
        raise TargetError(f"{parent}: is not a directory; name another place") from None
    except OSError as error:
        raise target_error(parent, "making a directory for this crash", error) from None
    raise TargetError(f"{parent}: this crash was saved {_MAX_NUMBER} times already; remove the last of them")


@contextlib.contextmanager
def _true_to_exists(path: Path) -> Iterator[None]:
    """Around the making of directories up to ``path``: one that is said to exist does.

    sshfs says so of every directory that its server does not make, for whatever reason: no room, a quota.

    Raises:
        PermissionError: it does not; that is what sshfs says of all else.
    """
    try:
        yield
    except FileExistsError as error:
        if not os.path.lexists(error.filename or path):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
        raise


def _manifest(vmcore: Vmcore, saved: SaveReport, taken: Footprint) -> dict[str, Any]:
    cpus, _ = report.registers(vmcore)
    description = report.describe(vmcore, saved.panic)
    return {
        "format": MANIFEST_FORMAT,
        "written_by": f"vmcapture {__version__}",
        "kernel": {
            key: description[key] for key in ("release", "version", "machine", "host", "crash_time", "panic", "cpus")
        },
        "panicked_cpu": panicked_cpu(saved.panic, cpus),
        "source": vmcore.source.name,
        "complete": exit_status(saved) == 0,
        "failures": saved.failures,
        "problems": vmcore.problems,
        "hash_block": HASH_BLOCK,
        "files": {file.name: {"size": file.size, **_digest(file.digests)} for file in saved.files},
        "dump": _dump_values(saved.dump) if saved.dump else None,
        "seconds": saved.seconds,
        "capture_machine": taken.values(),
    }


def _clear_manifest(full: dict[str, Any]) -> dict[str, Any]:
    """Return of a manifest what anybody may know who finds the disk: nothing that was in the dead kernel's memory but
    what the directory's name says, the release, and numbers of pages."""
    dump = full["dump"]
    return {
        "format": full["format"],
        "written_by": full["written_by"],
        "encrypted": {"format": "age-encryption.org/v1", "manifest": FULL_MANIFEST + SUFFIX},
        "kernel": {key: full["kernel"][key] for key in ("release", "machine", "host", "crash_time", "cpus")},
        "complete": full["complete"],
        # What follows the colon may quote memory: the reason is in the full manifest.
        "failed": [failure.partition(": ")[0] for failure in full["failures"]],
        "hash_block": full["hash_block"],
        "files": full["files"],
        "dump": dump and {key: dump[key] for key in _CLEAR_OF_DUMP},
        "seconds": full["seconds"],
        "capture_machine": full["capture_machine"],
    }


def _digest(digests: list[str]) -> dict[str, Any]:
    """Return the plain SHA-256 of a file of one block, else those of its blocks."""
    return {"sha256": digests[0]} if len(digests) == 1 else {"sha256_blocks": digests}


def _dump_values(dump: DumpReport) -> dict[str, Any]:
    statistics = dump.statistics
    return {
        "file": dump.path.name,
        "whole": dump.whole,
        "missing": dump.shortfall(),
        "level": dump.level,
        "filter": filter_values(dump.filtered),
        "compression": dump.compression,
        "pages_by_zstd_level": {str(level): pages for level, pages in dump.zstd_levels.items()},
        "target_bytes_per_second": None if dump.target_speed is None else round(dump.target_speed),
        "pages": dump.pages,
        "pages_found": dump.pages_found,
        "pages_written": dump.pages_written,
        "zero_pages": statistics.zero_pages,
        "raw_pages": statistics.raw_pages,
        "data_bytes": statistics.data_bytes,
        "source_bytes_missing": dump.missing_bytes,
        "unreadable_pages": statistics.unreadable.count,
        "unreadable_pages_not_tried": dump.pages_not_tried,
        "unreadable_pages_listed": statistics.unreadable.listed,
        "unreadable_pfn_ranges": statistics.unreadable.ranges,
        "seconds": round(dump.seconds, 3),
    }


def filter_values(filtered: Filtered) -> dict[str, Any]:
    """Return what the page filter did, as values for JSON; numbers of pages, but ``predicted_bytes`` and ``room``."""
    return {
        "level_asked": filtered.asked,
        "level": filtered.level,
        "checks_failed": list(filtered.doubts),
        "checks_overridden": filtered.overridden,
        "classes": filtered.classes,
        "kept_against_struct_page": filtered.rescued,
        "protected": list(filtered.protects),
        "free_pages_found": filtered.free_found,
        "free_pages_counted_by_the_kernel": filtered.free_counted,
        "mem_map_pages_left_out": filtered.vmemmap_pages,
        "predicted_bytes": {str(level): size for level, size in filtered.predicted.items()},
        "room": filtered.room,
    }


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"
