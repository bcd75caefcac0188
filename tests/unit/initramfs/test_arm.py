"""Arming: what is current stays, what is not is built and loaded, and an old image is better than none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from capture.console import Console
from capture.errors import CaptureError, UsageError
from initramfs import arm, kexec
from initramfs.arm import Wanted
from initramfs.cli import main
from initramfs.errors import ImageError, KexecError
from initramfs.kexec import CrashKernel


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    monkeypatch.setattr(arm, "LOCK", tmp_path / "run/arm.lock")
    return Wanted("6.1", tmp_path / "vmlinuz", tmp_path / "image", ("--config", "x"))


class Commands:
    """Stands in for the command line: keeps what it was called with."""

    def __init__(self, **outcomes: int | CaptureError) -> None:
        self.outcomes = outcomes
        self.called: list[list[str]] = []

    def __call__(self, words: Sequence[str]) -> int:
        self.called.append(list(words))
        outcome = self.outcomes.get(words[0], 0)
        if isinstance(outcome, CaptureError):
            raise outcome
        return outcome


def test_both_commands_do_what_is_needed(wanted: Wanted, console: Console) -> None:
    run = Commands()
    assert arm.arm(wanted, run, console) == 0
    build, load = run.called
    assert build == ["initramfs", "--kernel", "6.1", "-o", str(wanted.image), "--if-needed", "--config", "x"]
    assert load == [
        "load", "--kernel-image", str(wanted.kernel), "--image", str(wanted.image), "--if-needed", "--config", "x",
    ]  # fmt: skip


def test_by_force_both_do_it_again(wanted: Wanted, console: Console) -> None:
    run = Commands()
    assert arm.arm(replace(wanted, force=True), run, console) == 0
    assert not [words for words in run.called if "--if-needed" in words]


def test_for_another_kernel_nothing_is_loaded(wanted: Wanted, console: Console) -> None:
    run = Commands()
    assert arm.arm(replace(wanted, load=False), run, console) == 0
    assert [words[0] for words in run.called] == ["initramfs"]


def test_an_image_that_is_there_is_used_when_none_can_be_built(wanted: Wanted, console: Console) -> None:
    run = Commands(initramfs=ImageError("LABEL=x: is it attached?"))
    with pytest.raises(ImageError):
        arm.arm(wanted, run, console)
    wanted.image.touch()
    assert arm.arm(wanted, run, console) == arm.DOUBTFUL
    assert run.called[-1][0] == "load"
    assert console.lines == [f"LABEL=x: is it attached?; the image that is there, {wanted.image}, is used"]
    with pytest.raises(ImageError):
        arm.arm(replace(wanted, load=False), run, console)


def test_a_mistake_in_the_configuration_is_not_passed_over(wanted: Wanted, console: Console) -> None:
    wanted.image.touch()
    run = Commands(initramfs=UsageError("vmcapture.conf:3: no such directive"))
    with pytest.raises(UsageError):
        arm.arm(wanted, run, console)
    assert len(run.called) == 1


def test_a_machine_that_is_not_armed_is_armed_as_before_whatever_is_wrong_now(
    machine: Path, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arm, "LOCK", tmp_path / "run/arm.lock")
    wanted = Wanted("6.1", machine / "kernel", machine / "image")
    line = "console=ttyS0 vmcapture.target=LABEL=x"

    def load(words: Sequence[str]) -> int:
        if words[0] == "load":
            kexec.load(CrashKernel(wanted.kernel, wanted.image, line, "auto"))
        return 0

    said = "vmcapture.conf:3: no such directive"
    wrong = Commands(initramfs=UsageError(said))
    with pytest.raises(UsageError):
        arm.arm(wanted, wrong, console)  # never armed before
    assert arm.arm(wanted, load, console) == 0
    with pytest.raises(UsageError):
        arm.arm(wanted, wrong, console)  # armed
    (machine / "calls").write_text("")
    (machine / "crash_loaded").write_text("0\n")
    kexec.RECORD.unlink()

    assert arm.arm(wanted, wrong, console) == arm.DOUBTFUL
    assert console.lines == [f"{said}; meanwhile the machine is armed as it was the last time"]
    (call,) = (machine / "calls").read_text().splitlines()
    assert call.endswith(f" {wanted.kernel} --initrd={wanted.image} --command-line={line}")

    wanted.image.unlink()
    with pytest.raises(UsageError):
        arm.arm(wanted, wrong, console)


def test_a_machine_that_is_not_armed_is_armed_as_before_while_the_image_is_built(
    machine: Path, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arm, "LOCK", tmp_path / "run/arm.lock")
    wanted = Wanted("6.1", machine / "kernel", machine / "image")
    calls, loaded = machine / "calls", machine / "crash_loaded"
    refused = False

    def run(words: Sequence[str]) -> int:
        said.append(f"{words[0]} {'armed' if kexec.armed() else 'not armed'}")
        if words[0] == "load":
            if refused:
                loaded.write_text("0\n")  # as kexec_file_load does
                raise KexecError("kexec -p -s: refused")
            if not kexec.is_loaded(request := CrashKernel(wanted.kernel, wanted.image, "x")):
                kexec.load(request)
        return 0

    said: list[str] = []
    assert arm.arm(wanted, run, console) == 0
    assert said == ["initramfs not armed", "load not armed"]  # never armed before
    loaded.write_text("0\n")  # a restart
    kexec.RECORD.unlink()
    calls.write_text("")
    said.clear()
    assert arm.arm(wanted, run, console) == 0
    assert said == ["initramfs armed", "load armed"]
    assert len(calls.read_text().splitlines()) == 1, "nothing has changed: it is not loaded a second time"

    loaded.write_text("0\n")
    calls.write_text("")
    refused = True
    assert arm.arm(wanted, run, console) == arm.DOUBTFUL
    assert len(calls.read_text().splitlines()) == 2
    assert kexec.armed()


def test_how_the_machine_was_armed_is_written_down_when_it_is_something_new(
    machine: Path, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arm, "LOCK", tmp_path / "run/arm.lock")
    wanted = Wanted("6.1", machine / "kernel", machine / "image")
    record = arm.before_of(wanted.image)
    (machine / "crash_loaded").write_text("1\n")

    def armed_with(line: str) -> int:
        kexec.load(CrashKernel(wanted.kernel, wanted.image, line, "auto"))
        assert arm.arm(wanted, Commands(), console) == 0
        assert line in record.read_text()
        return record.stat().st_ino  # (a file that is written is a new one)

    first = armed_with("console=ttyS0")
    with record.open():  # its number is not given to another one meanwhile
        assert armed_with("console=ttyS0") == first
        assert armed_with("console=tty0") != first


def test_a_load_that_fails_is_a_failure(wanted: Wanted, console: Console) -> None:
    with pytest.raises(KexecError):
        arm.arm(wanted, Commands(load=KexecError("no memory is reserved")), console)


def test_two_at_once_take_turns(wanted: Wanted, console: Console) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def run(_words: Sequence[str]) -> int:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.05)
        with guard:
            inside -= 1
        return 0

    threads = [threading.Thread(target=arm.arm, args=(wanted, run, console)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_what_is_loaded_already_is_not_loaded_again(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("initramfs.devices.find_device", lambda _: None)
    words = ["load", "--if-needed", "--kernel-image", str(machine / "kernel"), "--image", str(machine / "image")]
    words += ["--target", "LABEL=later", "--cpus", "1"]

    def calls() -> int:
        return len((machine / "calls").read_text().splitlines())

    assert main(words) == 0
    (machine / "crash_loaded").write_text("1\n")
    before = calls()
    capsys.readouterr()
    assert main(words) == 0
    assert calls() == before
    assert "armed already, with the same kernel, image and command line" in capsys.readouterr().err
    assert main([*words, "--keep", "3"]) == 0, "another command line"
    assert calls() > before


def test_an_image_that_is_current_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[str | None] = [None, "there is none yet"]
    monkeypatch.setattr("initramfs.stamp.stale", lambda _: answers.pop(0))
    monkeypatch.setattr("initramfs.stamp.write", lambda *_: None)
    built: list[Callable[..., object]] = []

    def build(request: object) -> object:
        built.append(lambda: request)
        raise ImageError("enough")

    monkeypatch.setattr("initramfs.builders.build", build)
    words = ["initramfs", "--if-needed", "-o", str(tmp_path / "x.img"), "--module", "ext4", "--kernel", "6.1"]
    assert main(words) == 0
    assert capsys.readouterr().err == f"vmcapture: {tmp_path}/x.img: current\n"
    assert built == []
    assert main(words) == 1
    assert len(built) == 1
    assert "is built: there is none yet" in capsys.readouterr().err


def test_arm_itself_is_the_two_commands(machine: Path, monkeypatch: pytest.MonkeyPatch, wanted: Wanted) -> None:
    (machine / "crash_size").write_text("0\n")
    monkeypatch.setattr("initramfs.cli.default_image", lambda _: wanted.image)
    monkeypatch.setattr("initramfs.builders.build", Commands(initramfs=0))
    monkeypatch.setattr("initramfs.stamp.stale", lambda _: None)
    request = type("Request", (), {"output": wanted.image})()
    monkeypatch.setattr("initramfs.cli.image_request", lambda *_: request)
    assert main(["arm", "--build-only", "--kernel", "6.1"]) == 0
    assert main(["arm", "--kernel", "6.1"]) == 1  # no memory is reserved
    assert kexec.armed() is False
