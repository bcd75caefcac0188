"""A raw partition: looked for, looked at, given a file system or refused.

On real block devices, and taken off again: tests.unit.initramfs.test_collect.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import raw
from capture.boot.raw import describe, is_ours, mounted, signature
from capture.boot.targets import devices_of
from capture.console import Console
from capture.errors import TargetError

Tools = Callable[..., Path]
OURS = "echo TYPE=ext4; echo LABEL=vmcapture-raw"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file in the place of a device: what is read of it, nobody looks at."""
    path = tmp_path / "sda3"
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(raw, "find_device", lambda place, _wait, _console: {"PARTUUID=1-3": str(path)}[place])
    return str(path)


def test_an_empty_one_gets_a_file_system_one_of_ours_is_used_as_it_is(
    device: str, tools: Tools, console: Console
) -> None:
    for blkid, made in (("exit 2", True), (OURS, False)):
        calls = tools(blkid=blkid, mke2fs="exit 0", mount="exit 0", umount="exit 0")
        with mounted("raw:PARTUUID=1-3", 0, console) as root:
            assert root.is_dir()
        said = calls.read_text().splitlines()
        assert said[0] == f"blkid -p -o export {device}"
        maker = [line for line in said if line.startswith("mke2fs")]
        assert len(maker) == made
        assert all(" -L vmcapture-raw " in line and line.endswith(f" {device}") for line in maker)
        assert f"mount -t ext4 -o rw,noinit_itable {device} {root}" in said
        calls.unlink()


def test_what_blkid_says_of_the_partition_itself_is_not_something_on_it(device: str, tools: Tools) -> None:
    tools(blkid="echo DEVNAME=/dev/sda3; echo PART_ENTRY_UUID=1-3; echo PART_ENTRY_TYPE=0x83")
    assert signature(device) is None


@pytest.mark.parametrize(
    ("blkid", "reason"),
    [
        ("echo TYPE=LVM2_member", "has LVM2_member on it: nothing is overwritten; mount any disk"),
        ("echo TYPE=ext4; echo LABEL=data", r"has ext4 \(data\) on it"),
        ("echo TYPE=xfs; echo LABEL=vmcapture-raw", r"has xfs \(vmcapture-raw\) on it"),
        ("echo PTTYPE=gpt", r"has a partition table \(gpt\) on it"),
        ("echo ambivalent result >&2; exit 8", "what is on it is not clear: ambivalent result"),
    ],
)
def test_nothing_is_overwritten(device: str, blkid: str, reason: str, tools: Tools, console: Console) -> None:
    assert Path(device).exists()
    calls = tools(blkid=blkid, mke2fs="exit 0", mount="exit 0")
    with pytest.raises(TargetError, match=reason), mounted("raw:PARTUUID=1-3", 0, console):
        pytest.fail("mounted")
    assert "mke2fs" not in calls.read_text()


def test_a_disk_that_cannot_be_read_is_not_taken_for_an_empty_one(tools: Tools, tmp_path: Path) -> None:
    calls = tools(blkid="exit 2")
    with pytest.raises(TargetError, match="cannot be read: Is a directory"):
        signature(str(tmp_path))
    assert not calls.exists()


def test_a_file_system_that_cannot_be_made_is_a_line(device: str, tools: Tools, console: Console) -> None:
    tools(blkid="exit 2", mke2fs="echo mke2fs: too small >&2; exit 1")
    with pytest.raises(TargetError) as refused, mounted("raw:PARTUUID=1-3", 0, console):
        pytest.fail("mounted")
    assert str(refused.value) == f"raw:PARTUUID=1-3 ({device}): no file system can be made: mke2fs: too small"


def test_it_is_looked_for_in_advance_like_a_local_one(tools: Tools) -> None:
    calls = tools(findfs="echo /dev/sda3")
    assert devices_of(["raw:PARTUUID=1-3", "UUID=0123"]) == {"raw:PARTUUID=1-3": "/dev/sda3", "UUID=0123": "/dev/sda3"}
    assert calls.read_text().splitlines() == ["findfs PARTUUID=1-3", "findfs UUID=0123"]


def test_where_it_was_found_it_is_not_looked_for_again(
    tools: Tools, block_device: Callable[[], Path], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = block_device()
    monkeypatch.setattr(raw, "_READABLE", 0)  # (no driver is behind the node)
    monkeypatch.setattr(os, "open", lambda *_: os.dup(0))
    tools(blkid=OURS, mount="exit 0", umount="exit 0")
    with mounted("raw:PARTUUID=none", 0, console, str(disk)) as root:
        assert root.is_dir()


def test_ours_is_known_by_its_label() -> None:
    assert is_ours({"TYPE": "ext4", "LABEL": "vmcapture-raw"})
    assert not is_ours({"TYPE": "ext4"})
    assert describe({"TYPE": "swap"}) == "swap"
