"""A local file system: found, waited for, mounted, unmounted."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import mounting
from capture.boot.local import find_device, mounted
from capture.console import Console
from capture.errors import TargetError
from tests.faults import loop_device

Tools = Callable[..., Path]

NOBODY_HAS_THIS = "LABEL=vmcapture-none"


def refusal(error: pytest.ExceptionInfo[TargetError]) -> str:
    line = str(error.value)
    assert error.value.exit_status == 5
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "name", ["/dev/none", "/dev/null", "/", "/etc/passwd", "none", "", NOBODY_HAS_THIS, "UUID=0", "LABEL="]
)
def test_what_is_no_block_device_is_refused_at_once_with_a_remedy(name: str, console: Console) -> None:
    started = time.monotonic()
    with pytest.raises(TargetError) as refused:
        find_device(name, 0, console)
    assert time.monotonic() - started < 2
    line = refusal(refused)
    assert name in line
    assert "vmcapture save DIR" in line
    assert console.lines == []


def test_a_block_device_is_its_own_answer_also_behind_a_link(
    block_device: Callable[[], Path], tmp_path: Path, console: Console
) -> None:
    disk = block_device()
    (tmp_path / "by-id").symlink_to(disk)
    for name in (str(disk), str(tmp_path / "by-id")):
        assert find_device(name, 0, console) == name


def test_waiting_is_announced_once_and_ends_in_time(console: Console) -> None:
    started = time.monotonic()
    with pytest.raises(TargetError, match="after 1 s"):
        find_device("/dev/none", 1, console)
    assert 1 <= time.monotonic() - started < 3
    (line,) = console.lines
    assert "/dev/none" in line


def test_a_disk_that_appears_late_is_taken(
    block_device: Callable[[str], Path], tmp_path: Path, console: Console
) -> None:
    timer = threading.Timer(0.3, block_device, ["late"])
    block_device("early")  # (skips here where nodes cannot be made)
    timer.start()
    assert find_device(str(tmp_path / "late"), 10, console) == str(tmp_path / "late")
    timer.join()


def test_labels_and_uuids_are_looked_up_by_findfs(tools: Tools, console: Console) -> None:
    calls = tools(findfs="echo /dev/vdb1")
    assert find_device("UUID=1234-abcd", 0, console) == "/dev/vdb1"
    assert calls.read_text() == "findfs UUID=1234-abcd\n"


def test_a_findfs_that_finds_nothing_and_says_so_on_stdout_is_not_believed(tools: Tools, console: Console) -> None:
    tools(findfs="echo unable to resolve; exit 1")
    with pytest.raises(TargetError):
        find_device("LABEL=x", 0, console)


def test_without_findfs_the_way_out_is_named(tools: Tools, console: Console) -> None:
    tools()
    with pytest.raises(TargetError) as refused:
        find_device("LABEL=x", 0, console)
    assert "/dev/" in refusal(refused)


def test_the_target_is_mounted_read_write_and_unmounted_after(
    tools: Tools, block_device: Callable[[], Path], tmp_path: Path, console: Console
) -> None:
    disk = block_device()
    calls = tools(mount="exit 0", umount="exit 0")
    with mounted(str(disk), 0, console) as root:
        assert root == tmp_path / "mnt"
        assert root.is_dir()
        assert calls.read_text() == f"mount -o rw {disk} {root}\n"
    assert calls.read_text().splitlines()[1:] == [f"umount {root}"]


def test_it_is_unmounted_also_when_the_save_fails(
    tools: Tools, block_device: Callable[[], Path], console: Console
) -> None:
    calls = tools(mount="exit 0", umount="exit 0")
    with pytest.raises(KeyError), mounted(str(block_device()), 0, console):
        raise KeyError
    assert calls.read_text().count("umount") == 1


def test_the_reason_of_a_failed_save_is_not_lost_when_unmounting_fails_too(
    tools: Tools, block_device: Callable[[], Path], console: Console
) -> None:
    tools(mount="exit 0", umount="echo busy >&2; exit 32")
    with pytest.raises(TargetError) as failed, mounted(str(block_device()), 0, console):
        raise TargetError("/mnt: no room left")
    assert "no room left" in str(failed.value)


def test_what_mount_says_is_passed_on_in_one_line(
    tools: Tools, block_device: Callable[[], Path], console: Console
) -> None:
    disk = block_device()
    calls = tools(mount="echo wrong fs type >&2; echo bad superblock >&2; exit 32", umount="exit 0")
    with pytest.raises(TargetError) as refused, mounted(str(disk), 0, console):
        pytest.fail("not mounted")
    line = refusal(refused)
    assert line.endswith(": wrong fs type bad superblock")
    assert str(disk) in line
    assert "umount" not in calls.read_text()


def test_a_mount_that_fails_without_a_word_still_gives_a_reason(
    tools: Tools, block_device: Callable[[], Path], console: Console
) -> None:
    tools(mount="exit 7")
    with pytest.raises(TargetError, match="mount ended with 7"), mounted(str(block_device()), 0, console):
        pytest.fail("not mounted")


def test_a_missing_mount_command_is_named(tools: Tools, block_device: Callable[[], Path], console: Console) -> None:
    tools()
    with pytest.raises(TargetError, match="mount cannot be run"), mounted(str(block_device()), 0, console):
        pytest.fail("not mounted")


def test_a_real_file_system_is_found_by_its_label_mounted_and_left_clean(
    loop_disk: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    device, label = loop_disk
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    assert find_device(f"LABEL={label}", 5, console) == device
    with mounted(f"LABEL={label}", 5, console) as root:
        assert os.path.ismount(root)
        (root / "file").write_text("kept")
    assert not os.path.ismount(tmp_path / "mnt")
    with mounted(device, 0, console) as root:
        assert (root / "file").read_text() == "kept"


def test_a_path_on_btrfs_is_counted_from_its_root_whatever_is_mounted_by_default(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose root file system is a snapshot that its boot loader has chosen (openSUSE)."""
    if shutil.which("mkfs.btrfs") is None or shutil.which("btrfs") is None:
        pytest.skip("btrfs-progs are not installed")
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "run/target")
    here = tmp_path / "here"
    here.mkdir()
    with loop_device(tmp_path / "disk", 128 << 20) as device:
        subprocess.run(["mkfs.btrfs", "-q", "-f", device], check=True, capture_output=True)
        if subprocess.run(["mount", device, here], check=False, capture_output=True).returncode:
            pytest.skip("no btrfs may be mounted here")
        try:
            subprocess.run(["btrfs", "subvolume", "create", here / "snapshot"], check=True, capture_output=True)
            subprocess.run(["btrfs", "subvolume", "set-default", here / "snapshot"], check=True, capture_output=True)
        finally:
            subprocess.run(["umount", here], check=True)
        with mounted(str(device), 0, console) as point:
            assert [entry.name for entry in point.iterdir()] == ["snapshot"]
            (point / "snapshot/crash").mkdir()
