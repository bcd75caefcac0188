"""Room on the target: which crashes go after a save, and everything that has to stay."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.boot import job, mounting, room, save, targets
from capture.boot.config import BootConfig, parse
from capture.boot.room import Floor, make_room, parse_floor
from capture.console import Console
from capture.errors import UsageError
from capture.memory import image as image_module
from capture.vmcore import open_vmcore
from tests.builders import PAGE, crashed_core
from tests.faults import file_size_limit, raising, tmpfs
from tests.outcome import FILES, WHEN, check_manifest, dump_options, listing, manifest_of

WriteFile = Callable[[bytes], str]

MIB = 1 << 20
FIRST = 1_700_000_000
"""When the kernels of ``builders`` crash, seconds since 1970."""


def name_of(when: int, host: str = "db7") -> str:
    return f"{host}-{datetime.fromtimestamp(FIRST + when, UTC):%Y-%m-%d-%H:%M:%S}"


def crash_at(when: int, pages: bytes = b"", host: bytes = b"db7", **more: Any) -> bytes:
    """The vmcore of a kernel that crashed ``when`` seconds after the first one."""
    return crashed_core(host, pages=pages, keys={"CRASHTIME": str(FIRST + when)}, **more)


def older(parent: Path, when: int, *, files: tuple[str, ...] = FILES, host: str = "db7", number: str = "") -> Path:
    """A directory as a save of ours leaves it, but that only the manifest's first lines are true."""
    folder = parent / (name_of(when, host) + number)
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b'{\n "format": 1,\n "written_by": "vmcapture 0.1.0",' if "json" in name else b"x")
    return folder


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 32 MiB that is the target, always mounted."""
    with tmpfs(tmp_path / "disk", "size=32m", lazy=False) as root:

        @contextmanager
        def mounted(*_arguments: Any) -> Iterator[Path]:
            yield root

        monkeypatch.setattr(save, "mounted_target", mounted)
        yield root


def run(source: str, words: str, console: Console, **options: Any) -> job.SaveReport:
    """Save to the disk, as the words on the kernel's command line ask for."""
    boot = parse(f"vmcapture.target=LABEL=x vmcapture.path=/crash {words}")
    assert boot.problems == ()
    return save.save_to_target(boot, "LABEL=x", console, dump_options(**options), source)


def pruned(parent: Path, words: str, console: Console, *, saved: Path | None = None) -> list[str]:
    """Make room after the crash ``saved``, by default one of 90 seconds after the first; return what was said."""
    boot = parse(words)
    make_room(saved or older(parent, 90), boot.keep, boot.free, console)
    return console.lines


# --- ten crashes in a row


def test_of_ten_crashes_in_a_row_the_newest_three_are_kept_whole(
    vmcore_file: WriteFile, disk: Path, console: Console
) -> None:
    for number in range(10):
        saved = run(vmcore_file(crash_at(number, os.urandom(MIB))), "vmcapture.keep=3", console)
        assert job.exit_status(saved) == 0
        assert listing(disk / "crash") == {name_of(when) for when in range(max(0, number - 2), number + 1)}
    for folder in (disk / "crash").iterdir():
        assert listing(folder) == set(FILES)
        assert check_manifest(folder)["complete"]
    removed = [line for line in console.lines if line.startswith("removed ")]
    assert [line.split()[1] for line in removed] == [name_of(number) for number in range(7)]
    assert all(line.endswith("MiB): vmcapture.keep=3") for line in removed)


@pytest.mark.parametrize(("words", "floor"), [("vmcapture.free=12M", 12 * MIB), ("vmcapture.free=50%", 16 * MIB)])
def test_a_crash_loop_leaves_room_on_the_disk(
    words: str, floor: int, vmcore_file: WriteFile, disk: Path, console: Console
) -> None:
    """A dump has 5 MiB here, and no ten of them fit."""
    for number in range(10):
        saved = run(vmcore_file(crash_at(number, os.urandom(5 * MIB))), words, console, level=0)
        assert job.exit_status(saved) == 0
        volume = os.statvfs(disk)
        assert volume.f_bavail * volume.f_frsize >= floor
    left = sorted(listing(disk / "crash"))
    kept = (32 * MIB - floor) // (5 * MIB + 128 * 1024)
    assert left == [name_of(number) for number in range(10 - kept, 10)], "as many as there is room for"
    for folder in (disk / "crash").iterdir():
        assert check_manifest(folder)["complete"]
    assert console.lines[-1].startswith(f"removed {name_of(9 - kept)} (5.")
    assert f"vmcapture.free= wants {floor >> 20}.0 MiB left, " in console.lines[-1]


