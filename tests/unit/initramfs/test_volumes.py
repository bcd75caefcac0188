"""What a block device stands on: sysfs as the kernel makes it, and what mdadm, lvm and dmsetup print.

Real volumes, put together by a real capture kernel: tests.guest.test_storage.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from initramfs import tools
from initramfs.devices import Needed
from initramfs.errors import ImageError, ToolError
from initramfs.volumes import LVM_CONF, needed_by_device, stable_name

from .conftest import Sysfs, virtio_disk


def test_every_driver_between_the_bus_and_the_disk_counts(sysfs: Sysfs) -> None:
    virtio_disk(sysfs)

    assert needed_by_device(os.makedev(254, 0), sysfs.root) == Needed(("virtio_pci", "virtio_blk"), ())


def test_a_partition_needs_what_its_disk_needs(sysfs: Sysfs) -> None:
    virtio_disk(sysfs)
    partition = sysfs.block("254:1", "pci0000:00/0000:00:02.0/virtio1/block/vda/vda1")
    (partition / "partition").write_text("1\n")

    assert needed_by_device(os.makedev(254, 1), sysfs.root).loaded == ("virtio_pci", "virtio_blk")


def test_a_driver_inside_the_kernel_is_told_apart(sysfs: Sysfs) -> None:
    sysfs.driver("pci0/host0/target0/0:0:0:0", "sd_mod")
    (sysfs.root / "bus/scsi").mkdir(parents=True)
    (sysfs.root / "devices/pci0/host0/target0/0:0:0:0/subsystem").symlink_to(sysfs.root / "bus/scsi")
    sysfs.driver("pci0", "ahci", loaded=False)
    sysfs.block("8:0", "pci0/host0/target0/0:0:0:0/block/sda", "pci0/host0/target0/0:0:0:0")

    assert needed_by_device(os.makedev(8, 0), sysfs.root) == Needed(("sd_mod",), ("ahci",))


def test_an_nvme_disk_of_several_paths_needs_its_controllers(sysfs: Sysfs) -> None:
    sysfs.driver("pci0/0000:01:00.0", "nvme")
    (sysfs.root / "devices/pci0/0000:01:00.0/nvme/nvme0").mkdir(parents=True)
    sysfs.block("259:0", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "virtual/nvme-subsystem/nvme-subsys0")
    (sysfs.root / "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0").symlink_to(
        sysfs.root / "devices/pci0/0000:01:00.0/nvme/nvme0"
    )

    assert needed_by_device(os.makedev(259, 0), sysfs.root).loaded == ("nvme",)


def test_what_no_hardware_of_this_machine_brings_is_refused(sysfs: Sysfs) -> None:
    """A file, a disk of NVMe over fabrics, and one of iSCSI in software: each as the kernel's sysfs has it."""
    sysfs.block("7:0", "virtual/block/loop0")
    (sysfs.root / "devices/virtual/nvme-fabrics/ctl/nvme0").mkdir(parents=True)
    sysfs.block("259:0", "virtual/nvme-fabrics/ctl/nvme0/nvme0n1", "virtual/nvme-fabrics/ctl/nvme0")
    iscsi = "platform/host5/session1/target5:0:0/5:0:0:1"
    sysfs.driver(iscsi, "sd_mod")
    (sysfs.root / "bus/scsi").mkdir(parents=True)
    (sysfs.root / "devices" / iscsi / "subsystem").symlink_to(sysfs.root / "bus/scsi")
    sysfs.block("8:0", f"{iscsi}/block/sda", iscsi)

    for major, name in ((7, "loop0"), (259, "nvme0n1"), (8, "sda")):
        with pytest.raises(
            ImageError, match=rf"{name}, no disk of this machine's hardware \(a file, iSCSI, .*{REMEDY}"
        ):
            needed_by_device(os.makedev(major, 0), sysfs.root)


def test_a_device_that_the_kernel_does_not_have_is_one_clear_line(sysfs: Sysfs) -> None:
    with pytest.raises(ImageError, match="no block device 7:99"):
        needed_by_device(os.makedev(7, 99), sysfs.root)


def test_a_file_is_no_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="is no block device"):
        needed_by_device(tmp_path / "file")
    with pytest.raises(ImageError, match="is the disk attached"):
        needed_by_device(tmp_path / "missing")


