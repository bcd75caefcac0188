"""Each reason why a crash would not be saved is seen, said in a line, and said what to do about."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from capture.errors import CaptureError, UsageError
from initramfs import crash_test, kexec, predict, reach, services, stamp, state, status, watchdogs
from initramfs.cli import main
from initramfs.errors import ImageError, KexecError
from initramfs.image import ImageReport, ImageRequest
from initramfs.kexec import CrashKernel
from initramfs.predict import Prediction
from initramfs.reach import Target
from initramfs.status import BAD, DOUBT, GOOD, Check, Status, Wanted

GIB = 1 << 30
LINE = "console=ttyS0 nr_cpus=1 vmcapture.target=UUID=1 vmcapture.path=/var/crash vmcapture.level=17,31"


class Healthy:
    """A machine that is armed, and all is well; a test breaks one thing of it."""

    def __init__(self, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = machine
        self.request = CrashKernel(machine / "kernel", machine / "image", LINE)
        self.image = ImageRequest(machine / "image", "6.1", machine, ("virtio_blk",), files=(("/x", b"y"),))
        self.target = Target("UUID=1", True, "UUID=1 (/dev/vda1)", free=2 * GIB, total=4 * GIB)
        self.units: set[str] = set()
        monkeypatch.setattr(state, "DIRECTORY", machine / "state")
        monkeypatch.setattr(status, "SYSCTL", machine)
        monkeypatch.setattr(status, "LOCKDOWN", machine / "lockdown")
        monkeypatch.setattr(status, "SECURE_BOOT", machine / "secure_boot")
        monkeypatch.setattr(status, "RECIPIENTS", machine / "recipients")
        monkeypatch.setattr(services, "running", lambda: bool(self.units))
        monkeypatch.setattr(services, "enabled", lambda unit: unit in self.units)
        monkeypatch.setattr(services, "competitors", lambda: sorted(self.units & set(services.COMPETITORS)))
        monkeypatch.setattr(watchdogs, "running", lambda *_: ())
        monkeypatch.setattr(status, "reach", lambda target, _: replace(self.target, target=target))
        monkeypatch.setattr(predict, "predict", lambda level, _: Prediction(level, GIB))
        kexec.load(self.request)
        (machine / "crash_loaded").write_text("1\n")
        self.stamp()

    def stamp(self) -> None:
        stamp.write(self.image, ImageReport(self.image.output, 1, True, "6.1", (), (), 1, (self.folder / "kernel",)))

    def status(self) -> Status:
        return status.status(Wanted(lambda _: self.image, lambda: self.request))

    def check(self, name: str) -> Check:
        (found,) = [check for check in self.status().checks if check.name == name]
        return found


@pytest.fixture
def healthy(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Healthy:
    return Healthy(machine, monkeypatch)


def test_all_is_well(healthy: Healthy) -> None:
    found = healthy.status()
    assert [check for check in found.checks if check.state != GOOD] == []
    assert (found.verdict, found.exit_status) == (GOOD, 0)
    first, *lines = found.lines()
    assert first == "armed: a crash now would be saved"
    assert len(lines) < 16
    assert max(map(len, lines)) < 200
    names = {check.name for check in found.checks}
    assert names == {
        "reservation", "kernel", "image", "target", "room", "encryption", "watchdog", "crashes on", "tested",
    }  # fmt: skip
    values = json.loads(json.dumps(found.values()))
    assert (values["armed"], values["verdict"], values["encrypted"]) == (True, "good", False)
    assert values["predicted"] == {"level": 31, "most": GIB, "method": predict.METHOD}
    assert values["targets"][0]["free"] == 2 * GIB


def broken_reservation(healthy: Healthy) -> None:
    (healthy.folder / "crash_size").write_text("0\n")


def broken_load(healthy: Healthy) -> None:
    (healthy.folder / "crash_loaded").write_text("0\n")


def broken_room(healthy: Healthy) -> None:
    healthy.target = replace(healthy.target, free=GIB // 5)


def broken_target(healthy: Healthy) -> None:
    healthy.target = Target("UUID=1", False, "UUID=1: no block device", "attach it")


def broken_encryption(healthy: Healthy) -> None:
    (healthy.folder / "recipients").touch()


@pytest.mark.parametrize(
    ("breaks", "name", "what", "remedy"),
    [
        (broken_reservation, "reservation", "no memory is reserved", "add crashkernel=256M"),
        (broken_load, "kernel", "no capture kernel is loaded (256 MiB reserved", "run vmcapture arm"),
        (broken_room, "room", "204.8 MiB on UUID=1; a dump of level 31 has at most 1.0 GiB", "make room"),
        (broken_target, "target", "UUID=1: no block device", "attach it"),
        (broken_encryption, "encryption", "off, though there is", "vmcapture arm"),
    ],
)
def test_what_costs_the_crash_is_bad(
    breaks: Callable[[Healthy], None], name: str, what: str, remedy: str, healthy: Healthy
) -> None:
    breaks(healthy)
    check = healthy.check(name)
    assert check.state == BAD
    assert check.what.startswith(what)
    assert check.remedy.startswith(remedy)
    found = healthy.status()
    assert (found.verdict, found.exit_status) == (BAD, 1)
    assert what in found.lines()[0]


def small_reservation(healthy: Healthy) -> None:
    (healthy.folder / "crash_size").write_text(f"{64 << 20}\n")


def foreign_kernel(healthy: Healthy) -> None:
    (healthy.folder / "run/loaded.json").unlink()


def changed_kernel(healthy: Healthy) -> None:
    (healthy.folder / "kernel").write_bytes(b"an update")


def other_line(healthy: Healthy) -> None:
    healthy.units = {services.ARMING}
    healthy.request = replace(healthy.request, command_line=LINE + " vmcapture.keep=3")


def other_image(healthy: Healthy) -> None:
    healthy.image = replace(healthy.image, modules=("nvme",))


def no_stamp(healthy: Healthy) -> None:
    stamp.path_of(healthy.folder / "image").unlink()


def no_image(healthy: Healthy) -> None:
    (healthy.folder / "image").unlink()


def not_enabled(healthy: Healthy) -> None:
    healthy.units = {"ssh.service"}


def competitor(healthy: Healthy) -> None:
    healthy.units = {services.ARMING, "kdump-tools.service"}


def lockdown(healthy: Healthy) -> None:
    (healthy.folder / "lockdown").write_text("none [integrity] confidentiality\n")


def failed_test(healthy: Healthy) -> None:
    made = crash_test.CrashTest("1", 0.0, "boot", "db7", (), False, "nothing of it was found here")
    (healthy.folder / "state").mkdir()
    (healthy.folder / "state/crash-test.json").write_text(json.dumps({**made_values(made)}))


def made_values(made: crash_test.CrashTest) -> dict[str, object]:
    return {name: getattr(made, name) for name in made.__slots__}


@pytest.mark.parametrize(
    ("breaks", "name", "what"),
    [
        (small_reservation, "reservation", "64 MiB reserved for the capture kernel, about 97 MiB are needed"),
        (foreign_kernel, "kernel", "what is loaded was not loaded by vmcapture"),
        (changed_kernel, "kernel", "kernel or image have changed since"),
        (other_line, "kernel", "not as the configuration says now"),
        (other_image, "image", "configuration, target or devices have changed"),
        (no_stamp, "image", "nobody knows what it was made from"),
        (no_image, "image", "gone from the disk"),
        (not_enabled, "service", "vmcapture.service is not enabled"),
        (competitor, "others", "kdump-tools.service loads a capture kernel, too"),
        (lockdown, "secure boot", "Secure Boot off, lockdown integrity"),
        (failed_test, "tested", "nothing of it was found here"),
    ],
)
def test_what_may_cost_it_is_a_doubt(breaks: Callable[[Healthy], None], name: str, what: str, healthy: Healthy) -> None:
    breaks(healthy)
    check = healthy.check(name)
    assert check.state == DOUBT
    assert what in check.what
    assert check.remedy
    found = healthy.status()
    assert (found.verdict, found.exit_status) == (DOUBT, 3)
    assert found.lines()[0].startswith("armed, but doubtful: ")


def test_an_image_made_by_hand_is_a_doubt_that_says_how_to_have_it_made(healthy: Healthy) -> None:
    no_stamp(healthy)
    assert healthy.check("image").line() == (
        f"image        doubt  {healthy.folder}/image: nobody knows what it was made from, nor when it is out of date "
        "(an image made by hand?): let vmcapture arm make it (by dracut or initramfs-tools: image_builder in "
        "/etc/vmcapture.conf)"
    )
    foreign_kernel(healthy)  # loaded by plain kexec
    assert healthy.check("kernel").line() == (
        "kernel       doubt  what is loaded was not loaded by vmcapture, which cannot look into it: vmcapture arm; or "
        "vmcapture load --image IMG, for an image made by hand"
    )


def test_a_full_disk_is_a_doubt_where_the_next_one_has_room(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    kexec.load(replace(healthy.request, command_line=f"{LINE} vmcapture.target=UUID=2"))
    free = {"UUID=1": 0, "UUID=2": GIB}
    monkeypatch.setattr(status, "reach", lambda target, _: Target(target, True, target, free=free[target], total=GIB))
    states = [check.state for check in healthy.status().checks if check.name == "room"]
    assert states == [DOUBT, GOOD]
    free["UUID=2"] = GIB // 8
    states = [check.state for check in healthy.status().checks if check.name == "room"]
    assert states == [BAD, BAD]


@pytest.mark.parametrize("free", [GIB, GIB // 3])
def test_compressed_a_dump_fits_where_it_would_not_as_it_is(free: int, healthy: Healthy) -> None:
    healthy.target = replace(healthy.target, free=free)
    assert healthy.check("room").state == GOOD
    assert ("compressed" in healthy.check("room").what.partition("not compressed)")[2]) is (free < GIB)


def test_where_one_target_is_there_a_missing_one_is_a_doubt(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    kexec.load(replace(healthy.request, command_line=f"{LINE} vmcapture.target=UUID=2"))
    there = {"UUID=1": False, "UUID=2": True}
    monkeypatch.setattr(status, "reach", lambda target, _: Target(target, there[target], target, "attach it"))
    states = [check.state for check in healthy.status().checks if check.name == "target"]
    assert states == [DOUBT, GOOD]
    monkeypatch.setattr(status, "reach", lambda target, _: Target(target, None, target))
    states = [check.state for check in healthy.status().checks if check.name == "target"]
    assert states == [DOUBT, DOUBT], "not tried"


def test_without_a_target_nothing_is_saved(healthy: Healthy) -> None:
    kexec.load(replace(healthy.request, command_line="console=ttyS0"))
    assert healthy.check("target").state == BAD


def test_a_configuration_that_is_wrong_now_is_a_doubt(healthy: Healthy) -> None:
    def fail(error: CaptureError) -> NoReturn:
        raise error

    healthy.units = {services.ARMING}
    found = status.status(
        Wanted(lambda _: fail(ImageError("no such key")), lambda: fail(UsageError("vmcapture.conf:3: typo")))
    )
    checks = {check.name: check for check in found.checks}
    assert checks["image"].what.endswith("; it could not be built again: no such key")
    assert checks["kernel"].what.endswith("; it cannot be loaded again: vmcapture.conf:3: typo")
    assert found.exit_status == 3


def test_secure_boot_is_well_with_the_call_that_works_there(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    (healthy.folder / "secure_boot").write_bytes(b"\6\0\0\0\1")
    assert healthy.check("secure boot").state == DOUBT  # the fixture's kexec takes -c only
    loaded = kexec.loaded()
    assert loaded is not None
    monkeypatch.setattr(kexec, "loaded", lambda: replace(loaded, syscall="file"))
    assert healthy.check("secure boot").state == GOOD
    (healthy.folder / "secure_boot").write_bytes(b"\6\0\0\0\0")
    assert "secure boot" not in {check.name for check in healthy.status().checks}


def test_where_nothing_can_be_loaded_any_more_that_is_said(healthy: Healthy) -> None:
    broken_load(healthy)
    (healthy.folder / "kexec_load_disabled").write_text("1\n")
    assert healthy.check("kexec").remedy == "reboot"


def test_encryption_is_seen(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    (healthy.folder / "recipients").write_text("age1…")
    monkeypatch.setattr(stamp, "RECIPIENTS", healthy.folder / "recipients")
    healthy.image = replace(healthy.image, files=((str(healthy.folder / "recipients"), healthy.folder / "recipients"),))
    healthy.stamp()
    assert healthy.status().encrypted is True
    assert healthy.check("encryption").what.startswith("on: ")


def test_a_watchdog_that_would_not_be_fed_is_a_doubt(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdogs, "doubt", lambda *_: "watchdog0 runs now, and is not used in the capture kernel")
    assert healthy.check("watchdog").state == DOUBT
    assert healthy.status().values()["watchdog"].startswith("watchdog0")
    monkeypatch.setattr(watchdogs, "doubt", lambda *_: None)
    kexec.load(replace(healthy.request, command_line=f"{LINE} vmcapture.watchdog=60"))
    assert healthy.check("watchdog").what == "resets the machine when a save hangs for 60 s"


def test_the_command_prints_one_screen_and_ends_with_the_verdict(
    healthy: Healthy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("initramfs.cli.image_request", lambda *_: healthy.image)
    monkeypatch.setattr("initramfs.cli.crash_kernel", lambda *_: healthy.request)
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("armed: a crash now would be saved\nreservation  good   256 MiB reserved")
    assert main(["status", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    broken_load(healthy)
    assert main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "bad"


def test_a_configuration_that_is_wrong_hides_nothing_else(
    healthy: Healthy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").write_text("no such directive\n")
    options = ("--config", str(tmp_path / "conf"))
    kexec.load(healthy.request)
    assert main(["status", *options, "--prometheus", "-"]) == 0
    assert "\nvmcapture_armed 1\n" in capsys.readouterr().out
    assert main(["test", *options, "--no-guest"]) == 1
    assert re.search(r"^image +bad .*conf:1: no: no such directive", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("words", [["--crash"], ["--crash", "--yes-crash-this-machine"], ["--yes-crash-this-machine"]])
def test_a_machine_that_would_not_save_it_is_not_crashed(
    words: list[str], healthy: Healthy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crash_test, "crash", lambda _: pytest.fail("crashed"))
    broken_load(healthy)
    assert main(["test", *words]) == 2
    assert "not crashed" in capsys.readouterr().err or words == ["--yes-crash-this-machine"]


def test_nobody_at_the_terminal_is_nobody_who_agrees(
    healthy: Healthy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crash_test, "crash", lambda _: pytest.fail("crashed"))
    monkeypatch.setattr("initramfs.cli.image_request", lambda *_: healthy.image)
    monkeypatch.setattr("initramfs.cli.crash_kernel", lambda *_: healthy.request)
    monkeypatch.setattr("sys.stdin", Path(os.devnull).open())  # noqa: SIM115
    assert main(["test", "--crash"]) == 2
    assert "nobody is at the terminal" in capsys.readouterr().err


def test_a_crash_on_purpose_is_remembered_before_it_happens(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initramfs.cli.image_request", lambda *_: healthy.image)
    monkeypatch.setattr("initramfs.cli.crash_kernel", lambda *_: healthy.request)
    monkeypatch.setattr(crash_test, "KMSG", healthy.folder / "kmsg")
    seen: list[crash_test.CrashTest | None] = []
    monkeypatch.setattr(crash_test, "crash", lambda _: seen.append(crash_test.last()))
    assert main(["test", "--crash", "--yes-crash-this-machine"]) == 1, "it came back"
    (made,) = seen
    assert made is not None
    assert made.targets == ("UUID=1",)
    assert abs(made.time - time.time()) < 60
    assert made.id in (healthy.folder / "kmsg").read_text()
    assert "not looked at yet" in healthy.check("tested").what


def test_an_ordinary_user_is_told_that_only_root_sees_it(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KexecError, match="only root can see: use sudo"):
        healthy.status()
    broken_load(healthy)
    assert healthy.status().exit_status == 1


def test_reach_is_what_status_asks(tmp_path: Path) -> None:
    """The fixture replaces it: here is what a machine without such a disk is told."""
    found = reach.reach("UUID=00000000-0000-0000-0000-000000000000", str(tmp_path))
    assert found.reached is False
    assert found.what.endswith(": no block device of this machine carries it now")