def test_without_the_words_ten_crashes_stay(vmcore_file: WriteFile, disk: Path, console: Console) -> None:
    for number in range(10):
        run(vmcore_file(crash_at(number)), "", console)
    assert listing(disk / "crash") == {name_of(number) for number in range(10)}
    assert not [line for line in console.lines if "removed" in line]


def test_a_loop_of_the_same_second_is_numbered_and_pruned_by_number(
    vmcore_file: WriteFile, disk: Path, console: Console
) -> None:
    source = vmcore_file(crash_at(0))
    for _ in range(12):
        run(source, "vmcapture.keep=4", console)
    assert listing(disk / "crash") == {f"db7-{WHEN}-{number}" for number in (8, 9, 10, 11)}
    run(source, "vmcapture.keep=1", console)
    assert listing(disk / "crash") == {f"db7-{WHEN}-12"}


def test_both_words_together_both_hold(vmcore_file: WriteFile, disk: Path, console: Console) -> None:
    for number in range(4):
        run(vmcore_file(crash_at(number, os.urandom(5 * MIB))), "", console, level=0)
    run(vmcore_file(crash_at(4, os.urandom(5 * MIB))), "vmcapture.keep=4 vmcapture.free=20M", console, level=0)
    assert listing(disk / "crash") == {name_of(number) for number in (3, 4)}
    first, *others = [line for line in console.lines if line.startswith("removed ")]
    assert first.endswith("vmcapture.keep=4")
    assert all("vmcapture.free= wants 20.0 MiB left" in line for line in others)


def test_a_crash_with_everything_that_a_save_may_leave_goes_whole(
    vmcore_file: WriteFile, disk: Path, console: Console
) -> None:
    """One that was cut short and gone on with has a second log."""
    source = vmcore_file(crash_at(0, os.urandom(30 * PAGE)))
    cut_short(source, console)
    assert job.exit_status(run(source, "vmcapture.keep=1", console)) == 0
    assert "capture-log-2.txt" in listing(disk / "crash" / name_of(0))
    run(vmcore_file(crash_at(1)), "vmcapture.keep=1", console)
    assert listing(disk / "crash") == {name_of(1)}


# --- only after success


def cut_short(source: str, console: Console, words: str = "vmcapture.keep=1 vmcapture.free=99%") -> job.SaveReport:
    """A save whose dump finds no more room."""
    with file_size_limit(20 * PAGE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "CHUNK_PAGES", 2)
        saved = run(source, words, console)
    assert job.exit_status(saved) == 3
    return saved


def test_a_save_that_was_cut_short_removes_nothing(vmcore_file: WriteFile, disk: Path, console: Console) -> None:
    for number in range(3):
        run(vmcore_file(crash_at(number)), "", console)
    cut_short(vmcore_file(crash_at(3, os.urandom(30 * PAGE))), console)
    assert listing(disk / "crash") == {name_of(number) for number in range(4)}
    assert "vmcore.incomplete" in listing(disk / "crash" / name_of(3))
    assert not [line for line in console.lines if "removed" in line]