GROUP, VOLUME = "gF4dT2zBq8mXnYw1RkLpJh6VsC3uE9aN", "aB3cD5eF7gH9iJ1kL3mN5oP7qR9sT1uV"
ARRAY = "8a1b2c3d:4e5f6071:8293a4b5:c6d7e8f9"
Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """``programs(lvm="echo x")``: shell scripts for programs, and no others to be found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", str(folder))

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


def on(sysfs: Sysfs, number: str, name: str, *below: Path) -> Path:
    """Make a block device that stands on others."""
    place = sysfs.block(number, f"virtual/block/{name}")
    (place / "slaves").mkdir()
    (place / "holders").mkdir()
    for path in below:
        (place / "slaves" / path.name).symlink_to(path)
    return place


def mapped(sysfs: Sysfs, number: str, name: str, uuid: str, *below: Path) -> Path:
    place = on(sysfs, f"253:{number}", f"dm-{number}", *below)
    (place / "dm").mkdir()
    (place / "dm/name").write_text(f"{name}\n")
    (place / "dm/uuid").write_text(f"{uuid}\n")
    return place


def array(sysfs: Sysfs, level: str, *below: Path, metadata: str = "1.2") -> Path:
    place = on(sysfs, "9:7", "md7", *below)
    (place / "md").mkdir()
    (place / "md/level").write_text(f"{level}\n")
    (place / "md/metadata_version").write_text(f"{metadata}\n")
    return place


def number_of(place: Path) -> int:
    """The number of a device that ``mapped`` or ``array`` made."""
    return os.makedev(253, int(place.name[3:])) if place.name.startswith("dm-") else os.makedev(9, 7)


LVM_SAYS = {"lvm": "echo '  '"}
MDADM_SAYS = {"mdadm": f'[ "$*" = "--detail --export /dev/md7" ] || exit 9; echo MD_LEVEL=x; echo MD_UUID={ARRAY}'}


def test_a_logical_volume_on_an_array_needs_both_and_their_disks(sysfs: Sysfs, programs: Programs) -> None:
    disk = virtio_disk(sysfs)
    volume = mapped(sysfs, "0", "vg-crash", f"LVM-{GROUP}{VOLUME}", array(sysfs, "raid1", disk))
    programs(dmsetup='[ "$*" = "table vg-crash" ] && echo 0 2097152 linear 9:7 2048', **LVM_SAYS, **MDADM_SAYS)

    found = needed_by_device(number_of(volume), sysfs.root)

    assert found.loaded == ("virtio_pci", "virtio_blk")
    assert found.built_in == ("md_mod", "raid1", "dm_mod")
    assert [path.name for path in found.binaries] == ["mdadm", "lvm"]
    assert dict(found.files) == {
        f"/etc/vmcapture/volumes/0-{ARRAY}": f"md {ARRAY} md7\n".encode(),
        f"/etc/vmcapture/volumes/1-LVM-{GROUP}{VOLUME}": f"lvm LVM-{GROUP}{VOLUME} vg-crash\n".encode(),
        "/etc/lvm/lvm.conf": LVM_CONF,
    }


@pytest.mark.parametrize(
    ("table", "modules"),
    [
        ("raid raid1 3 0 region_size 4096 2 253:1 253:2 253:3 253:4", {"dm_raid", "raid1"}),
        ("raid raid6_zr 3 128 region_size 4096 4 - -", {"dm_raid", "raid456"}),
        ("thin 253:1 1", {"dm_thin_pool"}),
        ("striped 2 128 254:0 2048 254:16 2048", set()),
    ],
)
def test_each_type_has_its_modules_and_only_what_is_on_top_is_activated(
    table: str, modules: set[str], sysfs: Sysfs, programs: Programs
) -> None:
    """Legs of a mirror and thin pools come with the volume; they are of the same group."""
    part = mapped(sysfs, "1", "vg-part", f"LVM-{GROUP}{VOLUME[::-1]}", virtio_disk(sysfs))
    volume = mapped(sysfs, "4", "vg-crash", f"LVM-{GROUP}{VOLUME}", part)
    programs(
        dmsetup=f"case $2 in vg-crash) echo 0 2097152 {table};; *) echo 0 2097152 linear 254:0 2048;; esac", **LVM_SAYS
    )

    found = needed_by_device(number_of(volume), sysfs.root)

    assert set(found.built_in) == {"dm_mod", *modules}
    assert [place for place, _ in found.files if "volumes" in place] == [
        f"/etc/vmcapture/volumes/0-LVM-{GROUP}{VOLUME}"
    ]


def test_a_group_on_a_volume_of_another_group_has_two_volumes_to_activate(sysfs: Sysfs, programs: Programs) -> None:
    lower = mapped(sysfs, "1", "outer-lv", f"LVM-{GROUP[::-1]}{VOLUME}", virtio_disk(sysfs))
    volume = mapped(sysfs, "2", "vg-crash", f"LVM-{GROUP}{VOLUME}", lower)
    programs(dmsetup="echo 0 2097152 linear 254:0 2048", **LVM_SAYS)

    files = dict(needed_by_device(number_of(volume), sysfs.root).files)

    assert files[f"/etc/vmcapture/volumes/0-LVM-{GROUP[::-1]}{VOLUME}"] == (
        f"lvm LVM-{GROUP[::-1]}{VOLUME} outer-lv\n".encode()
    )
    assert f"/etc/vmcapture/volumes/1-LVM-{GROUP}{VOLUME}" in files


REMEDY = "name a plain partition, a logical volume or an array with --target, or a server"


def test_encryption_below_is_refused_with_what_to_do(sysfs: Sysfs, programs: Programs) -> None:
    crypt = mapped(sysfs, "0", "sda3_crypt", "CRYPT-LUKS2-0123-sda3_crypt", virtio_disk(sysfs))
    volume = mapped(sysfs, "1", "vg-root", f"LVM-{GROUP}{VOLUME}", crypt)
    programs(dmsetup="echo 0 2097152 linear 253:0 2048", **LVM_SAYS)

    with pytest.raises(
        ImageError, match=rf"stands on sda3_crypt, which is encrypted \(LUKS\): .*{REMEDY}.*--recipients"
    ):
        needed_by_device(number_of(volume), sysfs.root)


@pytest.mark.parametrize(
    ("uuid", "table", "reason"),
    [
        ("mpath-360000", "multipath 0", r"x \(multipath\)"),
        ("part1-mpath-360000", "linear 253:0 0", r"x \(multipath\)"),
        ("", "linear 254:0 0", r"x \(device-mapper, but not LVM\)"),
        (f"LVM-{GROUP}{VOLUME}", "cache 253:1 253:2", "x, mapped by dm-cache"),
        (f"LVM-{GROUP}{VOLUME}", "snapshot-origin 253:1", "x, of which there are snapshots"),
        (f"LVM-{GROUP}{VOLUME}", "mirror core 1 1024 2", r"x, a mirror of the old type \(lvconvert"),
        (f"LVM-{GROUP}{VOLUME}", "raid raid7 1", "x, of RAID level raid7"),
    ],
)
def test_what_the_capture_kernel_cannot_put_together_is_refused(
    uuid: str, table: str, reason: str, sysfs: Sysfs, programs: Programs
) -> None:
    volume = mapped(sysfs, "0", "x", uuid, virtio_disk(sysfs))
    programs(dmsetup=f"echo 0 2097152 {table}", **LVM_SAYS)

    with pytest.raises(ImageError, match=f"stands on {reason}.*: the capture kernel cannot put that.*; {REMEDY}"):
        needed_by_device(number_of(volume), sysfs.root)


@pytest.mark.parametrize(
    ("metadata", "level", "says", "reason"),
    [
        ("external:/md127/0", "raid1", "exit 0", "an array of the firmware's"),
        ("none", "raid1", "echo MD_LEVEL=raid1", "an array without a superblock"),
        ("1.2", "multipath", MDADM_SAYS["mdadm"], "of RAID level multipath"),
    ],
)
def test_an_array_that_takes_more_than_mdadm_is_refused(
    metadata: str, level: str, says: str, reason: str, sysfs: Sysfs, programs: Programs
) -> None:
    place = array(sysfs, level, virtio_disk(sysfs), metadata=metadata)
    programs(mdadm=says)

    with pytest.raises(ImageError, match=f"stands on md7, {reason}.*{REMEDY}"):
        needed_by_device(number_of(place), sysfs.root)


def test_what_else_stands_on_disks_is_refused(sysfs: Sysfs) -> None:
    on(sysfs, "252:0", "bcache0", virtio_disk(sysfs))

    with pytest.raises(ImageError, match="stands on vda: the capture kernel cannot put that together"):
        needed_by_device(os.makedev(252, 0), sysfs.root)


@pytest.mark.parametrize("owner", ["  host7 ", "   sanlock"])
def test_a_group_that_belongs_to_somebody_is_refused(owner: str, sysfs: Sysfs, programs: Programs) -> None:
    volume = mapped(sysfs, "0", "vg-crash", f"LVM-{GROUP}{VOLUME}", virtio_disk(sysfs))
    programs(dmsetup="echo 0 2097152 linear 254:0 2048", lvm=f"echo '{owner}'")

    with pytest.raises(ImageError, match=rf"belongs to a system or a cluster \({owner.strip()}\)"):
        needed_by_device(number_of(volume), sysfs.root)


def test_a_program_that_is_not_there_is_a_line(sysfs: Sysfs, programs: Programs) -> None:
    disk = virtio_disk(sysfs)
    volume = mapped(sysfs, "0", "vg-crash", f"LVM-{GROUP}{VOLUME}", array(sysfs, "raid1", disk))
    line = "cannot be put together in the capture kernel: {} was not found: install {}"
    for there, missing in (
        ({}, line.format("dmsetup", "dmsetup")),
        ({"dmsetup": "echo 0 2097152 linear 9:7 2048"}, line.format("lvm", "lvm2")),
        (LVM_SAYS, line.format("mdadm", "mdadm")),
    ):
        programs(**there)
        with pytest.raises(ToolError, match=missing):
            needed_by_device(number_of(volume), sysfs.root)


def test_only_a_logical_volume_keeps_its_name(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = virtio_disk(sysfs)
    volume = mapped(sysfs, "0", "vg-crash", f"LVM-{GROUP}{VOLUME}", disk)
    places = {Path("/dev/dm-0"): volume, Path("/dev/vda"): disk}
    monkeypatch.setattr("initramfs.devices.block_directory", lambda device, _sys: places[device])

    assert stable_name(Path("/dev/dm-0"), sysfs.root) == "/dev/mapper/vg-crash"
    assert stable_name(Path("/dev/vda"), sysfs.root) is None
