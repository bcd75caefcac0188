"""The set-up side's commands from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from initramfs.cli import main

from .conftest import RELEASE, need_image_tools


def test_the_whole_command_has_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    shown = capsys.readouterr().out
    assert all(name in shown for name in ("dump", "save", "initramfs", "load", "unload", "status"))


def test_status_of_a_machine_without_a_reservation_is_not_armed(capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/sys/kernel/kexec_crash_size").exists():
        pytest.skip("this machine may have a reservation")

    assert main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"armed": False, "reservation": 0, "loaded": None}


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