@pytest.mark.parametrize("lost", ["open_log", "registers_text", "describe"])
def test_a_save_that_lacks_a_file_removes_nothing(
    lost: str, vmcore_file: WriteFile, disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(vmcore_file(crash_at(0)), "", console)
    monkeypatch.setattr(f"capture.report.{lost}", raising(ZeroDivisionError("a bug")))
    saved = run(vmcore_file(crash_at(1)), "vmcapture.keep=1", console)
    assert job.exit_status(saved) == 3
    assert listing(disk / "crash") == {name_of(0), name_of(1)}


def test_an_old_crash_that_was_cut_short_counts_and_goes_like_others(
    vmcore_file: WriteFile, disk: Path, console: Console
) -> None:
    cut_short(vmcore_file(crash_at(0, os.urandom(30 * PAGE))), console)
    run(vmcore_file(crash_at(1)), "", console)
    cut_short(vmcore_file(crash_at(2, os.urandom(30 * PAGE))), console)
    run(vmcore_file(crash_at(3)), "vmcapture.keep=3", console)
    assert listing(disk / "crash") == {name_of(number) for number in (1, 2, 3)}
    run(vmcore_file(crash_at(4)), "vmcapture.keep=2", console)
    assert listing(disk / "crash") == {name_of(number) for number in (3, 4)}


def test_all_of_a_crash_is_on_the_disk_before_an_older_one_is_touched(
    vmcore_file: WriteFile, disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(vmcore_file(crash_at(0)), "", console)
    events: list[str] = []
    real_unlink, real_fsync = os.unlink, os.fsync

    def unlink(path: Any, **options: Any) -> None:
        if not events or events[-1] != "unlink":
            events.append("unlink")
            assert check_manifest(disk / "crash" / name_of(1))["complete"]
        real_unlink(path, **options)

    def fsync(fd: int) -> None:
        real_fsync(fd)
        events.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().name}")

    source = vmcore_file(crash_at(1))
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "fsync", fsync)
    run(source, "vmcapture.keep=1", console)
    assert events[-3:] == [f"sync {name_of(1)}", "unlink", "sync crash"]
    assert events.count("unlink") == 1


# --- whose crashes, and which are the oldest


def test_the_time_in_the_name_tells_the_age(tmp_path: Path, console: Console) -> None:
    for when in (50, 10, 30):  # not in the order in which they were made
        older(tmp_path, when)
    pruned(tmp_path, "vmcapture.keep=3", console)
    assert listing(tmp_path) == {name_of(when) for when in (30, 50, 90)}


def test_a_crash_that_seems_to_be_the_oldest_stays_when_it_is_the_one_just_saved(
    tmp_path: Path, console: Console
) -> None:
    """The clock of a machine without a battery begins in 1970."""
    for when in (10, 20, 30):
        older(tmp_path, when)
    pruned(tmp_path, "vmcapture.keep=2 vmcapture.free=0", console, saved=older(tmp_path, -FIRST))
    assert listing(tmp_path) == {"db7-1970-01-01-00:00:00", name_of(30)}


def test_another_hosts_crashes_are_not_ours_to_remove(disk: Path, console: Console) -> None:
    for host in ("db", "db7-a", "a-db7", "db71", "DB7", "db7-2023-11-14", "localhost"):
        older(disk, 1, host=host)
        older(disk, 2, host=host)
    others = listing(disk)
    older(disk, 3)
    said = pruned(disk, "vmcapture.keep=1 vmcapture.free=31M", console)
    assert listing(disk) == {*others, name_of(90)}
    assert len(said) == 1, "and the floor is there all the same"


def test_a_floor_that_the_other_hosts_crashes_stand_in_the_way_of_is_said(
    disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", raising(AssertionError("there is nothing to wait for")))
    other = older(disk, 1, host="web1")
    (other / "vmcore").write_bytes(bytes(8 * MIB))
    older(disk, 2)
    first, second = pruned(disk, "vmcapture.free=31M", console)
    assert first.startswith(f"removed {name_of(2)} ")
    assert second.endswith("are left, vmcapture.free= wants 31.0 MiB: no older crash of this host is left")
    assert listing(disk) == {other.name, name_of(90)}


def test_a_floor_larger_than_the_disk_costs_nothing(disk: Path, console: Console) -> None:
    older(disk, 1)
    (said,) = pruned(disk, "vmcapture.free=33M", console)
    assert said == "vmcapture.free= wants 33.0 MiB of 32.0 MiB left: nothing was removed for it"
    assert listing(disk) == {name_of(1), name_of(90)}


def test_names_are_read_as_a_save_makes_them(vmcore_file: WriteFile, disk: Path, console: Console) -> None:
    for host in (b"a-1.example.com", b"h" * 65, b"x-2023-11-14-22:13:20", b"\xff", b"(none)"):
        for number in range(2):
            saved = run(vmcore_file(crash_at(number, host=host)), "vmcapture.keep=1", console)
        assert listing(disk / "crash") == {saved.directory.name}
        shutil.rmtree(disk / "crash")


# --- what is not of our making


STRANGERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no time": ("db7", FILES), "kdump-tools": ("202311142213", ("dump.202311142213", "dmesg.202311142213")),
    "kdump-utils": (name_of(1), ("vmcore", "vmcore-dmesg.txt", "kexec-dmesg.log")), "no files": (name_of(1), ()),
    "a log alone": (name_of(1), ("vmcore-dmesg.txt", "capture-log.txt")),
    "something behind the name": (name_of(1) + ".old", FILES), "number 0": (name_of(1) + "-0", FILES),
    "number 10000": (name_of(1) + "-10000", FILES), "number 01": (name_of(1) + "-01", FILES),
    "no such day": ("db7-2023-02-30-10:00:00", FILES), "no such hour": ("db7-2023-02-20-25:00:00", FILES),
    "other digits": ("db7-٢٠٢٣-11-14-22:13:20", FILES), "a newline": (name_of(1) + "\n", FILES),
}  # fmt: skip


