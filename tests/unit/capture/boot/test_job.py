"""The whole job: what is on the disk afterwards, in which order it got there, and what a failing step costs."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capture import dump, report
from capture.boot import job
from capture.console import Console
from capture.dumpfile.output import sync_directory
from capture.dumpfile.reader import KdumpFile
from capture.errors import TargetError
from capture.memory import image as image_module
from capture.memory.source import Source
from capture.verify import verify
from capture.vmcore import open_vmcore
from tests.builders import (
    MEMORY_AT,
    P_FILESZ,
    PAGE,
    PANIC,
    RING_AT,
    PrintkRing,
    crashed_core,
    filled,
    numbered,
    patched,
    program_header,
    simple_core,
)
from tests.dumps import INCOMPLETE, STATUS
from tests.faults import file_size_limit, open_poisoned, raising, tmpfs, umask
from tests.outcome import FILES, WHEN, Run, check_manifest, dump_options, listing, manifest_of, the_directory
from tests.readers import ElfPages, by_hand

WriteFile = Callable[[bytes], str]

REPOSITORY = Path(__file__).resolve().parents[4]
MIB = 1 << 20


def read_dump(path: Path) -> tuple[bool, dict[int, bytes], int]:
    """Read a dump by hand: (marked incomplete, pages with data by PFN, pages without)."""
    dump = by_hand(path)
    return dump.incomplete, dump.pages, dump.missing


def sparse(path: Path, size: int) -> Path:
    """A crashed machine whose memory is ``size`` bytes; all but the first page of it is a hole in the file."""
    core = crashed_core(pages=b"x" * PAGE)
    path.write_bytes(patched(core, program_header(3, P_FILESZ), "Q", size))
    os.truncate(path, len(core) + size - PAGE)
    return path


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The directory that crashes are saved in; not made yet."""
    return tmp_path / "var/crash"


def save(source: str, parent: Path, **options: Any) -> job.SaveReport:
    with open_vmcore(source) as vmcore:
        return job.save(vmcore, parent, dump_options(**options), Console(file=io.StringIO()))


# --- a crash saved whole


def test_a_crash_is_saved_as_six_files_in_a_directory_of_its_host_and_time(
    vmcore_file: WriteFile, parent: Path, run: Run
) -> None:
    core = crashed_core()
    ran = run("save", "--source", vmcore_file(core), parent)
    folder = the_directory(parent)
    assert (ran.status, ran.out) == (0, "")
    assert folder.name == f"db7-{WHEN}"
    assert listing(folder) == set(FILES)
    assert read_dump(folder / "vmcore") == (False, ElfPages(core).pages(), 0)
    assert str(folder) in ran.err.splitlines()[-1]
    assert all(line.startswith("vmcapture: ") for line in ran.err.splitlines())


def test_the_log_is_what_the_kernel_printed(vmcore_file: WriteFile, parent: Path) -> None:
    log = PrintkRing().add(b"one", timestamp=1_234_567_890).add(b"two\nlines", timestamp=2_000_001_999)
    folder = save(vmcore_file(crashed_core(log=log)), parent).directory
    expected = "[    1.234567] one\n[    2.000001] two\n               lines\n"
    assert (folder / "vmcore-dmesg.txt").read_text() == expected


def test_the_registers_name_the_cpu_that_panicked(vmcore_file: WriteFile, parent: Path) -> None:
    folder = save(vmcore_file(crashed_core()), parent).directory
    marked = [line for line in (folder / "registers.txt").read_text().splitlines() if "panicked" in line]
    assert len(marked) == 1
    assert marked[0].startswith("CPU 1")
    registers = json.loads((folder / "registers.json").read_bytes())
    assert registers["panicked_cpu"] == 1
    # rip is the 17th register; prstatus_note counts up from its first.
    assert [int(cpu["registers"]["rip"], 16) for cpu in registers["cpus"]] == [1016, 2016]
    assert [cpu["pid"] for cpu in registers["cpus"]] == [7, 0]


def test_the_manifest_says_what_is_there_and_hashlib_agrees(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core(pages=filled("a", ".", ".", "b")))
    manifest = check_manifest(save(source, parent).directory)
    assert manifest["complete"] is True
    assert manifest["failures"] == []
    assert manifest["source"] == source
    kernel = manifest["kernel"]
    assert (kernel["release"], kernel["host"], kernel["machine"]) == ("6.1.0-test", "db7", "x86_64")
    assert datetime.fromisoformat(kernel["crash_time"]) == datetime.fromtimestamp(1_700_000_000, UTC)
    assert kernel["panic"] == PANIC.decode()
    assert (kernel["cpus"], manifest["panicked_cpu"]) == (2, 1)
    dump = manifest["dump"]
    assert (dump["file"], dump["whole"], dump["missing"]) == ("vmcore", True, None)
    assert dump["level"] == 1
    assert dump["unreadable_pages"] == dump["source_bytes_missing"] == 0
    assert set(manifest["seconds"]) == set(FILES) - {"manifest.json"}


