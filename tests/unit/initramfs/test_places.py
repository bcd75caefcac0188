"""Where crashes are looked for: wherever the file systems of the targets are mounted, and where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from initramfs import devices, mounting, places, reach, settings
from initramfs.config import Config
from initramfs.devices import Mount
from initramfs.errors import ToolError
from initramfs.places import Place
from tests.faults import loop_device


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Mount, str]]:
    """What is mounted: a test adds to it."""
    found: list[tuple[Mount, str]] = []
    monkeypatch.setattr(devices, "mounts", lambda: iter(found))
    return found


def test_a_path_of_a_device_is_found_where_that_part_of_it_is_mounted(
    mounts: list[tuple[Mount, str]], tmp_path: Path
) -> None:
    device = tmp_path / "sdz1"
    device.touch()
    assert places.mounted(device, "/var/crash") is None
    mounts.append((Mount("/dev/other", Path("/"), "/", "ext4"), "8:1"))
    mounts.append((Mount("tmpfs", Path("/run"), "/", "tmpfs"), "0:20"))
    assert places.mounted(device, "/var/crash") is None
    mounts.append((Mount(f"/dev/../{device}", Path("/home"), "/home", "ext4"), "8:2"))  # a part without it
    assert places.mounted(device, "/var/crash") is None
    mounts.append((Mount(f"/dev/../{device}", Path("/srv/var"), "/var", "ext4"), "8:2"))
    assert places.mounted(device, "/var/crash") == Path("/srv/var/crash")


def test_a_path_that_another_file_system_hides_is_not_the_devices(
    mounts: list[tuple[Mount, str]], tmp_path: Path
) -> None:
    device = tmp_path / "sdz1"
    device.touch()
    mounts.append((Mount(f"/dev/../{device}", Path("/"), "/", "ext4"), "8:2"))
    assert places.mounted(device, "/var/crash") == Path("/var/crash")
    mounts.append((Mount("/dev/other", Path("/var"), "/", "xfs"), "8:3"))
    assert places.mounted(device, "/var/crash") is None
    assert places.mounted(device, "/srv") == Path("/srv")
    mounts.append((Mount(f"/dev/../{device}", Path("/mnt/all"), "/", "ext4"), "8:2"))
    assert places.mounted(device, "/var/crash") == Path("/mnt/all/var/crash")
    mounts.append((Mount("tmpfs", Path("/mnt/all"), "/", "tmpfs"), "0:30"))
    assert places.mounted(device, "/var/crash") is None


def test_a_device_is_known_by_its_number_as_well(
    mounts: list[tuple[Mount, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "vda1"
    device.touch()
    (tmp_path / "class/block/vda1").mkdir(parents=True)
    (tmp_path / "class/block/vda1/dev").write_text("254:1\n")
    monkeypatch.setattr(devices, "SYS", tmp_path)
    mounts.append((Mount("/dev/root", Path("/"), "/", "ext4"), "254:1"))
    assert places.mounted(device, "/var/crash") == Path("/var/crash")


def test_without_a_target_it_is_the_machines_own_directory() -> None:
    with places.places(Config()) as (found, lines):
        assert found == [Place(Path("/var/crash"), "/var/crash")]
        assert lines == []
    with places.places(Config(path="/srv/crash", targets=("nfs:server:/export", "raw:/dev/vdz"))) as (found, lines):
        assert [place.shown for place in found] == ["/srv/crash", "/var/crash"]
        assert [line.partition(": ")[0] for line in lines] == ["nfs:server:/export", "raw:/dev/vdz"]


def test_a_directory_that_is_a_link_to_itself_is_no_end_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with places.places(Config(path=str(tmp_path / "loop"))) as (found, _):
        assert found[0].shown == str(tmp_path / "loop")


def test_a_disk_that_is_not_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    with places.places(Config(targets=("UUID=1",))) as (_, lines):
        assert lines == ["UUID=1: it is not attached now"]


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[Path]:
    """A block device with an ext4 file system, which nobody has mounted."""
    with loop_device(tmp_path / "disk", 16 << 20) as device:
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", device], check=True)
        yield device


def test_what_is_not_mounted_is_mounted_read_only_for_a_moment(
    loop_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "CRASH_DIRECTORY", tmp_path / "none")
    target = str(loop_disk)
    try:
        with mounting.mounted_for_now(loop_disk, "rw") as root:
            (root / "var/crash").mkdir(parents=True)
    except ToolError:
        pytest.skip("nothing may be mounted here")
    with places.places(Config(targets=(target,), path="/var/crash")) as (found, lines):
        assert lines == []
        (place,) = [place for place in found if place.shown == f"{target}:/var/crash"]
        assert place.path.is_dir()
        with pytest.raises(OSError, match="Read-only"):
            (place.path / "x").touch()
    assert not place.path.exists()
    with mounting.mounted_for_now(loop_disk, "rw") as root:
        (root / "var/link").symlink_to("/var/crash")
    with places.places(Config(targets=(target,), path="/var/link")) as (_, lines):
        assert lines == [f"{target}: /var/link on it is a symbolic link to /var/crash: {lines[0].rpartition(': ')[2]}"]
    known = reach.reach(target, "/var/crash")
    assert known.reached
    assert known.what == f"{target}, not mounted"
    assert 8 << 20 < (known.free or 0) < (known.total or 0) <= 16 << 20
    with mounting.mounted_for_now(loop_disk, "rw") as root:
        volume = os.statvfs(root)
        known = reach.reach(target, "/var/crash")
        assert known.what == target
        assert known.free == volume.f_bfree * volume.f_frsize


def test_a_path_on_btrfs_is_counted_from_its_root_as_the_capture_kernel_does(tmp_path: Path) -> None:
    if shutil.which("mkfs.btrfs") is None or shutil.which("btrfs") is None:
        pytest.skip("btrfs-progs are not installed")
    with loop_device(tmp_path / "disk", 128 << 20) as device:
        subprocess.run(["mkfs.btrfs", "-q", "-f", device], check=True, capture_output=True)
        try:
            with mounting.mounted_for_now(device, "rw") as root:
                subprocess.run(["btrfs", "subvolume", "create", root / "snapshot"], check=True, capture_output=True)
                subprocess.run(
                    ["btrfs", "subvolume", "set-default", root / "snapshot"], check=True, capture_output=True
                )
                (root / "snapshot/crash").mkdir()
        except ToolError:
            pytest.skip("no btrfs may be mounted here")
        with places.opened(str(device), "/snapshot/crash", "ro") as place:
            assert place.path.is_dir()