@pytest.mark.parametrize(("name", "files"), STRANGERS.values(), ids=STRANGERS)
def test_a_strangers_directory_is_neither_counted_nor_touched(
    name: str, files: tuple[str, ...], tmp_path: Path, console: Console
) -> None:
    made = older(tmp_path, 5, files=files)
    made.rename(tmp_path / name)
    older(tmp_path, 50)
    assert pruned(tmp_path, "vmcapture.keep=2 vmcapture.free=0", console) == []
    pruned(tmp_path, "vmcapture.keep=1", console, saved=tmp_path / name_of(90))
    assert listing(tmp_path) == {name, name_of(90)}
    assert listing(tmp_path / name) == set(files)


def test_a_manifest_of_somebody_else_is_no_crash_of_ours(tmp_path: Path, console: Console) -> None:
    folder = older(tmp_path, 1, files=("manifest.json",))
    (folder / "manifest.json").write_text('{"written_by": "backup 1.0"}')
    assert pruned(tmp_path, "vmcapture.keep=1", console) == []
    assert listing(folder) == {"manifest.json"}


def test_a_file_with_the_name_of_a_crash_stays(tmp_path: Path, console: Console) -> None:
    (tmp_path / name_of(1)).write_text("mine")
    os.mkfifo(tmp_path / name_of(2))
    assert pruned(tmp_path, "vmcapture.keep=1", console) == []
    assert listing(tmp_path) == {name_of(1), name_of(2), name_of(90)}


def test_a_link_with_the_name_of_a_crash_is_not_followed(tmp_path: Path, console: Console) -> None:
    elsewhere = older(tmp_path / "elsewhere", 1)
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash" / name_of(1)).symlink_to(elsewhere)
    assert pruned(tmp_path / "crash", "vmcapture.keep=1", console) == []
    assert listing(elsewhere) == set(FILES)
    assert (tmp_path / "crash" / name_of(1)).is_symlink()


def test_strangers_in_a_crash_keep_themselves_and_its_directory(tmp_path: Path, console: Console) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = older(tmp_path, 1)
    (folder / "notes.txt").write_text("why it crashed")
    (folder / "vmcore").unlink()
    (folder / "vmcore").symlink_to(mine)
    (folder / "registers.txt").unlink()
    (folder / "registers.txt").mkdir()
    older(tmp_path, 2)
    first, second = pruned(tmp_path, "vmcapture.keep=1", console)
    assert listing(folder) == {"notes.txt", "vmcore", "registers.txt"}
    assert first.startswith(f"{folder.name}: removed (0.0 MiB) but for ")
    assert first.endswith(" and 2 more, not of vmcapture's making: vmcapture.keep=1")
    assert second.startswith(f"removed {name_of(2)} ")
    assert mine.read_text() == "mine"

    console.lines.clear()
    assert pruned(tmp_path, "vmcapture.keep=1", console, saved=tmp_path / name_of(90)) == [], "said once"


