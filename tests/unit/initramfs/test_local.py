"""A local file system as a target: what it needs, and how the capture kernel is told."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from initramfs import devices, local, tools, volumes
from initramfs.devices import Mount, Needed
from initramfs.errors import ImageError
from tests.faults import loop_device


def test_an_image_for_a_disk_that_is_not_there_cannot_be_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    with pytest.raises(ImageError, match="UUID=0123: no block device of this machine carries it now; is it"):
        local.needed("UUID=0123")


def test_a_target_without_a_file_system_is_refused_while_the_machine_is_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blkid = tmp_path / "blkid"  # as util-linux answers for a disk of zeros: nothing, and status 2
    blkid.write_text("#!/bin/sh\nexit 2\n")
    blkid.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "find_device", lambda _: Path("/dev/vdb"))
    monkeypatch.setattr(volumes, "needed_by_device", lambda _: Needed(("virtio_blk",), ()))

    with pytest.raises(ImageError, match=r"/dev/vdb: blkid finds no file system on it; make one, mkfs\.ext4 /dev/vdb"):
        local.needed("/dev/vdb")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A block device that passes for a disk of this machine."""
    monkeypatch.setattr(volumes, "needed_by_device", lambda _: Needed(("virtio_blk",)))
    with loop_device(tmp_path / "disk", 512 << 20) as device:
        yield device


def refused(device: Path, reason: str, mount: str = "") -> None:
    """Neither image nor load is to be had."""
    for step in (lambda: local.needed(str(device)), lambda: local.named(str(device), print)):
        with pytest.raises(ImageError, match=f"^{device}: {reason}"):
            step()
    if mount:
        mounted = Mount(str(device), Path("/var/crash"), "/", mount)
        for step in (lambda: local.needed_by_mount(mounted), lambda: local.named_mount(mounted)):
            with pytest.raises(ImageError, match=f"^/var/crash: {reason}"):
                step()


def test_what_is_no_file_system_is_refused(disk: Path) -> None:
    subprocess.run(["mkswap", disk], check=True, capture_output=True)
    refused(disk, f"there is swap on {disk}, which is no file system; name the one to save on")


def test_an_encrypted_partition_is_refused(disk: Path) -> None:
    """As it lies on the disk: LUKS1's header (its specification, 2.3.1), which blkid knows."""
    header = (
        b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0") + b"sha256".ljust(32, b"\0")
    )
    header += bytes(168 - len(header)) + b"0f6b1a5c-5d0e-4d0b-9d5e-0a4b9b4e7a11\0\0\0\0"
    disk.write_bytes(header.ljust(4096, b"\0"))
    refused(disk, rf"{disk} is encrypted \(LUKS\): nobody gives the capture kernel its key; .*--recipients")


def test_a_file_system_of_which_the_log_is_elsewhere_is_refused(disk: Path, tmp_path: Path) -> None:
    if tools.find("mkfs.xfs") is None:
        pytest.skip("mkfs.xfs is not installed")
    with loop_device(tmp_path / "log", 128 << 20) as log:
        subprocess.run(["mkfs.xfs", "-q", "-f", "-l", f"logdev={log},size=64m", disk], check=True)
        refused(disk, f"of the file system on {disk}, its log is on another device: the capture kernel cannot", "xfs")


def test_a_good_file_system_is_taken(disk: Path) -> None:
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", disk], check=True)
    needed = local.needed(str(disk))
    assert {"virtio_blk", "ext4"} <= {*needed.loaded, *needed.built_in}
    assert local.named(str(disk), print).startswith("UUID=")


def test_a_file_system_that_a_program_serves_is_refused(disk: Path) -> None:
    """As ntfs-3g's, on a disk that is there."""
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", disk], check=True)
    mounted = Mount(str(disk), Path("/var/crash"), "/", "fuseblk")
    for step in (local.needed_by_mount, local.named_mount):
        with pytest.raises(ImageError, match=f"^/var/crash is on {disk}, which a program serves .*; name a plain"):
            step(mounted)
