"""What is armed, fed and disarmed: sysfs and the devices are files here, which keep what is written to them.

That a file takes no ioctl is one of the cases; real devices are in tests/guest/test_watchdog.py.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from capture.boot import watchdog
from capture.boot.watchdog import available, open_watchdogs
from capture.console import Console


class Machine:
    """A /sys/class/watchdog and a /dev that a test fills."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev = root / "sys", root / "dev"
        self.sys.mkdir()
        self.dev.mkdir()

    def add(self, name: str, identity: str = "iTCO_wdt", state: str = "inactive") -> Path:
        (self.sys / name).mkdir()
        (self.sys / name / "identity").write_text(f"{identity}\n")
        (self.sys / name / "state").write_text(f"{state}\n")
        device = self.dev / name
        device.touch()
        return device


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(watchdog, "SYS", made.sys)
    monkeypatch.setattr(watchdog, "DEV", made.dev)
    return made


def test_nobody_asked_so_none_is_touched(machine: Machine, console: Console) -> None:
    device = machine.add("watchdog0")
    with open_watchdogs(0, console) as dog:
        dog.feed()
        dog.settle("shell")
        assert dog.armed == ()
    assert device.read_bytes() == b""
    assert console.lines == []


def test_each_is_armed_fed_and_disarmed_for_a_person(machine: Machine, console: Console) -> None:
    devices = [machine.add("watchdog0"), machine.add("watchdog1", "hpwdt")]
    with open_watchdogs(60, console) as dog:
        assert dog.armed == ("watchdog0", "watchdog1")
        dog.feed()
        dog.feed()
        dog.settle("shell")
        dog.feed()
    assert [device.read_bytes() for device in devices] == [b"\0\0V"] * 2
    assert console.lines == [
        "watchdog0 (iTCO_wdt) resets the machine after a time of its own without progress",
        "watchdog1 (hpwdt) resets the machine after a time of its own without progress",
    ]


@pytest.mark.parametrize("action", ["reboot", "poweroff"])
def test_a_reboot_that_hangs_is_cut_too(action: str, machine: Machine, console: Console) -> None:
    device = machine.add("watchdog0")
    with open_watchdogs(60, console) as dog:
        dog.settle(action)
        assert dog.armed == ("watchdog0",)
    assert device.read_bytes() == b"\0"


@pytest.mark.parametrize(("action", "said"), [("halt", 1), ("shell", 0)])
def test_what_cannot_be_disarmed_is_said_where_nobody_will_feed_it(
    action: str, said: int, machine: Machine, console: Console
) -> None:
    device = machine.add("watchdog0", state="active")
    open_watchdogs(60, console).settle(action)
    assert device.read_bytes() == b"V"
    assert [line.startswith("watchdog0 cannot be disarmed (nowayout): ") for line in console.lines[1:]] == [True] * said


@pytest.mark.usefixtures("machine")
def test_a_machine_without_a_watchdog_is_told_so_and_saves(console: Console) -> None:
    with open_watchdogs(60, console) as dog:
        dog.feed()
    (line,) = console.lines
    assert line.startswith("vmcapture.watchdog=60: this kernel has no watchdog; ")


def test_one_that_cannot_be_opened_costs_a_line_and_not_the_others(machine: Machine, console: Console) -> None:
    machine.add("watchdog0").unlink()
    other = machine.add("watchdog1")
    with open_watchdogs(60, console) as dog:
        dog.feed()
    assert other.read_bytes() == b"\0"
    assert console.lines[0] == "watchdog0 cannot be opened (No such file or directory): going on without it"


def test_one_that_can_no_longer_be_fed_is_said_once(machine: Machine, console: Console) -> None:
    machine.add("watchdog0").unlink()
    (machine.dev / "watchdog0").symlink_to("/dev/full")
    with open_watchdogs(60, console) as dog:
        dog.feed()
        dog.feed()
    assert console.lines[1:] == ["watchdog0 cannot be fed (No space left on device): it may reset the machine"]


def test_software_is_for_machines_that_have_no_other(machine: Machine) -> None:
    machine.add("watchdog0", "Software Watchdog")
    assert available() == ["watchdog0"]
    machine.add("watchdog1")
    assert available() == ["watchdog1"]


def test_a_driver_that_sysfs_does_not_list_has_the_oldest_name(machine: Machine) -> None:
    (machine.dev / "watchdog").touch()
    assert available() == ["watchdog"]
    machine.add("watchdog1")
    assert available() == ["watchdog1", "watchdog"]
    machine.add("watchdog0")  # then /dev/watchdog is another name for it
    assert available() == ["watchdog0", "watchdog1"]


def test_a_child_that_lets_go_leaves_its_parents_armed_and_fed(machine: Machine, console: Console) -> None:
    device = machine.add("watchdog0")
    with open_watchdogs(60, console) as dog:
        child = os.fork()
        if not child:
            dog.let_go()
            dog.feed()
            os._exit(len(dog.armed))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        dog.feed()
    assert device.read_bytes() == b"\0"


def test_on_a_console_that_is_gone_it_is_fed_all_the_same(machine: Machine) -> None:
    closed = io.StringIO()
    closed.close()
    device = machine.add("watchdog0")
    with open_watchdogs(60, Console(file=closed)) as dog:
        dog.feed()
    assert device.read_bytes() == b"\0"


def test_a_real_one_is_told_its_time(console: Console) -> None:
    """softdog, where this machine has it (modprobe softdog) and nobody uses it."""
    names = [name for name in available() if watchdog._attribute(name, "identity") == watchdog.SOFTWARE]
    if not names or any(map(watchdog.is_active, names)) or os.geteuid() != 0:
        pytest.skip("no idle softdog on this machine, or no root")
    with open_watchdogs(60, console) as dog:
        dog.feed()
        assert watchdog.is_active(names[0])
        dog.settle("shell")
    assert not watchdog.is_active(names[0])
    assert console.lines == [f"{names[0]} (Software Watchdog) resets the machine after 60 s without progress"]