def test_what_a_broken_connection_leaves_behind_on_a_server_goes_too(tmp_path: Path, console: Console) -> None:
    """Seen with sshfs 3.7.3 (libfuse 3.14); fs/nfs/unlink.c makes the other name."""
    folder = older(tmp_path, 1)
    for name in (".fuse_hidden0000000700000002", ".nfs0000000000a1b2c300000001", ".order-x_k3a9qz"):
        (folder / name).write_text("x")
    (line,) = pruned(tmp_path, "vmcapture.keep=1", console)
    assert line.startswith(f"removed {name_of(1)} ")
    assert not folder.exists()


def test_a_file_system_that_is_mounted_there_is_left(tmp_path: Path, console: Console) -> None:
    (tmp_path / "crash" / name_of(1)).mkdir(parents=True)
    with tmpfs(tmp_path / "crash" / name_of(1), "size=1m") as folder:
        (folder / "vmcore.incomplete").write_text("x")
        assert pruned(tmp_path / "crash", "vmcapture.keep=1", console) == []
        assert listing(folder) == {"vmcore.incomplete"}


# --- what goes wrong


def test_a_removal_that_was_begun_is_finished_the_next_time(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has gone when the power fails: the directory is still known as a crash, until only small files are."""
    real = os.unlink
    for files in (FILES, tuple("vmcore.incomplete" if name == "vmcore" else name for name in FILES[:-1])):
        for done in range(len(files)):
            left = iter(range(done))

            def unlink(path: Any, left: Iterator[int] = left, **options: Any) -> None:
                if next(left, None) is None:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)
                real(path, **options)

            folder = older(tmp_path, 1, files=files)
            saved = older(tmp_path, 90)
            with monkeypatch.context() as patch:
                patch.setattr(os, "unlink", unlink)
                said = pruned(tmp_path, "vmcapture.keep=1", console, saved=saved)
            assert said[-1].startswith(f"{folder.name}/")
            assert said[-1].endswith("removing it failed: Input/output error; it is left")
            pruned(tmp_path, "vmcapture.keep=1", console, saved=saved)
            assert listing(tmp_path) == {saved.name}
            shutil.rmtree(saved)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["unlink", "rmdir", "open"])
def test_one_that_cannot_be_removed_costs_a_line_and_the_others_go(
    number: int, call: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = older(tmp_path, 1)
    older(tmp_path, 2)
    saved = older(tmp_path, 90)
    real = getattr(os, call)

    def refused(path: Any, *arguments: Any, **options: Any) -> Any:
        folder = options.get("dir_fd")
        within = "" if folder is None else Path(f"/proc/self/fd/{folder}").readlink().name
        if bad.name in (path, within):
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, refused)
    first, second = pruned(tmp_path, "vmcapture.keep=1", console, saved=saved)
    monkeypatch.undo()
    assert listing(tmp_path) == {bad.name, saved.name}
    assert first.startswith(bad.name)
    assert f" failed: {os.strerror(number)}; it is left" in first
    assert second.startswith(f"removed {name_of(2)}")


def test_a_directory_that_may_not_be_changed_is_left(tmp_path: Path, console: Console) -> None:
    """Who has the right attributes set is stronger than root."""
    bad = older(tmp_path, 1)
    older(tmp_path, 2)
    if subprocess.run(["chattr", "+i", bad / "vmcore"], capture_output=True, check=False).returncode:
        pytest.skip("no file here can be made immutable")
    try:
        first, _second = pruned(tmp_path, "vmcapture.keep=1", console)
    finally:
        subprocess.run(["chattr", "-i", bad / "vmcore"], check=True)
    assert first == f"{bad.name}/vmcore: removing it failed: Operation not permitted; it is left"
    assert listing(tmp_path) == {bad.name, name_of(90)}


def test_a_disk_that_turned_read_only_costs_one_line_and_no_status(
    vmcore_file: WriteFile, disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        run(vmcore_file(crash_at(number)), "", console)
    real = make_room

    def read_only(*arguments: Any) -> None:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        real(*arguments)

    monkeypatch.setattr(room, "make_room", read_only)
    saved = run(vmcore_file(crash_at(4)), "vmcapture.keep=1", console)
    assert job.exit_status(saved) == 0
    assert saved.directory == Path("/crash") / name_of(4)
    said = console.lines[-1]
    assert said.endswith("making room failed: Read-only file system; this crash is saved, older ones are left")
    assert not [line for line in console.lines[:-1] if "Read-only" in line]
    assert listing(disk / "crash") == {name_of(number) for number in range(5)}


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_whatever_happens_there_the_save_has_its_status(
    error: BaseException, vmcore_file: WriteFile, disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(vmcore_file(crash_at(0)), "", console)
    monkeypatch.setattr(os, "rmdir", raising(error))
    saved = run(vmcore_file(crash_at(1)), "vmcapture.keep=1", console)
    assert job.exit_status(saved) == 0
    assert saved.complete
    assert console.lines[-1].startswith("making room")
    assert "this crash is saved" in console.lines[-1]
    assert check_manifest(disk / "crash" / name_of(1))["complete"]


def test_a_crash_that_somebody_else_removes_meanwhile_is_no_failure(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in (1, 2):
        older(tmp_path, when)
    saved = older(tmp_path, 90)
    real = os.unlink

    def unlink(path: Any, **options: Any) -> None:
        shutil.rmtree(tmp_path / name_of(1), ignore_errors=True)
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", lambda path, **_options: subprocess.run(["rm", "-rf", path], check=True))
    monkeypatch.setattr(os, "unlink", unlink)
    (said,) = pruned(tmp_path, "vmcapture.keep=1", console, saved=saved)
    assert said.startswith(f"removed {name_of(2)} ")
    assert listing(tmp_path) == {saved.name}


@pytest.mark.parametrize("instant", ["looked at", "emptied"])
def test_a_directory_that_becomes_a_link_meanwhile_is_not_followed(
    instant: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "crash"
    folder, elsewhere = older(parent, 1), older(tmp_path / "elsewhere", 1)
    saved = older(parent, 90)
    real, turns = os.open, iter(range(1 if instant == "emptied" else 0))

    def swapped(path: Any, *arguments: Any, **options: Any) -> int:
        if path == folder.name and not folder.is_symlink() and next(turns, None) is None:
            folder.rename(tmp_path / "moved")
            folder.symlink_to(elsewhere)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swapped)
    (said,) = pruned(parent, "vmcapture.keep=1", console, saved=saved)
    doing = "looking into it" if instant == "looked at" else "removing it"
    assert said == f"{folder.name}: {doing} failed: Not a directory; it is left"
    assert listing(elsewhere) == listing(tmp_path / "moved") == set(FILES)


def test_a_file_system_that_gives_room_back_later_on_loses_no_crash_more(
    disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in range(4):
        (older(disk, when) / "vmcore").write_bytes(bytes(6 * MIB))
    saved = older(disk, 90)
    stale = [os.statvfs(disk)] * 4
    calls: list[float] = []
    real = os.fstatvfs
    monkeypatch.setattr(os, "fstatvfs", lambda fd: stale.pop() if stale else real(fd))
    monkeypatch.setattr(time, "sleep", calls.append)
    monkeypatch.setattr(os, "sync", lambda: None)
    pruned(disk, "vmcapture.free=10M", console, saved=saved)
    assert listing(disk) == {name_of(when) for when in (1, 2, 3, 90)}
    assert calls


def test_room_that_never_comes_back_is_not_waited_for_without_end(
    disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is open somewhere, or shares its blocks with another."""
    folders = [older(disk, when) for when in range(3)]
    for folder in folders:
        (folder / "vmcore").write_bytes(bytes(6 * MIB))
    calls: list[float] = []
    monkeypatch.setattr(time, "sleep", calls.append)
    monkeypatch.setattr(os, "sync", lambda: None)
    with (folders[0] / "vmcore").open("rb"):
        pruned(disk, "vmcapture.free=18M", console)
    assert listing(disk) == {name_of(when) for when in (2, 90)}
    assert 0 < sum(calls) < 10


def test_room_that_is_held_back_for_root_does_not_count(
    disk: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twentieth of an ext4 file system is; the healthy machine's services cannot use it."""
    for when in range(2):
        (older(disk, when) / "vmcore").write_bytes(bytes(4 * MIB))
    real = os.fstatvfs

    def reserved(fd: int) -> os.statvfs_result:
        found = real(fd)
        return os.statvfs_result((*found[:4], found.f_bavail - 8 * MIB // found.f_frsize, *found[5:]))

    monkeypatch.setattr(os, "fstatvfs", reserved)
    pruned(disk, "vmcapture.free=18M", console)
    assert listing(disk) == {name_of(when) for when in (1, 90)}


def test_a_dump_that_is_linked_elsewhere_gives_no_room(tmp_path: Path, console: Console) -> None:
    folder = older(tmp_path / "crash", 1)
    (folder / "vmcore").write_bytes(bytes(4 * MIB))
    os.link(folder / "vmcore", tmp_path / "mine")
    (said,) = pruned(tmp_path / "crash", "vmcapture.keep=1", console)
    assert said == f"removed {folder.name} (0.0 MiB): vmcapture.keep=1"
    assert (tmp_path / "mine").stat().st_size == 4 * MIB


# --- the words


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("0", Floor()), ("1", Floor(1)), ("500M", Floor(500 * MIB)), ("10G", Floor(10 << 30)), ("1T", Floor(1 << 40)),
        ("4k", Floor(4096)), ("2g", Floor(2 << 30)), ("007K", Floor(7 << 10)), ("0%", Floor()),
        ("5%", Floor(percent=5)), ("99%", Floor(percent=99)),
    ],
)  # fmt: skip
def test_sizes_and_percentages(text: str, floor: Floor) -> None:
    assert parse_floor(text) == floor


@pytest.mark.parametrize(
    "text",
    ["", "G", "%", "-1", "+1", "1.5G", "1e3", "10GB", "10 G", "10GiB", "100%", "1%G", "١٠", "1G\n",
     "9" * 16, "0x10", "5P"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="room is a size"):
        parse_floor(text)


@given(st.integers(0, 10**15 - 1), st.sampled_from([("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40)]))
def test_every_size_is_read_as_it_is_meant(number: int, unit: tuple[str, int]) -> None:
    assert parse_floor(f"{number}{unit[0]}") == parse_floor(f"{number}{unit[0].lower()}") == Floor(number << unit[1])


@given(st.integers(0, 99), st.integers(0, 1 << 60))
def test_a_percentage_is_held_to_the_byte(percent: int, total: int) -> None:
    wanted = parse_floor(f"{percent}%").of(total)
    assert wanted * 100 >= total * percent > (wanted - 1) * 100
    assert wanted <= total


@given(st.one_of(st.text(max_size=20), st.from_regex(r"[0-9]{1,20}[KMGTP%]?[ B]?", fullmatch=True)))
def test_no_size_is_too_strange(text: str) -> None:
    try:
        floor = parse_floor(text)
    except UsageError as error:
        assert str(error).startswith(text)  # noqa: PT017
    else:
        assert floor.size >= 0
        assert 0 <= floor.percent <= 99
        assert text.isascii()


def test_with_a_directory_named_by_hand_nothing_is_removed(
    vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    """It is not the place that the words were said of."""
    for number in range(2):
        with open_vmcore(vmcore_file(crash_at(number))) as vmcore:
            job.save(vmcore, tmp_path / "crash", dump_options(), console)
    assert listing(tmp_path / "crash") == {name_of(0), name_of(1)}


def test_on_a_real_disk_room_is_there_after_it_is_mounted_again(
    loop_disk: tuple[str, str],
    vmcore_file: WriteFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 MiB of ext4, six dumps of 3 MiB."""
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    boot = BootConfig(wait=5, path="/", free=parse_floor("5M"))
    console = Console(file=io.StringIO())
    for number in range(6):
        source = vmcore_file(crash_at(number, os.urandom(3 * MIB)))
        saved = save.save_to_target(boot, f"LABEL={loop_disk[1]}", console, dump_options(level=0), source)
        assert job.exit_status(saved) == 0
        with targets.mounted_target(f"LABEL={loop_disk[1]}", 5, console) as root:
            volume = os.statvfs(root)
            assert volume.f_bavail * volume.f_frsize >= 5 * MIB
            left = listing(root) - {"lost+found"}
            assert left == {name_of(when) for when in range(max(0, number - len(left) + 1), number + 1)}
            assert all(manifest_of(root / name)["complete"] for name in left)
    assert len(left) >= 2
