"""A guest runs to its end, or is ended; whatever it does, there is a line and no QEMU left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from initramfs import qemu, tools
from initramfs.errors import MeasureError, ToolError
from initramfs.qemu import Deadline, Guest

GUEST = Guest(Path("/k, with a comma"), Path("/i"), "console=ttyS0 a=b", Path('/d,x"y'), 1 << 30, 2)


def fake(tmp_path: Path, script: str) -> list[str]:
    """A program that leaves its process id behind, and does what the script says."""
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
    program.chmod(0o755)
    return [str(program)]


def gone(tmp_path: Path) -> bool:
    try:
        os.kill(int((tmp_path / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_what_a_guest_printed_is_returned_and_kept(tmp_path: Path) -> None:
    log = tmp_path / "console.log"

    said = qemu.run(fake(tmp_path, r"printf 'one\r\ntwo \377\n'"), log, Deadline(10))

    assert said == "one\ntwo \ufffd\n"
    assert log.read_bytes() == b"one\r\ntwo \xff\n"


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo first >&2; echo 'no such machine' >&2; exit 1", "qemu failed with status 1: no such machine"),
        ("kill -KILL $$", "qemu was killed by signal 9: it said nothing"),
    ],
)
def test_a_qemu_that_fails_is_a_line(tmp_path: Path, script: str, line: str) -> None:
    with pytest.raises(ToolError, match=f"{line}$"):
        qemu.run(fake(tmp_path, script), tmp_path / "console.log", Deadline(10))


def test_a_qemu_that_cannot_be_started_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot run /nowhere/qemu: No such file"):
        qemu.run(["/nowhere/qemu"], tmp_path / "console.log", Deadline(10))


def test_a_guest_that_hangs_is_ended_at_the_deadline(tmp_path: Path) -> None:
    deadline = Deadline(0.5)

    said = qemu.run(fake(tmp_path, "echo booting; exec sleep 60"), tmp_path / "console.log", deadline)

    assert said == "booting\n"
    assert deadline.left == 0
    assert gone(tmp_path)


def test_a_guest_that_waits_for_a_person_is_ended_at_once(tmp_path: Path) -> None:
    deadline = Deadline(60)

    said = qemu.run(fake(tmp_path, "printf 'prompt# '; exec sleep 60"), tmp_path / "log", deadline, hopeless="prompt# ")

    assert said == "prompt# "
    assert deadline.left > 30
    assert gone(tmp_path)


@pytest.mark.parametrize(("script", "finished"), [("exec sleep 60", False), ("echo up; sleep 1; echo done", True)])
def test_a_guest_has_to_come_up_in_time(tmp_path: Path, script: str, finished: bool) -> None:
    said = qemu.run(fake(tmp_path, script), tmp_path / "log", Deadline(60), up=("up", Deadline(0.5)))

    assert ("done" in said) == finished
    assert gone(tmp_path)


def test_no_qemu_is_left_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            os.sched_yield()
        raise KeyboardInterrupt

    words = fake(tmp_path, "exec sleep 60")
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qemu.run(words, tmp_path / "console.log", Deadline(60))
    assert gone(tmp_path)


def test_the_command_line_survives_any_path() -> None:
    words = qemu.command(Path("/usr/bin/qemu"), GUEST, "tcg")

    assert words[words.index("-kernel") + 1] == "/k, with a comma"
    assert words[words.index("-append") + 1] == "console=ttyS0 a=b"
    assert words[words.index("-m") + 1] == "1024M"
    assert words[words.index("-smp") + 1] == "2"
    assert words[words.index("-accel") + 1] == "tcg"
    assert json.loads(words[words.index("-blockdev") + 1])["file"]["filename"] == '/d,x"y'


def test_kvm_is_tried_where_it_may_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "KVM", tmp_path / "kvm")
    assert qemu.accelerators() == ("tcg",)
    (tmp_path / "kvm").touch()
    assert qemu.accelerators() == ("kvm", "tcg")


def test_another_machine_than_was_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "MACHINE", "aarch64")
    with pytest.raises(MeasureError, match="on x86_64 only, this is aarch64"):
        qemu.find()


def test_a_missing_qemu_is_said_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "MACHINE", "x86_64")
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="qemu-system-x86_64 was not found: install qemu-system-x86"):
        qemu.find()


def test_a_guest_leaves_the_host_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.footprint.memory", lambda _: 1 << 30)
    with pytest.raises(MeasureError, match="1536 MiB of memory, 1024 MiB are available"):
        qemu.check_memory(1 << 30)
    qemu.check_memory(512 << 20)
    monkeypatch.setattr("capture.footprint.memory", lambda _: None)
    qemu.check_memory(1 << 40)
