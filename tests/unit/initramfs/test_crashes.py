"""What is said of saved crashes: of whole ones, of those cut short, and of what only looks like one."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import pytest

from capture.errors import SourceError
from initramfs import crash_view, crashes
from initramfs.crashes import INCOMPLETE, WHOLE, WITHOUT_DUMP, SavedCrash
from initramfs.places import Place
from tests.builders import CPU, PANIC, PrintkRing
from tests.encryption import Key
from tests.saved import FIRST, name_of, save_crash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crash").mkdir()
    return tmp_path / "crash"


def found(folder: Path) -> list[SavedCrash]:
    return crashes.find([Place(folder, str(folder))])


def oops_log() -> PrintkRing:
    """A machine that chats, stumbles, and panics for it."""
    log = PrintkRing()
    for number in range(60):
        log.add(b"chat %d" % number)
    log.add(b"BUG: kernel NULL pointer dereference, address: 0000000000000000", caller=CPU | 1)
    log.add(b"\x1b[2J<evil>", caller=CPU | 1)
    log.add(PANIC, caller=CPU | 1)
    return log.add(b"---[ end Kernel panic - not syncing: x ]---", caller=CPU | 1)


def test_a_whole_crash_is_described(folder: Path) -> None:
    directory = save_crash(folder)
    (crash,) = found(folder)
    assert crash == crashes.describe(directory)
    assert (crash.host, crash.when.timestamp(), crash.state, crash.encrypted) == ("db7", FIRST, WHOLE, False)
    assert (crash.release, crash.machine, crash.level, crash.panicked_cpu) == ("6.1.0-test", "x86_64", 1, 1)
    assert crash.panic == PANIC.decode()
    assert crash.size == sum(path.stat().st_size for path in directory.iterdir())
    assert crash.problems == ()
    json.dumps(crash.values())


def test_the_newest_comes_first_whatever_the_host(folder: Path) -> None:
    for when, host in ((FIRST, b"db7"), (FIRST + 5, b"web1"), (FIRST + 2, b"db7")):
        save_crash(folder, when, host=host)
    names = [crash.directory.name for crash in found(folder)]
    assert names == [name_of(FIRST + 5, "web1"), name_of(FIRST + 2), name_of(FIRST)]


def test_what_was_not_saved_by_us_is_no_crash(folder: Path, tmp_path: Path) -> None:
    (folder / "202311142213").mkdir()
    (folder / "202311142213/dump.202311142213").write_text("of kdump-tools")
    (folder / name_of(FIRST)).mkdir()
    (folder / name_of(FIRST) / "notes.txt").write_text("mine")
    real = save_crash(tmp_path / "elsewhere", FIRST + 1)
    (folder / name_of(FIRST + 1)).symlink_to(real)
    assert found(folder) == []
    assert found(tmp_path / "nothing here") == []


def test_a_crash_that_the_disk_does_not_give_back_hides_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_crash(folder, FIRST)
    bad = save_crash(folder, FIRST + 1)
    real = os.scandir

    def scandir(path: Path) -> object:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    broken, whole = found(folder)
    assert (broken.directory, broken.state) == (bad, WITHOUT_DUMP)
    assert broken.problems == ("cannot be read: Input/output error",)
    assert whole.state == WHOLE


def test_one_place_under_two_names_is_looked_at_once(folder: Path, tmp_path: Path) -> None:
    save_crash(folder)
    (tmp_path / "again").symlink_to(folder)
    assert len(crashes.find([Place(folder, "a"), Place(tmp_path / "again", "b")])) == 1


def test_a_save_that_was_cut_short_is_said_so_and_why(folder: Path) -> None:
    directory = save_crash(folder)
    (directory / "vmcore").rename(directory / "vmcore.incomplete")
    (directory / "manifest.json").unlink()
    (crash,) = found(folder)
    assert (crash.state, crash.dump) == (INCOMPLETE, directory / "vmcore.incomplete")
    assert crash.panic == PANIC.decode(), "from the log, where there is no manifest"
    assert crash.problems == ("no manifest: the save did not come to its end",)
    (directory / "vmcore.incomplete").unlink()
    assert crashes.describe(directory).state == WITHOUT_DUMP


def test_an_encrypted_crash_tells_what_its_clear_manifest_does(folder: Path, key: Key) -> None:
    save_crash(folder, options={"recipients": key.recipients})
    (crash,) = found(folder)
    assert (crash.state, crash.encrypted, crash.release, crash.panic) == (WHOLE, True, "6.1.0-test", None)
    assert crashes.excerpt(crash) == []
    assert crashes.panicked_registers(crash) is None
    screen = "\n".join(crash_view.screen(crash))
    assert "age -d -i KEY vmcore.flat.age | vmcapture dump - vmcore" in screen
    assert "panic      in vmcore-dmesg.txt.age" in screen


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{", b"null", b"\xff", b'{"kernel": [], "dump": 3, "files": "x", "failures": {}, "complete": 1}',
     b'{"kernel": {"release": 5, "panic": ["x"]}, "failures": [1, null], "panicked_cpu": "1"}', b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_manifest_is_no_reason_to_say_nothing(manifest: bytes, folder: Path) -> None:
    directory = save_crash(folder)
    (directory / "manifest.json").write_bytes(manifest)
    crash = crashes.describe(directory)
    assert crash.state == INCOMPLETE
    assert crash.panic == PANIC.decode()
    assert crash.panicked_cpu is None
    assert crash_view.screen(crash)


def test_nothing_that_is_not_a_regular_file_is_read(folder: Path, tmp_path: Path) -> None:
    directory = save_crash(folder)
    secret = tmp_path / "secret"
    secret.write_text("Kernel panic - not syncing: secret")
    for name in ("vmcore-dmesg.txt", "manifest.json"):
        (directory / name).unlink()
    (directory / "vmcore-dmesg.txt").symlink_to(secret)
    os.mkfifo(directory / "manifest.json")
    crash = crashes.describe(directory)
    assert crash.panic is None
    assert crashes.excerpt(crash) == []


def test_a_directory_with_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a crash that vmcapture saved"):
        crashes.describe(tmp_path)


def test_the_excerpt_begins_where_the_crash_did_and_cannot_harm_a_terminal(folder: Path) -> None:
    crash = crashes.describe(save_crash(folder, log=oops_log()))
    lines = crashes.excerpt(crash)
    assert [line.partition("] ")[2] for line in lines] == [
        "chat 58",
        "chat 59",
        "BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "\\x1b[2J<evil>",
        PANIC.decode(),
        "---[ end Kernel panic - not syncing: x ]---",
    ]


def test_a_log_without_an_announcement_is_shown_from_its_end(folder: Path) -> None:
    directory = save_crash(folder)
    (directory / "vmcore-dmesg.txt").write_text("".join(f"[    0.000000] chat {number}\n" for number in range(50)))
    lines = crashes.excerpt(crashes.describe(directory))
    assert lines == [f"[    0.000000] chat {number}" for number in range(50 - crashes.LINES, 50)]


def test_the_log_is_searched_for_a_text(folder: Path) -> None:
    crash = crashes.describe(save_crash(folder))
    assert crashes.log_has(crash, "Linux version 6.1.0-test")
    assert not crashes.log_has(crash, "Linux version 6.2")


def test_the_screen_has_panic_log_registers_and_how_to_open_it(folder: Path) -> None:
    directory = save_crash(folder, log=oops_log())
    text = "\n".join(crash_view.screen(crashes.describe(directory)))
    assert "crash of db7, 2023-11-14 22:13:20 UTC" in text
    assert f"panic      {PANIC.decode()}" in text
    assert "registers of CPU 1, which panicked" in text
    assert f"  crash /usr/lib/debug/boot/vmlinux-6.1.0-test {shlex.quote(str(directory))}" in text.replace(
        "/vmcore'", "'"
    )
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 250


def test_installed_debug_symbols_are_named(folder: Path, tmp_path: Path) -> None:
    crash = crashes.describe(save_crash(folder))
    fedora = tmp_path / "root/usr/lib/debug/lib/modules/6.1.0-test/vmlinux"
    fedora.parent.mkdir(parents=True)
    assert "are not here" in crash_view.how_to_open(crash, tmp_path / "root")[-1]
    fedora.touch()
    first, second = crash_view.how_to_open(crash, tmp_path / "root")
    assert first.startswith(f"crash {fedora} ")
    assert second.endswith(f" -s {fedora}")


def test_the_list_has_a_line_for_each_below_its_directory(folder: Path, tmp_path: Path) -> None:
    save_crash(folder, log=PrintkRing().add(b"Kernel panic - not syncing: " + b"x" * 200))
    save_crash(tmp_path / "other", FIRST + 1)
    first, row, second, other = crash_view.table(
        crashes.find([Place(folder, "/var/crash"), Place(tmp_path / "other", "UUID=1:/var/crash")])
    )
    assert first.split() == ["UUID=1:/var/crash:", "STATE", "SIZE", "KERNEL", "PANIC"]
    assert row.split()[:2] == [name_of(FIRST + 1), "whole"]
    assert second.startswith("/var/crash: ")
    assert other.endswith("…")
    assert len(other) < 160


def test_how_to_open_what_is_on_a_disk_that_is_not_mounted(folder: Path) -> None:
    save_crash(folder)
    (crash,) = crashes.find([Place(folder, "UUID=1:/var/crash")])
    assert crash_view.how_to_open(crash)[0] == "mount UUID=1, on which it is, and take its path there:"
