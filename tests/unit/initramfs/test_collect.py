"""Crashes taken off a raw partition: real ext4 file systems on loop devices, made as the capture kernel makes them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture.boot import mounting, raw
from capture.boot.raw import LABEL, signature
from capture.console import Console
from capture.dumpfile.output import HASH_BLOCK
from initramfs import cli
from initramfs import raw as set_up
from initramfs.collect import collect
from initramfs.errors import CollectError, ImageError
from tests.faults import loop_device, tmpfs

CRASH = "host-2026-11-27-03:00:00"


@pytest.fixture
def partition(tmp_path: Path) -> Iterator[Path]:
    """An empty block device."""
    with loop_device(tmp_path / "partition.img", 64 << 20) as device:
        yield device


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    return tmp_path / "crash"


def save(partition: Path, console: Console, name: str = CRASH, log: bytes = b"panic\n", *, said: bytes = b"") -> None:
    """Save a crash there as the capture kernel does; its manifest is about ``said``, if that is not ``log``."""
    with raw.mounted(f"raw:{partition}", 0, console) as root:
        directory = root / "var/crash" / name
        directory.mkdir(parents=True)
        (directory / "vmcore-dmesg.txt").write_bytes(log)
        with (directory / "vmcore").open("wb") as dump:  # mostly a hole
            dump.truncate(16 << 20)
            dump.seek(5 << 20)
            dump.write(b"KDUMP")
        digest = hashlib.sha256(said or log).hexdigest()
        files = {"vmcore-dmesg.txt": {"size": len(log), "sha256": digest}}
        (directory / "manifest.json").write_text(json.dumps({"hash_block": HASH_BLOCK, "files": files}))


def test_what_a_capture_kernel_saved_is_brought_over_and_the_partition_is_empty_again(
    partition: Path, place: Path, console: Console
) -> None:
    save(partition, console)
    (crash,) = collect(partition, place, console.say)
    assert crash.directory == place / CRASH
    assert not crash.again
    assert (crash.directory / "vmcore-dmesg.txt").read_bytes() == b"panic\n"
    dump = crash.directory / "vmcore"
    assert (dump.stat().st_size, dump.read_bytes()[5 << 20 :][:5]) == (16 << 20, b"KDUMP")
    assert dump.stat().st_blocks * 512 < 8 << 20, "holes stay holes"
    assert crash.directory.stat().st_mode & 0o777 == 0o755
    assert dump.stat().st_mode & 0o077 == 0o044
    assert [path.name for path in place.iterdir()] == [CRASH]
    assert signature(str(partition)) is None
    assert collect(partition, place, console.say) == []
    save(partition, console, "host-2026-11-27-04:00:00")
    assert [found.directory.name for found in collect(partition, place, console.say)] == ["host-2026-11-27-04:00:00"]


def test_a_crash_that_was_not_collected_stays_beside_the_next_one(
    partition: Path, place: Path, console: Console
) -> None:
    save(partition, console)
    save(partition, console, "host-2026-11-27-04:00:00")
    assert [crash.directory.name for crash in collect(partition, place, console.say)] == [
        CRASH,
        "host-2026-11-27-04:00:00",
    ]


def test_nothing_that_is_not_ours_is_written_to_or_emptied(partition: Path, place: Path, console: Console) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "mine", partition], check=True, capture_output=True)
    with pytest.raises(CollectError, match=r"has ext4 \(mine\) on it, which no capture kernel made: left alone"):
        collect(partition, place, console.say)
    with pytest.raises(Exception, match=r"has ext4 \(mine\) on it: nothing is overwritten"):
        save(partition, console)
    with pytest.raises(ImageError, match=r"has ext4 \(mine\) on it, and the capture kernel would format it; .* wipefs"):
        set_up.needed(f"raw:{partition}")
    found = signature(str(partition))
    assert found is not None
    assert found["LABEL"] == "mine"


def test_swap_and_partition_tables_are_known_as_well(partition: Path, console: Console) -> None:
    subprocess.run(["mkswap", partition], check=True, capture_output=True)
    with pytest.raises(Exception, match="has swap on it: nothing is overwritten"):
        save(partition, console)
    partition.write_bytes(bytes(1 << 20))
    with partition.open("r+b") as disk:  # an MBR with one Linux partition
        disk.write(bytes(446) + bytes((0, 1, 1, 0, 0x83, 0, 0, 0)) + (2048).to_bytes(4, "little") * 2)
        disk.seek(510)
        disk.write(b"\x55\xaa")
    with pytest.raises(Exception, match=r"has a partition table \(dos\) on it"):
        save(partition, console)


def test_a_whole_disk_is_refused_because_another_one_may_have_its_name(partition: Path) -> None:
    with pytest.raises(ImageError, match="may be another disk there: name a partition"):
        set_up.needed(f"raw:{partition}")


def test_what_is_not_what_was_written_keeps_the_partition(partition: Path, place: Path, console: Console) -> None:
    save(partition, console, said=b"something else")
    with pytest.raises(CollectError, match=f"{CRASH}/vmcore-dmesg.txt is not what was written"):
        collect(partition, place, console.say)
    assert signature(str(partition)) is not None


def test_no_room_is_a_line_and_leaves_nothing_behind(partition: Path, place: Path, console: Console) -> None:
    save(partition, console, log=os.urandom(2 << 20))
    with tmpfs(place, "size=1m"):
        with pytest.raises(CollectError, match=f"has no room for {CRASH} .*: make room, or name another"):
            collect(partition, place, console.say)
        assert list(place.iterdir()) == []
    assert signature(str(partition)) is not None


def test_what_was_brought_over_before_is_not_brought_twice(partition: Path, place: Path, console: Console) -> None:
    save(partition, console)
    save(partition, console, "host-2026-11-27-04:00:00", said=b"something else")
    with pytest.raises(CollectError):
        collect(partition, place, console.say)
    assert [path.name for path in place.iterdir()] == [CRASH]
    with raw.mounted(f"raw:{partition}", 0, console) as root:
        (root / "var/crash/host-2026-11-27-04:00:00/manifest.json").unlink()  # somebody has looked at it
    assert [crash.again for crash in collect(partition, place, console.say)] == [True, False]


def test_another_crash_of_the_same_name_gets_a_number(partition: Path, place: Path, console: Console) -> None:
    (place / CRASH).mkdir(parents=True)
    (place / CRASH / "vmcore").write_bytes(b"another")
    save(partition, console)
    (crash,) = collect(partition, place, console.say)
    assert crash.directory == place / f"{CRASH}-1"


def test_a_partition_in_use_is_not_emptied(partition: Path, place: Path, console: Console, tmp_path: Path) -> None:
    save(partition, console)
    (tmp_path / "look").mkdir()
    subprocess.run(["mount", "-o", "ro", partition, tmp_path / "look"], check=True)
    try:
        with pytest.raises(CollectError, match="all is collected, but it cannot be emptied: it is mounted"):
            collect(partition, place, console.say)
    finally:
        subprocess.run(["umount", tmp_path / "look"], check=True)
    assert [crash.again for crash in collect(partition, place, console.say)] == [True]


def test_the_command(
    partition: Path, place: Path, console: Console, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(partition, console)
    assert cli.main(["collect", "--to", str(place), str(partition)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"vmcapture: collected from {partition}: {place / CRASH} (0.0 MiB)",
        f"vmcapture: {partition} is empty again",
    ]
    assert cli.main(["collect", str(tmp_path / "none")]) == 2
    assert cli.main(["collect", "/dev/none"]) == 1
    assert capsys.readouterr().err.endswith("vmcapture: /dev/none: no block device of this machine carries it now\n")


def test_nothing_to_collect_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("initramfs.devices.all_with_label", lambda _: [])
    assert cli.main(["collect"]) == 0
    assert capsys.readouterr().err == f"vmcapture: nothing to collect: no partition is called {LABEL}\n"


def test_all_partitions_are_collected_whichever_of_them_udev_links_to(
    partition: Path, place: Path, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One label, one link below /dev/disk, which findfs believes, and which stays there for a while."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "findfs").write_text(f"#!/bin/sh\necho {partition}\n")
    (folder / "findfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("initramfs.collect.LABEL", "vmcapture-test")  # what else this machine may have is left alone
    with loop_device(tmp_path / "other.img", 64 << 20) as other:
        for device, name in ((partition, CRASH), (other, CRASH.replace("host", "next"))):
            save(device, console, name)
            subprocess.run(["tune2fs", "-L", "vmcapture-test", device], check=True, capture_output=True)
        monkeypatch.setattr(raw, "LABEL", "vmcapture-test")

        assert cli.main(["collect", "--to", str(place)]) == 0

    assert sorted(path.name for path in place.iterdir()) == [CRASH, CRASH.replace("host", "next")]