def test_the_manifest_counts_pages(vmcore_file: WriteFile, parent: Path) -> None:
    core = crashed_core(pages=filled("a", ".", ".", "b") + os.urandom(2 * PAGE))
    dump = check_manifest(save(vmcore_file(core), parent).directory)["dump"]
    pages = ElfPages(core).pages()
    assert dump["pages"] == dump["pages_written"] == len(pages)
    assert dump["zero_pages"] == sum(not any(page) for page in pages.values())
    assert dump["raw_pages"] == 2  # what os.urandom gives does not shrink


def test_a_big_dump_has_a_digest_for_every_64_mib(tmp_path: Path, parent: Path) -> None:
    source = sparse(tmp_path / "big.elf", 70 * MIB)
    folder = save(str(source), parent, compression="none", level=0).directory
    manifest = check_manifest(folder)
    assert manifest["hash_block"] == 64 * MIB
    assert len(manifest["files"]["vmcore"]["sha256_blocks"]) == 2


def test_what_was_said_is_in_the_capture_log(vmcore_file: WriteFile, parent: Path, run: Run) -> None:
    ran = run("save", "--source", vmcore_file(crashed_core()), parent)
    log = (the_directory(parent) / "capture-log.txt").read_text()
    said = ran.err.replace("vmcapture: ", "")
    assert log
    assert said.startswith(log)
    assert "messages of the capture kernel" not in log  # the running kernel is not a capture kernel


def test_the_running_kernels_messages_are_numbered_by_time() -> None:
    messages = job.kernel_messages()
    if not messages:
        pytest.skip("/dev/kmsg is not ours to read")
    assert all(re.match(rb"\[ *\d+\.\d{6}\] .*\n\Z", line) for line in messages)


def test_a_real_vmcore_is_saved_whole(corpus_vmcore: Path, parent: Path) -> None:
    saved = save(str(corpus_vmcore), parent)
    assert job.exit_status(saved) == 0
    manifest = manifest_of(saved.directory)
    assert "sysrq triggered crash" in manifest["kernel"]["panic"]
    assert listing(saved.directory) == set(FILES)
    assert (saved.directory / "vmcore-dmesg.txt").read_text().count("Kernel panic - not syncing") >= 1


# --- order, modes, names


