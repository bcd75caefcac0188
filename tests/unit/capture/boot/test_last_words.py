"""The console as the last place: the end of the log and the registers. Real crash boots: tests.guest.test_targets."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import job, last_words
from capture.boot.last_words import print_last_words
from capture.console import Console
from tests.builders import PANIC, PrintkRing, crashed_core

WriteFile = Callable[[bytes], str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """``printed(source)``: what is printed of a vmcore; by a process of its own, so through a file."""

    def run(source: str) -> str:
        monkeypatch.setattr(job, "default_source", lambda: source)
        with (tmp_path / "console").open("w", encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stderr", file)
            print_last_words(Console())
        monkeypatch.undo()
        return (tmp_path / "console").read_text(encoding="utf-8")

    return run


def test_the_end_of_the_log_and_the_registers_are_printed(
    printed: Callable[[str], str], vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_words, "LINES", 3)
    log = (
        PrintkRing()
        .add(b"long ago")
        .add(b"not so long ago")
        .add(b"before")
        .add(PANIC, caller=1 << 31 | 1)
        .add(b"after")
    )
    said = printed(vmcore_file(crashed_core(log=log))).splitlines()
    assert said[0] == "vmcapture: no disk took the log; its last 3 lines, and the registers:"
    assert said[1].endswith("before")
    assert said[2].endswith(PANIC.decode())
    assert said[3].endswith("after")
    assert any(line.startswith("CPU 0, running PID") for line in said[4:])
    assert any("<- this CPU panicked" in line for line in said[4:])


def test_a_terminal_does_nothing_of_what_a_dead_kernel_printed(
    printed: Callable[[str], str], vmcore_file: WriteFile
) -> None:
    said = printed(vmcore_file(crashed_core(log=PrintkRing().add(b"\x1b[2J\x07 and \xff\xfe").add(PANIC))))
    assert "\\x1b[2J\\x07 and " in said
    assert all(line.isprintable() for line in said.splitlines())


def test_without_a_log_the_registers_are_there(printed: Callable[[str], str], vmcore_file: WriteFile) -> None:
    said = printed(vmcore_file(crashed_core(drop=("SYMBOL(prb)",))))
    assert "CPU 0, running PID" in said
    assert "Traceback" not in said


def test_a_source_that_is_no_vmcore_is_one_line(printed: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "nothing").write_bytes(b"nothing")
    said = printed(str(tmp_path / "nothing"))
    assert said.count("\n") == 1
    assert said.startswith("vmcapture: last words: ")


def test_where_saves_are_encrypted_nothing_of_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vmcore_file: WriteFile
) -> None:
    (tmp_path / "recipients").write_text("age1...")
    monkeypatch.setattr(last_words, "RECIPIENTS", tmp_path / "recipients")
    source = vmcore_file(crashed_core())
    monkeypatch.setattr(job, "default_source", lambda: source)
    file = io.StringIO()
    print_last_words(Console(file=file))
    assert file.getvalue().count("\n") == 1
    assert "encrypted" in file.getvalue()
