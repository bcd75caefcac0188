"""Superblocks of real file systems; disks that answer, that cannot be read, and that hang."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.boot import superblocks

UUID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"


def made(folder: Path, *command: str) -> bytes:
    """What a file system of 16 MiB (btrfs, xfs: more) begins with that ``command IMAGE`` makes."""
    program = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        pytest.skip(f"no {command[0]} on this machine")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([program, *command[1:], image], check=True, capture_output=True)
    with image.open("rb") as file:
        return file.read(17 * 4096)


@pytest.mark.parametrize(
    "command",
    [
        ("mkfs.ext4", "-q", "-U", UUID, "-L", "crash"),
        ("mkfs.ext2", "-q", "-U", UUID, "-L", "crash"),
        ("mkfs.xfs", "-q", "-m", f"uuid={UUID}", "-L", "crash"),
        ("mkfs.btrfs", "-q", "-U", UUID, "-L", "crash"),
    ],
    ids=lambda command: command[0],
)
def test_a_file_system_says_who_it_is(command: tuple[str, ...], tmp_path: Path) -> None:
    assert superblocks.tags(made(tmp_path, *command)) == {"UUID": UUID, "LABEL": "crash"}


def test_a_label_may_fill_its_field_or_be_none(tmp_path: Path) -> None:
    assert superblocks.tags(made(tmp_path, "mkfs.ext4", "-q", "-L", "x" * 16))["LABEL"] == "x" * 16
    assert superblocks.tags(made(tmp_path, "mkfs.ext4", "-q", "-U", UUID)) == {"UUID": UUID}


@given(st.binary(max_size=2048))
def test_anything_else_is_nothing(head: bytes) -> None:
    assert superblocks.tags(head[:1080] + b"\0\0" + head[1082:]) == {} or head.startswith(b"XFSB")


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Callable[..., Path]) -> Callable[..., None]:
    """``disks(sda="echo …", sdb="exit 1")``: what a script writes is what reading that disk gives."""

    def there(**scripts: str) -> None:
        for name in scripts:
            (tmp_path / "block" / name).mkdir(parents=True)
            (tmp_path / "block" / name / "size").write_text("2048\n")
        cases = "".join(f"if=/dev/{name}) {script};; " for name, script in scripts.items())
        tools(dd=f"case $1 in {cases}esac")
        monkeypatch.setattr(superblocks, "BLOCK", tmp_path / "block")
        monkeypatch.setattr(superblocks, "_asked", {})
        monkeypatch.setattr(superblocks, "PATIENCE", 1.5)

    return there


@pytest.fixture
def ext4(tmp_path: Path) -> str:
    """A script that writes what a file system with the label ``crash`` begins with."""
    head = tmp_path / "head"
    head.write_bytes(made(tmp_path, "mkfs.ext4", "-q", "-U", UUID, "-L", "crash"))
    return f"/bin/cat {head}"


CRASH = ("LABEL", "crash")
HANGS = "exec /bin/sleep 60"


@pytest.mark.parametrize("wanted", [("LABEL", "crash"), ("UUID", UUID)], ids=lambda wanted: wanted[0])
def test_a_disk_that_hangs_hides_no_other(wanted: tuple[str, str], disks: Callable[..., None], ext4: str) -> None:
    disks(sda=HANGS, sdb="exit 1", sdc=ext4, sdd=HANGS)
    started = time.monotonic()

    assert superblocks.devices_with([wanted]) == {wanted: "/dev/sdc"}

    assert time.monotonic() - started < superblocks.PATIENCE


def test_what_is_not_there_is_not_waited_for_for_ever(disks: Callable[..., None]) -> None:
    disks(sda=HANGS, sdb="exit 1")

    assert superblocks.devices_with([CRASH]) == {}


def test_without_dd_nothing_is_found(disks: Callable[..., None], tmp_path: Path) -> None:
    disks(sda="exit 1")
    (tmp_path / "bin/dd").unlink()

    assert superblocks.devices_with([CRASH]) == {}
    assert not superblocks.some_hang()


def test_more_disks_than_are_asked_at_once(disks: Callable[..., None], ext4: str) -> None:
    disks(**{f"sd{number:02}": "exit 1" for number in range(40)}, sdz=ext4)

    assert superblocks.devices_with([CRASH]) == {CRASH: "/dev/sdz"}
    assert not superblocks.some_hang()


def test_for_several_file_systems_every_disk_is_read_once(
    disks: Callable[..., None], ext4: str, tmp_path: Path
) -> None:
    asked = f'echo "$1" >> {tmp_path}/asked; '
    disks(sda=f"{asked} exit 1", sdb=f"{asked} {ext4}", sdc=f"{asked} {ext4.replace('head', 'other')}")
    other = made(tmp_path, "mkfs.ext4", "-q", "-L", "other")
    (tmp_path / "other").write_bytes(other)
    wanted = [("LABEL", "gone"), CRASH, ("UUID", UUID.upper()), ("LABEL", "other"), ("PARTUUID", "1-2")]

    assert superblocks.devices_with(wanted) == {
        CRASH: "/dev/sdb", ("UUID", UUID.upper()): "/dev/sdb", ("LABEL", "other"): "/dev/sdc",
    }  # fmt: skip

    assert sorted((tmp_path / "asked").read_text().split()) == [f"if=/dev/sd{letter}" for letter in "abc"]
