"""The set-up side's commands from the outside."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from capture.boot.config import parse
from initramfs import cli, devices, local, measure, targets, volumes, watchdogs
from initramfs.cli import main
from initramfs.devices import Mount, Needed
from initramfs.errors import ImageError, MeasureError, ToolError
from initramfs.image import ImageReport, ImageRequest
from initramfs.measure import Measurement, Run

from .conftest import RELEASE, need_image_tools


def test_no_command_waits_for_numpy_that_does_not_need_it() -> None:
    """Half of the time that ``list`` takes would go by; what a save or an image is made of brings more along."""
    heavy = {"numpy", "elftools", "capture.boot.job", "urllib.request"}
    asked = f"import sys, initramfs.cli; print(*sorted({heavy} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout
    assert said == "\n"


def test_the_whole_command_has_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    shown = capsys.readouterr().out
    assert all(name in shown for name in ("dump", "save", "initramfs", "load", "unload", "status"))


def test_status_of_a_machine_without_a_reservation_is_not_armed(capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/sys/kernel/kexec_crash_size").exists():
        pytest.skip("this machine may have a reservation")

    assert main(["status", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["armed"], found["reservation"], found["loaded"], found["verdict"]) == (False, 0, None, "bad")
    assert found["checks"][0]["remedy"].startswith("add crashkernel=256M to the kernel command line ")


def test_an_image_for_a_foreign_kernel_tree(
    tmp_path: Path, module_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_image_tools()

    status = main(
        [
            "initramfs",
            "-o",
            str(tmp_path / "x.img"),
            "--modules-dir",
            str(module_tree),
            "--module",
            "virtio-blk",
            "--module",
            "ext4",
        ]
    )

    assert status == 0
    shown = capsys.readouterr().err
    assert shown.startswith(f"vmcapture: {tmp_path / 'x.img'}: ")
    assert f"for {RELEASE}; modules: loop squashfs virtio_ring virtio virtio_blk" in shown


def test_a_missing_module_is_one_line_and_status_1(
    tmp_path: Path, module_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_image_tools()

    status = main(["initramfs", "-o", str(tmp_path / "x.img"), "--modules-dir", str(module_tree), "--module", "floppy"])

    assert status == 1
    shown = capsys.readouterr().err
    assert shown.startswith("vmcapture: ")
    assert shown.count("\n") == 1
    assert "floppy" in shown


def test_every_option_has_a_help_text() -> None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    cli.add_commands(subparsers)

    silent = [
        f"{name} {action.option_strings}"
        for name, parser in subparsers.choices.items()
        for action in parser._actions
        if not action.help
    ]

    assert silent == []


def test_the_kernel_lies_below_boot_or_beside_its_modules(tmp_path: Path) -> None:
    usual, beside = tmp_path / f"boot/vmlinuz-{RELEASE}", tmp_path / f"lib/modules/{RELEASE}/vmlinuz"
    for path in (usual, beside):
        path.parent.mkdir(parents=True)

    assert cli.default_kernel(RELEASE, tmp_path) == usual
    beside.touch()
    assert cli.default_kernel(RELEASE, tmp_path) == beside
    usual.touch()
    assert cli.default_kernel(RELEASE, tmp_path) == usual


@pytest.mark.parametrize("cpus", ["0", "-1", "two"])
def test_a_capture_kernel_has_at_least_one_cpu(cpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["load", "--cpus", cpus])
    assert f"{cpus}: a number from 1 on is needed" in capsys.readouterr().err


class Requests:
    """Stands in for the build and for this machine's disk and keyboard; keeps what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: ImageRequest | None = None
        monkeypatch.setattr("initramfs.builders.build", self.build)
        monkeypatch.setattr("initramfs.stamp.write", lambda *_: None)
        monkeypatch.setattr(devices, "mount_of", lambda _: Mount("/dev/vda", Path("/"), "/", "ext4"))
        monkeypatch.setattr(local, "needed_by_mount", lambda *_: Needed(("virtio_blk",), ("ext4",)))
        monkeypatch.setattr(targets, "needed_by", lambda *_: Needed(("nvme",), ()))
        monkeypatch.setattr(devices, "keyboard_modules", lambda: ("usbhid",))
        monkeypatch.setattr(watchdogs, "modules", lambda: Needed(("iTCO_wdt",), ("hpwdt",)))
        monkeypatch.setattr("initramfs.modules.host_options", lambda: (("nvme", "poll_queues=1"),))

    def build(self, request: ImageRequest) -> ImageReport:
        self.last = request
        return ImageReport(request.output, 1, True, request.kernel_release, (), (), 1)


