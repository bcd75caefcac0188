"""What sysfs and mountinfo say about a disk becomes module names; the trees are made the way the kernel makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from initramfs.devices import (
    Mount,
    Needed,
    modules_for_device,
    modules_for_filesystem,
    mount_of,
    path_on_device,
)
from initramfs.errors import ImageError


class Sysfs:
    """A /sys that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def driver(self, device: str, module: str, *, loaded: bool = True) -> None:
        """Give a device a driver that a module brought."""
        state = self.root / "module" / module
        state.mkdir(parents=True, exist_ok=True)
        if loaded:
            (state / "initstate").write_text("live\n")
        driver = self.root / "bus" / f"driver-{module}"
        driver.mkdir(parents=True, exist_ok=True)
        if not (driver / "module").exists():
            (driver / "module").symlink_to(state)
        (self.root / "devices" / device).mkdir(parents=True, exist_ok=True)
        (self.root / "devices" / device / "driver").symlink_to(driver)

    def block(self, number: str, path: str, device: str | None = None) -> Path:
        """Make a block device, and its entry in dev/block."""
        place = self.root / "devices" / path
        place.mkdir(parents=True)
        if device is not None:
            (place / "device").symlink_to(self.root / "devices" / device)
        entry = self.root / "dev/block" / number
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(place)
        return place


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


def virtio_disk(sysfs: Sysfs) -> Path:
    sysfs.driver("pci0000:00/0000:00:02.0", "virtio_pci")
    sysfs.driver("pci0000:00/0000:00:02.0/virtio1", "virtio_blk")
    return sysfs.block("254:0", "pci0000:00/0000:00:02.0/virtio1/block/vda", "pci0000:00/0000:00:02.0/virtio1")


def test_every_driver_between_the_bus_and_the_disk_counts(sysfs: Sysfs) -> None:
    virtio_disk(sysfs)

    assert modules_for_device(os.makedev(254, 0), sysfs.root) == Needed(("virtio_pci", "virtio_blk"), ())


def test_a_partition_needs_what_its_disk_needs(sysfs: Sysfs) -> None:
    virtio_disk(sysfs)
    partition = sysfs.block("254:1", "pci0000:00/0000:00:02.0/virtio1/block/vda/vda1")
    (partition / "partition").write_text("1\n")

    assert modules_for_device(os.makedev(254, 1), sysfs.root).loaded == ("virtio_pci", "virtio_blk")


def test_a_driver_inside_the_kernel_is_told_apart(sysfs: Sysfs) -> None:
    sysfs.driver("pci0/host0/target0/0:0:0:0", "sd_mod")
    sysfs.driver("pci0", "ahci", loaded=False)
    sysfs.block("8:0", "pci0/host0/target0/0:0:0:0/block/sda", "pci0/host0/target0/0:0:0:0")

    assert modules_for_device(os.makedev(8, 0), sysfs.root) == Needed(("sd_mod",), ("ahci",))


def test_an_encrypted_volume_needs_its_mapper_and_the_disk_below(sysfs: Sysfs) -> None:
    disk = virtio_disk(sysfs)
    volume = sysfs.block("253:0", "virtual/block/dm-0")
    (volume / "slaves").mkdir()
    (volume / "slaves/vda").symlink_to(disk)
    (volume / "dm").mkdir()
    (volume / "dm/uuid").write_text("CRYPT-LUKS2-0123-home\n")

    needed = modules_for_device(os.makedev(253, 0), sysfs.root)

    assert (*needed.loaded, *needed.built_in) == ("virtio_pci", "virtio_blk", "dm-mod", "dm-crypt")


def test_a_raid_needs_its_personality_and_every_disk_below(sysfs: Sysfs) -> None:
    disk = virtio_disk(sysfs)
    raid = sysfs.block("9:0", "virtual/block/md0")
    (raid / "slaves").mkdir()
    (raid / "slaves/vda").symlink_to(disk)
    (raid / "md").mkdir()
    (raid / "md/level").write_text("raid6\n")

    needed = modules_for_device(os.makedev(9, 0), sysfs.root)

    assert (*needed.loaded, *needed.built_in) == ("virtio_pci", "virtio_blk", "md-mod", "raid456")


def test_an_nvme_disk_of_several_paths_needs_its_controllers(sysfs: Sysfs) -> None:
    sysfs.driver("pci0/0000:01:00.0", "nvme")
    (sysfs.root / "devices/pci0/0000:01:00.0/nvme/nvme0").mkdir(parents=True)
    sysfs.block("259:0", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "virtual/nvme-subsystem/nvme-subsys0")
    (sysfs.root / "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0").symlink_to(
        sysfs.root / "devices/pci0/0000:01:00.0/nvme/nvme0"
    )

    assert modules_for_device(os.makedev(259, 0), sysfs.root).loaded == ("nvme",)


def test_a_device_that_the_kernel_does_not_have_is_one_clear_line(sysfs: Sysfs) -> None:
    with pytest.raises(ImageError, match="no block device 7:99"):
        modules_for_device(os.makedev(7, 99), sysfs.root)


def test_a_file_is_no_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="is no block device"):
        modules_for_device(tmp_path / "file")
    with pytest.raises(ImageError, match="is the disk attached"):
        modules_for_device(tmp_path / "missing")


def test_vfat_needs_the_tables_that_it_asks_for_while_mounting(sysfs: Sysfs) -> None:
    needed = modules_for_filesystem("vfat", sysfs.root)

    assert {"vfat", "nls_cp437", "nls_iso8859_1"} <= set(needed.built_in)


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    with_space = str(tmp_path / "with space").replace(" ", r"\040")
    path.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"40 27 0:30 /@crash {with_space} rw - btrfs /dev/vdb rw\n"
        f"41 27 8:1 / {tmp_path}/over rw - ext4 /dev/sda1 rw\n"
        f"42 27 8:2 / {tmp_path}/over rw - xfs /dev/sdb1 rw\n"
    )
    return path


def test_the_mount_of_a_path_that_does_not_exist_yet_is_its_parents(mountinfo: Path, tmp_path: Path) -> None:
    assert mount_of(tmp_path / "with" / "nothing", mountinfo) == Mount("/dev/vda", Path("/"), "/", "ext4")


def test_blanks_in_mount_points_and_parts_of_file_systems_are_understood(mountinfo: Path, tmp_path: Path) -> None:
    place = tmp_path / "with space"
    place.mkdir()

    mount = mount_of(place / "var", mountinfo)

    assert mount == Mount("/dev/vdb", place, "/@crash", "btrfs")
    assert path_on_device(place / "var/crash", mount) == "/@crash/var/crash"


def test_the_last_mount_on_a_place_is_the_one_that_shows(mountinfo: Path, tmp_path: Path) -> None:
    (tmp_path / "over").mkdir()

    assert mount_of(tmp_path / "over", mountinfo).device == "/dev/sdb1"
