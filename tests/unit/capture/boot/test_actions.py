"""Reboot, power off, halt: the numbers that the kernel knows. Nothing here reaches reboot(2)."""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from capture.boot import actions
from capture.boot.config import ACTIONS
from capture.console import Console
from capture.errors import CaptureError
from tests.faults import raising

KERNEL_HEADER = Path("/usr/include/linux/reboot.h")
GLIBC_HEADERS = "**/sys/reboot.h"

NAMES = {
    "reboot": ("LINUX_REBOOT_CMD_RESTART", "RB_AUTOBOOT", 0x01234567),
    "halt": ("LINUX_REBOOT_CMD_HALT", "RB_HALT_SYSTEM", 0xCDEF0123),
    "poweroff": ("LINUX_REBOOT_CMD_POWER_OFF", "RB_POWER_OFF", 0x4321FEDC),
}
"""Action → its name in the kernel, its name in glibc, its number in reboot(2)."""


def defines(header: Path) -> dict[str, int]:
    found = re.findall(r"^#define\s+(\w+)\s+(0[xX][0-9a-fA-F]+)\b", header.read_text(), re.MULTILINE)
    return {name: int(value, 16) for name, value in found}


def test_there_is_a_number_for_every_action_but_the_shell() -> None:
    assert set(actions._COMMANDS) == set(ACTIONS) - {"shell"}


@pytest.mark.parametrize("action", NAMES)
def test_the_numbers_are_those_of_the_manual(action: str) -> None:
    assert actions._COMMANDS[action] == NAMES[action][2]


@pytest.mark.parametrize("action", NAMES)
def test_the_numbers_are_those_of_the_kernel_header(action: str) -> None:
    if not KERNEL_HEADER.exists():
        pytest.skip(f"{KERNEL_HEADER} is not there (linux-libc-dev)")
    assert actions._COMMANDS[action] == defines(KERNEL_HEADER)[NAMES[action][0]]


@pytest.mark.parametrize("action", NAMES)
def test_the_numbers_are_those_of_glibc(action: str) -> None:
    header = next(Path("/usr/include").glob(GLIBC_HEADERS), None)
    if header is None:
        pytest.skip("sys/reboot.h is not there (libc6-dev)")
    assert actions._COMMANDS[action] == defines(header)[NAMES[action][1]]


class _Libc:
    """Stands in for the C library: notes what it is asked for and refuses."""

    asked: list[Any] = []  # noqa: RUF012

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def prctl(self, *_arguments: int) -> int:
        return 0

    def reboot(self, command: Any) -> int:
        self.asked.append(command)
        ctypes.set_errno(1)
        return -1


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[_Libc]:
    """Neither the C library nor sync(2) is reached; what is synced is noted in ``synced``, by whatever process."""
    _Libc.asked = []
    note = os.open(tmp_path / "synced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    monkeypatch.setattr(ctypes, "CDLL", _Libc)
    monkeypatch.setattr(os, "sync", lambda: os.write(note, b"sync"))
    return _Libc


def test_a_shell_is_simply_going_on(harmless: type[_Libc], tmp_path: Path, console: Console) -> None:
    actions.perform("shell", console)
    assert harmless.asked == []
    assert (tmp_path / "synced").read_bytes() == b""


def test_a_disk_that_hangs_does_not_keep_the_machine(
    harmless: type[_Libc], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(actions, "SYNC_LIMIT", 1)
    monkeypatch.setattr(os, "sync", lambda: time.sleep(600))
    monkeypatch.setattr(harmless, "syscall", lambda *_: -1, raising=False)
    with pytest.raises(CaptureError, match="reboot was refused"):
        actions.perform("reboot", console)
    assert "did not sync in 1 s" in console.lines[-1]


def test_a_machine_without_room_for_a_process_leaves_all_the_same(
    harmless: type[_Libc], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(os, "fork", raising(OSError(12, "Cannot allocate memory")))
    with pytest.raises(CaptureError, match="reboot was refused"):
        actions.perform("reboot", console)
    assert len(harmless.asked) == 1
    assert console.lines == ["the disks were not synced: Cannot allocate memory"]


@pytest.mark.parametrize("action", NAMES)
def test_disks_are_synced_then_the_kernel_is_asked_with_a_c_int(
    action: str, harmless: type[_Libc], tmp_path: Path, console: Console
) -> None:
    """``int reboot(int)``: the number above 2^31 goes over as the same 32 bits. Run without the right to reboot."""
    child = os.fork()
    if not child:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            effective = int(
                re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)[0], 16
            )
            if effective == 0:  # never without this
                try:
                    actions.perform(action, console)
                except CaptureError as error:
                    (command,) = harmless.asked
                    good = isinstance(command, ctypes.c_int)
                    good &= command.value % (1 << 32) == NAMES[action][2]
                    status = 0 if good and str(error).startswith(f"{action} was refused: ") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "synced").read_bytes() == b"sync"