@pytest.mark.parametrize(
    ("arguments", "modules", "welcome"),
    [
        ([], ("virtio_blk",), ("usbhid",)),
        (["--target", "LABEL=crash"], ("nvme",), ("usbhid",)),
        (["--module", "ahci"], ("ahci",), ()),
        (["--target", "LABEL=crash", "--module", "ahci"], ("nvme", "ahci"), ()),
    ],
)
def test_the_keyboard_comes_along_when_the_image_is_for_this_machine(
    arguments: list[str], modules: tuple[str, ...], welcome: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(monkeypatch)

    assert main(["initramfs", *arguments]) == 0

    assert requests.last is not None
    assert requests.last.modules == modules
    assert requests.last.welcome_modules == welcome
    assert requests.last.watchdog_modules == (("iTCO_wdt", "hpwdt") if welcome else ())
    assert requests.last.module_options == (("nvme", "poll_queues=1"),)


def test_a_machine_without_a_watchdog_gets_softwares(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(monkeypatch)
    monkeypatch.setattr(watchdogs, "modules", lambda: Needed((), ()))

    assert main(["initramfs"]) == 0

    assert requests.last is not None
    assert requests.last.welcome_modules == ("usbhid", "softdog")
    assert requests.last.watchdog_modules == ()


def load(machine: Path, *arguments: str) -> int:
    return main(["load", "--kernel-image", str(machine / "kernel"), "--image", str(machine / "image"), *arguments])


def test_load_takes_as_many_cpus_as_the_reservation_is_enough_for(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for mebibytes, arguments, cpus in ((96, (), 1), (256, (), 4), (256, ("--cpus", "2"), 2)):
        (machine / "crash_size").write_text(f"{mebibytes << 20}\n")
        assert load(machine, "--target", "LABEL=later", *arguments) == 0
        assert f" nr_cpus={cpus} " in (machine / "calls").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], []),
        (["--keep", "5"], ["vmcapture.keep=5"]),
        (["--free", "10%"], ["vmcapture.free=10%"]),
        (["--free", "0"], ["vmcapture.free=0"]),
        (["--free", "2g", "--keep", "9999"], ["vmcapture.keep=9999", "vmcapture.free=2g"]),
    ],
)
def test_load_tells_the_capture_kernel_how_much_room_to_leave(
    arguments: list[str], words: list[str], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    assert load(machine, "--target", "LABEL=later", *arguments) == 0
    line = (machine / "calls").read_text().splitlines()[-1]
    assert [word for word in line.split() if word.startswith(("vmcapture.keep", "vmcapture.free"))] == words
    assert parse(line).problems == ()


@pytest.mark.parametrize(
    ("runs", "arguments", "words"),
    [
        ((), (), []),
        (("watchdog0",), (), ["vmcapture.watchdog=180"]),
        (("watchdog0",), ("--watchdog", "0"), []),
        ((), ("--watchdog", "60"), ["vmcapture.watchdog=60"]),
    ],
)
def test_a_watchdog_that_runs_is_used_unless_somebody_says_otherwise(
    runs: tuple[str, ...], arguments: tuple[str, ...], words: list[str], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    monkeypatch.setattr(watchdogs, "running", lambda *_: runs)
    assert load(machine, "--target", "LABEL=later", *arguments) == 0
    line = (machine / "calls").read_text().splitlines()[-1]
    assert [word for word in line.split() if word.startswith("vmcapture.watchdog")] == words
    assert parse(line).problems == ()


@pytest.mark.parametrize(
    "arguments",
    [("--watchdog", "9"), ("--watchdog", "3601"), ("--watchdog", "on"),
     ("--keep", "0"), ("--keep", "-1"), ("--keep", "10000"), ("--keep", "all"), ("--free", "100%"), ("--free", ""),
     ("--free", "10GB"), ("--free=-1",), ("--free", "1G 2G")],
    ids=" ".join,
)  # fmt: skip
def test_nonsense_is_refused_while_somebody_is_there_to_mend_it(
    arguments: tuple[str, ...], machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load(machine, "--target", "LABEL=later", *arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"vmcapture load: argument {arguments[0].partition('=')[0]}: ")
    assert not (machine / "calls").exists()


def image_of(size: int, folder: Path) -> str:
    image = folder / "image"
    image.write_bytes(b"070701".ljust(size, b"\0"))
    return str(image)


def test_estimate_says_what_to_reserve_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_of(20 << 20, tmp_path)

    assert main(["estimate", "--no-measure", "--image", image]) == 0
    parameter, *parts = capsys.readouterr().out.splitlines()
    assert parameter.startswith("crashkernel=")
    assert any(part.split()[:2] == ["image", "20.0"] for part in parts)
    assert parts[-1] == "  computed, not measured: --no-measure"

    assert main(["estimate", "--no-measure", "--image", image, "--cpus", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["cpus"] == 4
    assert values["image"] == 20 << 20
    assert (values["measured"], values["not_measured"]) == (None, "--no-measure")


def test_estimate_builds_the_image_that_it_is_about(
    tmp_path: Path, module_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_image_tools()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = ["--modules-dir", str(module_tree), "--module", "virtio-blk"]

    assert main(["estimate", "--json", "--no-measure", *arguments]) == 0

    assert json.loads(capsys.readouterr().out)["image"] > 10 << 20


def test_estimate_takes_nothing_else_for_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter").write_text("dear kernel")
    assert main(["estimate", "--no-measure", "--image", str(tmp_path / "letter")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"vmcapture: {tmp_path}/letter: no image that a kernel unpacks; ")


@pytest.mark.parametrize(("content", "said"), [(None, "no such program"), ("#!/bin/sh", "it may not be executed")])
def test_a_program_that_is_none_is_refused_before_anything_is_built(
    content: str | None, said: str, tmp_path: Path, module_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "program").write_text(content)
    arguments = ["--modules-dir", str(module_tree), "--module", "ext4", "--bin", str(tmp_path / "program")]
    assert main(["initramfs", "-o", str(tmp_path / "image"), *arguments]) == 1
    assert capsys.readouterr().err == f"vmcapture: --bin {tmp_path}/program: {said}\n"


@pytest.mark.parametrize("more", [(), ("--no-measure",)])
def test_estimate_of_an_image_that_is_not_there_is_a_line(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", "--image", str(tmp_path / "missing"), *more]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_estimate_with_a_kernel_that_is_not_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert main(["estimate", "--image", image_of(1 << 20, tmp_path), "--kernel-image", str(missing)]) == 1
    assert capsys.readouterr() == ("", f"vmcapture: {missing}: no such kernel; name another one with --kernel-image\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ToolError("qemu-system-x86_64 was not found: install qemu-system-x86"), "qemu-system-x86_64 was not found"),
        (MeasureError("the guest said\x1b[2J"), "the guest said\\x1b[2J"),
        (PermissionError(13, "Permission denied", "/boot/vmlinuz"), "/boot/vmlinuz: Permission denied"),
    ],
)
def test_estimate_computes_where_it_cannot_measure_and_says_why(
    error: Exception, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(measure, "measure", fail)
    image = image_of(20 << 20, tmp_path)

    assert main(["estimate", "--image", image]) == 0
    parameter, *others = capsys.readouterr().out.splitlines()
    assert parameter == "crashkernel=128M"
    assert others[-1].startswith(f"  computed, not measured: {line}")

    assert main(["estimate", "--image", image, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["measured"] is None
    assert values["not_measured"].startswith(line)


def test_estimate_prints_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[measure.Request] = []

    def measured(request: measure.Request, scratch: Path, say: Callable[[str], object]) -> Measurement:
        asked.append(request)
        say("crashing a guest")
        assert not scratch.exists()
        run = Run(112 << 20, 80 << 20, 12 << 20, 44 << 20)
        return Measurement(run, ((96 << 20, "no"),), 8 << 20, ("raid",), RELEASE, "tcg", 2, 20 << 20, 0, 1 << 30)

    monkeypatch.setattr(measure, "measure", measured)
    image, kernel = image_of(20 << 20, tmp_path), tmp_path / "vmlinuz"
    kernel.touch()
    arguments = ["estimate", "--image", image, "--kernel-image", str(kernel), "--kernel", RELEASE, "--timeout", "9"]

    assert main([*arguments, "--cpus", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "crashkernel=112M"
    assert "not at 96M: no" in shown.out
    assert shown.err == "vmcapture: crashing a guest\n"
    modules_dir = Path("/lib/modules") / RELEASE
    assert asked == [measure.Request(kernel, modules_dir, Path(image), 20 << 20, asked[0].first, 2, 9)]

    assert main([*arguments, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    values = json.loads(shown.out)
    assert shown.err == ""
    assert (values["reservation"], values["parameter"]) == (112 << 20, "crashkernel=112M")
    assert values["measured"]["memory_available_least"] == 12 << 20
    assert values["measured"]["drivers_without_device"] == ["raid"]
    assert values["not_measured"] is None
    assert {"cpus", "kernel", "drivers", "image", "job", "spare", "needed"} <= values.keys()


def refuse(device: Path) -> NoReturn:
    raise ImageError(f"{device} stands on something")


def test_a_target_that_is_not_there_yet_is_a_warning(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)

    assert load(machine, "--target", "LABEL=later") == 0

    first, second = capsys.readouterr().err.splitlines()
    assert first == "vmcapture: LABEL=later: no block device of this machine carries it now"
    assert second.startswith("vmcapture: armed: ")
    assert " vmcapture.target=LABEL=later vmcapture.path=/var/crash " in (machine / "calls").read_text()


def test_several_targets_are_handed_over_in_their_order(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)

    assert load(machine, "--target", "LABEL=b", "--target", "UUID=a") == 0

    assert " vmcapture.target=LABEL=b vmcapture.target=UUID=a vmcapture.path=" in (machine / "calls").read_text()


def test_the_image_has_the_modules_of_every_target(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"LABEL=a": Needed(("nvme",), ()), "LABEL=b": Needed(("sd_mod",), ("ext4",))}
    monkeypatch.setattr(targets, "needed_by", lambda target, _: needed[target])
    asked: list[ImageRequest] = []

    def build(request: ImageRequest) -> ImageReport:
        asked.append(request)
        raise ImageError("enough")

    monkeypatch.setattr("initramfs.builders.build", build)
    assert main(["initramfs", "-o", str(machine / "img"), "--target", "LABEL=a", "--target", "LABEL=b"]) == 1
    (request,) = asked
    assert set(request.modules) == {"nvme", "sd_mod"}
    assert request.optional_modules == ("ext4",)


def test_a_target_that_cannot_be_assembled_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: Path("/dev/dm-0"))
    monkeypatch.setattr(volumes, "needed_by_device", refuse)

    assert load(machine, "--target", "LABEL=crash") == 1

    assert capsys.readouterr().err == "vmcapture: /dev/dm-0 stands on something\n"
    assert not (machine / "calls").exists()


def test_the_file_system_of_the_crash_directory_is_refused_alike(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "mount_of", lambda _: Mount("/dev/mapper/vg-root", Path("/"), "/", "ext4"))
    monkeypatch.setattr(devices, "uuid_of", lambda _: "0123")
    monkeypatch.setattr(volumes, "needed_by_device", refuse)

    assert load(machine) == 1

    assert capsys.readouterr().err == "vmcapture: /dev/mapper/vg-root stands on something\n"


def test_a_target_of_an_unknown_kind_is_wrong_usage(machine: Path) -> None:
    assert load(machine, "--target", "PARTUUID=1-2") == 2
    assert not (machine / "calls").exists()


def test_without_a_reservation_nothing_is_said_about_disks(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine / "crash_size").write_text("0\n")
    monkeypatch.setattr(devices, "find_device", refuse)
    monkeypatch.setattr(devices, "mount_of", refuse)

    for arguments in ([], ["--target", "LABEL=later"]):
        assert load(machine, *arguments) == 1
        assert "no memory is reserved" in capsys.readouterr().err


def test_a_small_reservation_is_said_once_the_machine_is_armed(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine / "crash_size").write_text(f"{64 << 20}\n")

    assert load(machine, "--command-line", "console=ttyS0") == 0

    armed, doubt = capsys.readouterr().err.splitlines()
    assert armed.startswith("vmcapture: armed: ")
    assert doubt.startswith("vmcapture: crashkernel= reserves 64 MiB")
