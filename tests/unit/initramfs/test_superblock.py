"""Room on file systems that are not mounted: their own tools make them, and say how much there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from initramfs import superblock
from tests.faults import loop_device

MIB = 1 << 20


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            pytest.skip(f"{program} is not installed")


def made(folder: Path, size: int, *command: str) -> Path:
    image = folder / "disk"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size)
    subprocess.run([*command, image], check=True, capture_output=True)
    return image


LARGE = ("-T", "largefile4", "-E", "lazy_itable_init=1,nodiscard", "-J", "size=4")
"""What makes a file system of terabytes in a moment."""


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 * MIB, ()), (64 * MIB, ("-b", "1024")), (64 * MIB, ("-b", "4096")), (64 * MIB, ("-O", "^64bit")),
        (64 * MIB, ("-t", "ext2")), (3 << 40, LARGE), (3 << 40, (*LARGE, "-b", "4096")),
        (3 << 40, (*LARGE, "-O", "^64bit")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else f"{value // MIB}M",
)  # fmt: skip
def test_ext(size: int, options: tuple[str, ...], tmp_path: Path) -> None:
    kind = () if "-t" in options else ("-t", "ext4")
    image = made(tmp_path, size, "mke2fs", "-q", "-F", *kind, *options)
    said = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True, text=True).stdout
    numbers = dict(re.findall(r"^(Block count|Free blocks|Block size): +(\d+)", said, re.MULTILINE))
    block = int(numbers["Block size"])
    assert superblock.room(image) == (int(numbers["Free blocks"]) * block, int(numbers["Block count"]) * block)


def test_xfs(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfs_db")
    image = made(tmp_path, 512 * MIB, "mkfs.xfs", "-q", "-f")
    said = subprocess.run(
        ["xfs_db", "-r", "-c", "sb 0", "-c", "print fdblocks dblocks blocksize", image],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    free, total, block = (int(number) for number in re.findall(r"= (\d+)", said))
    assert superblock.room(image) == (free * block, total * block)


def test_btrfs(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    image = made(tmp_path, 512 * MIB, "mkfs.btrfs", "-q", "-f")
    found = superblock.room(image)
    assert found is not None
    assert found.total == 512 * MIB
    said = subprocess.run(
        ["btrfs", "inspect-internal", "dump-super", image], check=True, capture_output=True, text=True
    ).stdout
    used = re.search(r"^bytes_used\s+(\d+)", said, re.MULTILINE)
    assert used is not None
    assert found.free == found.total - int(used[1])


@pytest.mark.parametrize("content", [b"", b"x", bytes(2 * MIB), b"\xff" * 70_000, b"XFSB"])
def test_what_is_none_of_them_is_not_known(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(content)
    assert superblock.room(tmp_path / "disk") is None


def test_a_file_system_on_one_device_has_nothing_elsewhere(tmp_path: Path) -> None:
    need("mkfs.xfs", "mkfs.btrfs")
    for command in (("mke2fs", "-q", "-F", "-t", "ext4"), ("mke2fs", "-q", "-F", "-t", "ext2"),
                    ("mkfs.xfs", "-q", "-f"), ("mkfs.btrfs", "-q", "-f")):  # fmt: skip
        assert superblock.elsewhere(made(tmp_path, 512 * MIB, *command)) is None
    (tmp_path / "disk").write_bytes(bytes(2 * MIB))
    assert superblock.elsewhere(tmp_path / "disk") is None


def test_a_journal_on_another_device(tmp_path: Path) -> None:
    with loop_device(tmp_path / "journal", 16 * MIB) as journal:
        subprocess.run(["mke2fs", "-q", "-F", "-b", "1024", "-O", "journal_dev", journal], check=True)
        image = made(tmp_path, 64 * MIB, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-J", f"device={journal}")
        assert superblock.elsewhere(image) == "its journal"


def test_a_log_or_a_realtime_part_on_another_device(tmp_path: Path) -> None:
    need("mkfs.xfs")
    with loop_device(tmp_path / "disk", 512 * MIB) as disk, loop_device(tmp_path / "other", 128 * MIB) as other:
        subprocess.run(["mkfs.xfs", "-q", "-f", "-l", f"logdev={other},size=64m", disk], check=True)
        assert superblock.elsewhere(disk) == "its log"
        subprocess.run(["mkfs.xfs", "-q", "-f", "-r", f"rtdev={other}", disk], check=True)
        assert superblock.elsewhere(disk) == "its realtime part"


def test_several_devices_of_one_file_system(tmp_path: Path) -> None:
    need("mkfs.btrfs")
    (tmp_path / "first").touch()
    os.truncate(tmp_path / "first", 512 * MIB)
    image = made(tmp_path, 512 * MIB, "mkfs.btrfs", "-q", "-f", "-d", "raid1", str(tmp_path / "first"))
    assert superblock.elsewhere(image) == "a part of it, one of 2,"