def test_what_is_small_comes_first_and_each_file_is_on_the_disk_before_the_next_is_made(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched at the system calls: open for creation, fsync or fdatasync, rename."""
    events: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real_open, real_rename = os.open, os.rename
    syncs = {name: getattr(os, name) for name in ("fsync", "fdatasync")}

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        fd = real_open(path, flags, *arguments, **options)
        names[fd] = Path(os.fsdecode(path)).name
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            events.append(("create", names[fd]))
        return fd

    def synced(name: str) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            syncs[name](fd)
            events.append(("sync", names[fd]))

        return sync

    def renamed(source: Any, target: Any, **options: Any) -> None:
        real_rename(source, target, **options)
        events.append(("rename", Path(target).name))

    source = vmcore_file(crashed_core())
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "rename", renamed)
    for name in syncs:
        monkeypatch.setattr(os, name, synced(name))
    folder = save(source, parent).directory
    monkeypatch.undo()

    created = [name for what, name in events if what == "create"]
    assert created == [f"{name}.incomplete" for name in FILES]
    for name, following in zip(created, [*created[1:], None], strict=True):
        start = events.index(("create", name))
        end = events.index(("create", following)) if following else len(events)
        assert ("sync", name) in events[start:end], f"{name} itself"
        named = events.index(("rename", name.removesuffix(".incomplete")))
        assert ("sync", name) in events[start:named], f"{name} before it has its name"
        assert ("sync", folder.name) in events[named:end], f"the name of {name}"
    assert events[0] == ("sync", parent.name), "the directory's own name"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777], ids=oct)
def test_nobody_else_can_read_what_was_saved_whatever_the_umask(
    mask: int, vmcore_file: WriteFile, parent: Path
) -> None:
    source = vmcore_file(crashed_core())
    parent.mkdir(parents=True)
    with umask(mask):
        folder = save(source, parent).directory
    assert oct(stat.S_IMODE(folder.stat().st_mode)) == "0o700"
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()} == {"0o600"}


def test_the_same_crash_saved_again_gets_a_directory_of_its_own(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core())
    first = save(source, parent)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.directory.iterdir()}
    second = save(source, parent, compression="none")
    third = save(source, parent)
    assert len({first.directory, second.directory, third.directory}) == 3
    assert all(saved.directory.name.startswith(f"db7-{WHEN}") for saved in (first, second, third))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.directory.iterdir()} == before
    for saved in (second, third):
        assert check_manifest(saved.directory)["complete"]


# Killed at every step: tests/lab. What is left then, and whose it is:


def test_a_save_that_was_killed_before_it_said_what_it_has_goes_on_there(vmcore_file: WriteFile, parent: Path) -> None:
    """The dump is whole and has its name; capture log and manifest are not there."""
    source = vmcore_file(crashed_core())
    first = save(source, parent).directory
    pages = read_dump(first / "vmcore")
    for name in ("capture-log.txt", "manifest.json"):
        (first / name).unlink()
    second = save(source, parent)
    assert second.directory == first
    assert read_dump(first / "vmcore") == pages
    assert check_manifest(first)["complete"]
    assert listing(first) == set(FILES)


@pytest.mark.parametrize("done", [(), ("vmcore-dmesg.txt",), ("vmcore-dmesg.txt", "registers.txt")])
def test_a_save_that_was_killed_before_its_dump_goes_on_there(
    done: tuple[str, ...], vmcore_file: WriteFile, parent: Path
) -> None:
    source = vmcore_file(crashed_core())
    first = save(source, parent).directory
    for path in first.iterdir():
        if path.name not in done:
            path.unlink()
    kept = {name: (first / name).stat().st_ino for name in done}
    assert save(source, parent).directory == first
    assert check_manifest(first)["complete"]
    assert listing(first) == set(FILES)
    assert {name: (first / name).stat().st_ino for name in done} == kept


@pytest.mark.parametrize("left", [("vmcore-dmesg.txt",), ("vmcore-dmesg.txt", "vmcore")])
def test_what_another_crash_of_the_same_name_left_is_not_gone_on_with(
    left: tuple[str, ...], vmcore_file: WriteFile, parent: Path
) -> None:
    """A clock that stands: host and second are the same."""
    other = PrintkRing().add(b"Linux version 6.1.0-test").add(PANIC).add(b"and more")
    first = save(vmcore_file(crashed_core(log=other, keys={"NUMBER(other)": 1})), parent).directory
    for path in first.iterdir():
        if path.name not in left:
            path.unlink()
    before = {path: path.read_bytes() for path in first.iterdir()}
    assert save(vmcore_file(crashed_core()), parent).directory != first
    assert {path: path.read_bytes() for path in first.iterdir()} == before


def test_a_file_or_dangling_link_of_that_name_is_left_alone(
    vmcore_file: WriteFile, parent: Path, tmp_path: Path
) -> None:
    parent.mkdir(parents=True)
    (parent / f"db7-{WHEN}").write_text("mine")
    (parent / f"db7-{WHEN}-1").symlink_to(tmp_path / "elsewhere")
    folder = save(vmcore_file(crashed_core()), parent).directory
    assert folder.name == f"db7-{WHEN}-2"
    assert (parent / f"db7-{WHEN}").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_kernel_that_does_not_know_when_it_crashed_is_filed_under_now(vmcore_file: WriteFile, parent: Path) -> None:
    folder = save(vmcore_file(crashed_core(drop=("CRASHTIME",))), parent).directory
    when = datetime.strptime(folder.name.removeprefix("db7-"), "%Y-%m-%d-%H:%M:%S").replace(tzinfo=UTC)
    assert abs(when.timestamp() - time.time()) < 60
    assert manifest_of(folder)["kernel"]["crash_time"] is None


HOSTS = {
    "a path out": b"../../etc", "an absolute path": b"/etc/passwd", "dots": b"..", "dot": b".", "slashes": b"////",
    "escape sequence": b"\x1b[2J\x07", "newline": b"a\nb", "not UTF-8": b"\xff\xfe\x80", "no end": b"h" * 65,
    "an option": b"-rf", "home": b"~", "format": b"%s%n{0}", "spaces": b" a b ", "unicode": "ü‮ñ".encode(),
    "nothing": b"", "none": b"(none)", "shell": b"$(reboot);`x`&|",
}  # fmt: skip


def names_that_stay_inside(parent: Path, saved: job.SaveReport) -> None:
    folder = saved.directory
    assert folder.parent == parent
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-2023-11-14-22:13:20(-\d+)?", folder.name)
    assert len(folder.name) < 128
    assert folder.is_dir()
    assert not folder.is_symlink()


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_hostile_host_name_stays_inside_the_directory(host: bytes, vmcore_file: WriteFile, parent: Path) -> None:
    saved = save(vmcore_file(crashed_core(host)), parent)
    names_that_stay_inside(parent, saved)
    assert listing(parent) == {saved.directory.name}
    assert listing(parent.parent) == {parent.name}
    assert job.exit_status(saved) == 0
    said = manifest_of(saved.directory)["kernel"]["host"]
    assert said.isprintable()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=65))
@example(b"..\0/x")
def test_no_host_name_is_too_strange(tmp_path: Path, host: bytes) -> None:
    (tmp_path / "any.elf").write_bytes(crashed_core(host))
    saved = save(str(tmp_path / "any.elf"), tmp_path / "crash")
    names_that_stay_inside(tmp_path / "crash", saved)
    assert listing(tmp_path) == {"any.elf", "crash"}
    assert manifest_of(saved.directory)["complete"] is True


# --- each step on its own


def test_without_printk_keys_everything_but_the_log_is_saved(vmcore_file: WriteFile, parent: Path, run: Run) -> None:
    core = crashed_core(drop=("SYMBOL(prb)",))
    ran = run("save", "--source", vmcore_file(core), parent)
    assert ran.status == 3
    folder = the_directory(parent)
    assert listing(folder) == set(FILES) - {"vmcore-dmesg.txt"}
    manifest = check_manifest(folder)
    assert manifest["complete"] is False
    (failure,) = manifest["failures"]
    assert failure.startswith("vmcore-dmesg.txt: ")
    assert failure in (folder / "capture-log.txt").read_text()
    assert read_dump(folder / "vmcore") == (False, ElfPages(core).pages(), 0)
    assert len(json.loads((folder / "registers.json").read_bytes())["cpus"]) == 2


def test_without_any_notes_the_memory_is_saved_and_what_is_missing_is_said(
    vmcore_file: WriteFile, parent: Path, run: Run
) -> None:
    core = crashed_core(notes=False)
    ran = run("save", "--source", vmcore_file(core), parent)
    assert ran.status == 3
    folder = the_directory(parent)
    assert folder.name.startswith("localhost-2")
    assert read_dump(folder / "vmcore") == (False, ElfPages(core).pages(), 0)
    manifest = check_manifest(folder)
    assert any("VMCOREINFO" in problem for problem in manifest["problems"])
    assert manifest["kernel"]["cpus"] == 0
    assert "no CPU" in (folder / "registers.txt").read_text()


def test_of_a_truncated_vmcore_everything_that_is_left_is_saved(vmcore_file: WriteFile, parent: Path, run: Run) -> None:
    core = crashed_core(pages=filled("a", "b", "c", "d"))
    ran = run("save", "--source", vmcore_file(core[: -2 * PAGE - 100]), parent)
    assert ran.status == 3
    folder = the_directory(parent)
    manifest = check_manifest(folder)
    assert manifest["complete"] is False
    assert manifest["dump"]["source_bytes_missing"] == 2 * PAGE + 100
    (dump,) = [name for name in listing(folder) if name.startswith("vmcore") and not name.endswith(".txt")]
    incomplete, pages, _ = read_dump(folder / dump)
    assert incomplete
    expected = ElfPages(core).pages()
    first = MEMORY_AT // PAGE
    assert {pfn: page for pfn, page in pages.items() if pfn <= first} == {
        pfn: page for pfn, page in expected.items() if pfn <= first
    }
    assert "vmcore-dmesg.txt" in listing(folder)


def test_pages_that_cannot_be_read_are_zeros_and_named(vmcore_file: WriteFile, parent: Path) -> None:
    core = crashed_core(pages=numbered(0, 20))
    start = len(core) - 20 * PAGE
    bad = {MEMORY_AT // PAGE + number for number in (5, 6)}
    for number in (5, 6):
        assert core[start + number * PAGE :].startswith(struct.pack("<Q", number))
    vmcore = open_poisoned(vmcore_file(core), range(start + 5 * PAGE + 10, start + 7 * PAGE - 10))
    saved = job.save(vmcore, parent, dump_options(), Console(file=io.StringIO()))
    assert job.exit_status(saved) == 3
    manifest = check_manifest(saved.directory)
    assert manifest["complete"] is False
    assert manifest["dump"]["unreadable_pages"] == 2
    assert manifest["dump"]["unreadable_pfn_ranges"] == [[min(bad), max(bad)]]
    assert "2 pages unreadable" in manifest["dump"]["missing"]
    incomplete, pages, missing = read_dump(saved.directory / manifest["dump"]["file"])
    assert incomplete
    assert missing == 0
    assert pages == {**ElfPages(core).pages(), **dict.fromkeys(bad, bytes(PAGE))}


@pytest.mark.parametrize("number", [errno.EIO, errno.EFAULT, errno.EPERM], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("level", [0, 1])
def test_faults_at_a_hundred_places_are_named_exactly(
    number: int, mapped: bool, level: int, vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single pages and ranges; by a mapping that faults, or where nothing can be mapped; and what is left is right."""
    core = crashed_core(pages=numbered(0, 600))
    start = len(core) - 600 * PAGE
    some = random.Random(number + level)
    bad = set(some.sample(range(600), 60)) | set(range(300, 340))
    first = MEMORY_AT // PAGE
    real_map, real_read = Source.map, Source.read

    def check(offset: int, length: int) -> None:
        low, high = (offset - start) // PAGE, -((start - offset - length) // PAGE)
        if any(page in bad for page in range(max(low, 0), high)):
            raise OSError(number, os.strerror(number))

    def map_it(source: Source, offset: int, length: int) -> memoryview | None:
        check(offset, length)
        return real_map(source, offset, length) if mapped else None

    def read_it(source: Source, offset: int, length: int) -> bytes:
        check(offset, length)
        return real_read(source, offset, length)

    monkeypatch.setattr(Source, "map", map_it)
    monkeypatch.setattr(Source, "read", read_it)
    saved = save(vmcore_file(core), parent, level=level)
    assert (job.exit_status(saved), saved.failures) == (3, [])
    dump = check_manifest(saved.directory)["dump"]
    ranges = dump["unreadable_pfn_ranges"]
    assert {pfn for low, high in ranges for pfn in range(low, high + 1)} == {first + page for page in bad}
    assert ranges == sorted(ranges)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(ranges))
    assert dump["unreadable_pages"] == dump["unreadable_pages_listed"] == len(bad)
    pages = {**ElfPages(core).pages(), **{first + page: bytes(PAGE) for page in bad}}
    assert read_dump(saved.directory / "vmcore") == (True, pages, 0)
    with KdumpFile(saved.directory / "vmcore") as file:
        told = verify(file, None, progress=False)
    assert (told.unreadable, told.damaged, told.exit_status) == (len(bad), 0, 3)


def test_pages_that_can_be_read_again_are_saved_when_a_save_goes_on(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = crashed_core(pages=numbered(0, 40))
    name, start = vmcore_file(core), len(core) - 40 * PAGE
    with file_size_limit(30 * PAGE), monkeypatch.context() as patch:
        patch.setattr(image_module, "CHUNK_PAGES", 2)
        vmcore = open_poisoned(name, range(start + 5 * PAGE, start + 7 * PAGE))
        job.save(vmcore, parent, dump_options(compression="none"), Console(file=io.StringIO()))
    with KdumpFile(the_directory(parent) / "vmcore.incomplete") as file:
        assert verify(file, None, progress=False).unreadable == 2
    again = save(name, parent, compression="none")
    assert (job.exit_status(again), again.failures) == (0, [])
    assert read_dump(the_directory(parent) / "vmcore") == (False, ElfPages(core).pages(), 0)


def test_a_log_that_lies_in_unreadable_memory_costs_the_log_only(vmcore_file: WriteFile, parent: Path) -> None:
    core = crashed_core()
    ring = struct.unpack_from("<Q", core, 64 + 56 + 8)[0]  # p_offset of the first PT_LOAD
    vmcore = open_poisoned(vmcore_file(core), range(ring, ring + 1))
    saved = job.save(vmcore, parent, dump_options(), Console(file=io.StringIO()))
    assert [failure.split(":")[0] for failure in saved.failures] == ["vmcore-dmesg.txt"]
    assert set(FILES) - listing(saved.directory) == {"vmcore-dmesg.txt"}
    assert check_manifest(saved.directory)["dump"]["unreadable_pfn_ranges"] == [[RING_AT // PAGE] * 2]


@pytest.mark.parametrize("broken", ["open_log", "registers_text", "registers_json", "describe"])
def test_a_bug_in_one_step_does_not_cost_the_others(
    broken: str, vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {
        "open_log": "vmcore-dmesg.txt",
        "registers_text": "registers.txt",
        "registers_json": "registers.json",
        "describe": "manifest.json",
    }[broken]

    monkeypatch.setattr(report, broken, raising(ZeroDivisionError("a bug")))
    saved = save(vmcore_file(crashed_core()), parent)
    assert job.exit_status(saved) == 3
    assert set(FILES) - listing(saved.directory) == {lost}
    (failure,) = saved.failures
    assert failure == f"{lost}: internal error: ZeroDivisionError: a bug"


# --- targets that do not do their part


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(bytes)``: an empty file system of that size."""
    with ExitStack() as stack:
        yield lambda size: stack.enter_context(tmpfs(tmp_path / "disk", f"size={size}", lazy=False))


@pytest.mark.parametrize("room", [1 * MIB, 5 * MIB, 9 * MIB, 14 * MIB, 22 * MIB], ids=lambda n: f"{n >> 10}k")
def test_on_a_full_disk_the_log_the_registers_and_part_of_the_dump_are_kept(
    room: int, vmcore_file: WriteFile, small_disk: Callable[[int], Path], run: Run
) -> None:
    core = crashed_core(pages=os.urandom(24 * MIB))
    disk = small_disk(room)
    ran = run("save", "--no-progress", "--source", vmcore_file(core), disk)
    assert ran.status == 3
    folder = the_directory(disk)
    assert set(FILES) - listing(folder) == {"vmcore"}
    manifest = check_manifest(folder)
    assert manifest["complete"] is False
    (failure,) = manifest["failures"]
    assert failure.startswith("vmcore: ")
    assert "no room" in failure
    assert PANIC.decode() in (folder / "vmcore-dmesg.txt").read_text()
    incomplete, pages, missing = read_dump(folder / "vmcore.incomplete")
    assert incomplete
    expected = ElfPages(core).pages()
    assert len(pages) + missing == len(expected)
    assert {pfn: expected[pfn] for pfn in pages} == pages
    assert manifest["dump"]["file"] == "vmcore.incomplete"
    assert manifest["dump"]["whole"] is False
    assert manifest["dump"]["pages_written"] == len(pages)
    assert len(pages) * PAGE >= room - 10 * MIB  # two chunks and a little more


def test_a_disk_too_small_for_the_dumps_own_tables_keeps_the_rest(
    vmcore_file: WriteFile, small_disk: Callable[[int], Path], run: Run
) -> None:
    """6000 descriptors are 144 KiB; without a page of memory there is no use in an unfinished dump."""
    disk = small_disk(64 << 10)
    ran = run("save", "--no-progress", "--source", vmcore_file(crashed_core(pages=numbered(0, 6000))), disk)
    assert ran.status == 3
    folder = the_directory(disk)
    assert listing(folder) == set(FILES) - {"vmcore"}
    manifest = check_manifest(folder)
    assert manifest["dump"] is None
    assert "no room" in manifest["failures"][0]


def test_a_disk_without_any_room_is_a_target_that_cannot_be_written(
    vmcore_file: WriteFile, small_disk: Callable[[int], Path], run: Run
) -> None:
    """Not a byte was saved: status 3 (saved, readable, not whole) would be untrue."""
    disk = small_disk(16 << 10)
    (disk / "ballast").write_bytes(b"x" * (16 << 10))
    ran = run("save", "--source", vmcore_file(crashed_core()), disk)
    assert ran.status == 5
    assert "no room" in ran.err


def test_a_read_only_target_is_refused_in_one_line(
    vmcore_file: WriteFile, small_disk: Callable[[int], Path], run: Run
) -> None:
    disk = small_disk(MIB)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ran = run("save", "--source", vmcore_file(crashed_core()), disk / "crash")
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert ran.err.startswith(f"vmcapture: {disk}/crash: ")
    assert "read-write" in ran.err


def test_directories_that_cannot_be_synced_cost_nothing_but_are_named(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EINVAL, os.strerror(errno.EINVAL))))
    core = crashed_core()
    saved = save(vmcore_file(core), parent)
    assert job.exit_status(saved) == 3
    assert listing(saved.directory) == set(FILES)
    manifest = check_manifest(saved.directory)
    assert manifest["dump"]["whole"] is True
    assert read_dump(saved.directory / "vmcore") == (False, ElfPages(core).pages(), 0)
    names = ["crash", "var", parent.parent.parent.name, *FILES[:-1]]
    assert [failure.split(":")[0] for failure in manifest["failures"]] == names
    assert all("syncing the directory failed" in failure for failure in manifest["failures"])


def test_a_dump_that_cannot_be_named_is_listed_under_the_name_that_it_has(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = crashed_core()
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == "vmcore":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        saved = save(vmcore_file(core), parent)
    assert job.exit_status(saved) == 3
    manifest = check_manifest(saved.directory)
    assert (manifest["dump"]["file"], manifest["dump"]["whole"]) == ("vmcore.incomplete", True)
    assert [failure.split(":")[0] for failure in manifest["failures"]] == ["vmcore"]
    assert read_dump(saved.directory / "vmcore.incomplete") == (False, ElfPages(core).pages(), 0)
    assert save(vmcore_file(core), parent).directory == saved.directory, "and gets its name the next time"
    assert "vmcore" in listing(saved.directory)


def test_a_log_that_cannot_be_written_is_read_all_the_same_for_who_panicked(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refused(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if Path(os.fsdecode(path)).name.startswith("vmcore-dmesg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        saved = save(vmcore_file(crashed_core()), parent)
    manifest = check_manifest(saved.directory)
    assert (manifest["panicked_cpu"], manifest["kernel"]["panic"]) == (1, PANIC.decode())
    assert "panicked" in (saved.directory / "registers.txt").read_text()


def test_directories_that_had_to_be_made_are_on_the_disk_before_the_first_file(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def sync(path: Path) -> None:
        synced.append(path)
        sync_directory(path)

    monkeypatch.setattr(job, "sync_directory", sync)
    folder = save(vmcore_file(crashed_core()), parent).directory
    assert synced[:4] == [parent, parent.parent, parent.parent.parent, folder]


def test_a_file_system_with_modes_of_its_own_is_saved_to(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, raising(OSError(errno.EPERM, os.strerror(errno.EPERM))))
    assert job.exit_status(save(vmcore_file(crashed_core()), parent)) == 0


# --- a save that was cut short, and is asked for again


def cut_short(source: str, parent: Path) -> Path:
    """The directory of a save that had no room for all of its dump."""
    with file_size_limit(20 * PAGE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "CHUNK_PAGES", 2)
        assert save(source, parent).failures
    folder = the_directory(parent)
    assert "vmcore.incomplete" in listing(folder)
    return folder


def test_a_save_goes_on_where_it_was_cut_short(vmcore_file: WriteFile, parent: Path, run: Run) -> None:
    core = crashed_core(pages=filled("a", "b") + os.urandom(30 * PAGE))
    source = vmcore_file(core)
    folder = cut_short(source, parent)
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    assert manifest_of(folder)["complete"] is False

    ran = run("save", "-d", "1", "--source", source, parent)

    assert ran.status == 0
    assert f"saving to {folder}, where it was cut short before" in ran.err
    assert "pages (level 1) are there already; going on" in ran.err
    assert the_directory(parent) == folder
    assert listing(folder) == {*FILES, "capture-log-2.txt"}
    for name in ("vmcore-dmesg.txt", "registers.txt", "registers.json", "capture-log.txt"):
        assert (folder / name).read_bytes() == before[name][0]
    assert (folder / "vmcore").stat().st_ino == before["vmcore.incomplete"][1]
    assert read_dump(folder / "vmcore") == (False, ElfPages(core).pages(), 0)
    manifest = manifest_of(folder)
    assert manifest["complete"] is True
    assert manifest["kernel"]["panic"] == PANIC.decode()
    assert set(manifest["files"]) == set(FILES) - {"capture-log.txt", "manifest.json"} | {"capture-log-2.txt"}
    for name, said in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (said["size"], said["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    dump = manifest["dump"]
    assert 0 < dump["pages_found"] < dump["pages"] == dump["pages_written"]
    assert "going on" in (folder / "capture-log-2.txt").read_text()


def test_a_save_that_was_killed_before_its_log_was_whole_goes_on(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    folder = cut_short(source, parent)
    for name in ("manifest.json", "capture-log.txt", "registers.json"):
        (folder / name).unlink()
    save(source, parent)
    assert listing(folder) == set(FILES)
    assert check_manifest(folder)["complete"] is True


def test_a_log_that_found_no_room_has_no_name_and_is_written_anew(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has its name is whole: a save that goes on can tell by that."""
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    expected = (save(source, parent / "whole").directory / "vmcore-dmesg.txt").read_bytes()
    real = os.pwritev

    def full(fd: int, pieces: Any, offset: int) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if offset > {"vmcore-dmesg.txt.incomplete": 0, "vmcore.incomplete": 20 * PAGE}.get(name, 1 << 40):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, pieces, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        patch.setattr(job, "_WRITE_SIZE", 64)
        patch.setattr(image_module, "CHUNK_PAGES", 2)
        folder = save(source, parent / "cut").directory
    assert [failure.split(":")[0] for failure in manifest_of(folder)["failures"]] == ["vmcore-dmesg.txt", "vmcore"]
    partly = (folder / "vmcore-dmesg.txt.incomplete").read_bytes()
    assert expected.startswith(partly)
    assert 0 < len(partly) < len(expected)
    assert set(FILES) - listing(folder) == {"vmcore-dmesg.txt", "vmcore"}
    assert save(source, parent / "cut").directory == folder
    assert listing(folder) == {*FILES, "capture-log-2.txt"}
    assert (folder / "vmcore-dmesg.txt").read_bytes() == expected


def test_while_a_save_goes_on_there_is_no_manifest_of_the_one_before(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names a dump with a size and hashes that are not true any more."""
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    folder = cut_short(source, parent)
    assert "manifest.json" in listing(folder)
    seen: list[set[str]] = []

    def look(*_arguments: object) -> None:
        seen.append(listing(folder))
        raise TargetError("seen")

    monkeypatch.setattr(dump, "write_dump", look)
    save(source, parent)
    assert ["manifest.json" in names for names in seen] == [False]
    assert "vmcore.incomplete" in seen[0]
    assert manifest_of(folder)["complete"] is False


def test_a_dump_that_cannot_be_gone_on_with_is_listed_as_it_is(
    vmcore_file: WriteFile, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    folder = cut_short(source, parent)
    before = (folder / "vmcore.incomplete").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        saved = save(source, parent)
    assert job.exit_status(saved) == 3
    manifest = manifest_of(folder)
    assert manifest["files"]["vmcore.incomplete"]["sha256"] == hashlib.sha256(before).hexdigest()
    assert "cannot be noted" in manifest["failures"][0]
    assert (folder / "vmcore.incomplete").read_bytes() == before


def test_another_crash_does_not_go_on_there(vmcore_file: WriteFile, parent: Path) -> None:
    pages = os.urandom(30 * PAGE)
    folder = cut_short(vmcore_file(crashed_core(pages=pages)), parent)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    # The same host in the same second; another kernel.
    again = save(vmcore_file(crashed_core(pages=pages, keys={"BUILD-ID": "5eed"})), parent).directory
    assert again.name == f"{folder.name}-1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_goes_on_where_those_before_it_were_removed(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    folder = cut_short(source, parent)
    later = folder.rename(parent / f"{folder.name}-7")
    (parent / f"{folder.name}-5").symlink_to(later)
    assert save(source, parent).directory == later
    assert listing(later) == {*FILES, "capture-log-2.txt"}


def test_a_number_is_higher_than_all_that_are_there(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core())
    first = save(source, parent).directory
    for taken, number in (("3", 4), ("99", 100), ("0100", 101), ("10000", 102), ("9998", 9999)):
        (parent / f"{first.name}-{taken}").touch()
        assert save(source, parent).directory.name == f"{first.name}-{number}"
    with pytest.raises(TargetError, match="times already"):
        save(source, parent)


def test_a_finished_save_is_not_gone_on_with(vmcore_file: WriteFile, parent: Path) -> None:
    source = vmcore_file(crashed_core())
    first = save(source, parent).directory
    assert save(source, parent).directory.name == f"{first.name}-1"


def test_a_link_in_place_of_the_directory_is_not_followed(vmcore_file: WriteFile, parent: Path, tmp_path: Path) -> None:
    source = vmcore_file(crashed_core(pages=os.urandom(30 * PAGE)))
    folder = cut_short(source, parent)
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert save(source, parent).directory.name == f"{folder.name}-1"


def test_missing_parents_are_made(vmcore_file: WriteFile, tmp_path: Path) -> None:
    saved = save(vmcore_file(crashed_core()), tmp_path / "a/b/c")
    assert saved.directory.parent == tmp_path / "a/b/c"
    assert job.exit_status(saved) == 0


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_target_is_refused_and_left_alone(
    name: str, vmcore_file: WriteFile, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "file").write_text("mine")
    ran = run("save", "--source", vmcore_file(crashed_core()), tmp_path / name)
    assert (ran.status, ran.out) == (5, "")
    assert ran.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    assert "--force" not in ran.err, "save has no such option"


@pytest.mark.parametrize("arguments", [("-d", "32"), ("-d", "1,x"), ("-c", "lzo"), ("-c", "zstd:99")], ids=" ".join)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], vmcore_file: WriteFile, parent: Path, run: Run
) -> None:
    ran = run("save", *arguments, "--source", vmcore_file(crashed_core()), parent)
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert not parent.exists()


# --- as a process


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "capture", *map(str, arguments)], cwd=REPOSITORY, text=True, **options
    )


@pytest.fixture
def endless_core(tmp_path: Path) -> Path:
    """A vmcore of 4 GiB that takes no room: a log, registers, and one sparse segment."""
    return sparse(tmp_path / "sparse.elf", 4 << 30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_save_leaves_a_readable_directory_and_says_so_in_one_line(
    number: signal.Signals, endless_core: Path, parent: Path
) -> None:
    process = start(
        "save", "--no-progress", "-d", "0", "-c", "zlib", "--source", endless_core, parent, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 30
        growing = "*/vmcore.incomplete"
        while not any(path.stat().st_blocks * 512 > 25 * MIB for path in parent.glob(growing)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (3, 130)
    lines = said.splitlines()
    assert all(line.startswith("vmcapture: ") for line in lines), said
    folder = the_directory(parent)
    assert set(FILES) - listing(folder) == {"vmcore"}
    manifest = manifest_of(folder)
    assert manifest["complete"] is False
    (failure,) = manifest["failures"]
    assert failure == "vmcore: interrupted"
    assert sum("not whole: interrupted" in line for line in lines) == 1
    with (folder / "vmcore.incomplete").open("rb") as file:
        header = file.read(PAGE)
    assert header.startswith(b"KDUMP   ")
    assert struct.unpack_from("<I", header, STATUS)[0] & INCOMPLETE
    assert 0 < manifest["dump"]["pages_written"] < manifest["dump"]["pages"]
    assert (
        hashlib.sha256((folder / "vmcore-dmesg.txt").read_bytes()).hexdigest()
        == (manifest["files"]["vmcore-dmesg.txt"]["sha256"])
    )


def test_a_reader_that_goes_away_does_not_stop_the_save(vmcore_file: WriteFile, parent: Path) -> None:
    """``vmcapture save DIR 2>&1 | head -1``; a console that hung up is the same."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("save", "--source", vmcore_file(crashed_core()), parent, stderr=writer, stdout=writer)
    os.close(writer)
    status = process.wait(timeout=30)
    folder = the_directory(parent)
    assert listing(folder) == set(FILES)
    assert check_manifest(folder)["complete"] is True
    assert status == 0


def test_a_kernel_without_a_console_is_saved_all_the_same(vmcore_file: WriteFile, parent: Path) -> None:
    """Where /dev/console cannot be opened, init starts with no descriptor 0, 1 or 2."""
    command = 'exec "$0" -m capture save --source "$1" "$2" <&- >&- 2>&-'
    source = vmcore_file(crashed_core())
    status = subprocess.run(
        ["sh", "-c", command, sys.executable, source, parent], cwd=REPOSITORY, check=False, timeout=30
    ).returncode
    folder = the_directory(parent)
    assert listing(folder) == set(FILES)
    assert check_manifest(folder)["failures"] == []
    assert status == 0


def test_a_simple_vmcore_without_names_is_filed_under_localhost(vmcore_file: WriteFile, parent: Path) -> None:
    saved = save(vmcore_file(simple_core("a")), parent)
    assert saved.directory.name == f"localhost-{WHEN}"
