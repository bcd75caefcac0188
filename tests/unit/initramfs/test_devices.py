"""What sysfs and mountinfo say about a disk becomes module names; the trees are made the way the kernel makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs.devices import (
    Mount,
    Needed,
    find_device,
    keyboard_modules,
    modules_for_device,
    modules_for_filesystem,
    mount_of,
    path_on_device,
    plain_disk,
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


def volume(sysfs: Sysfs, number: str, name: str, kind: str | None) -> Path:
    """Make a block device that stands on the disk vda, with the folder that its driver adds."""
    disk = virtio_disk(sysfs)
    place = sysfs.block(number, f"virtual/block/{name}")
    (place / "slaves").mkdir()
    (place / "slaves/vda").symlink_to(disk)
    if kind is not None:
        (place / kind).mkdir()
    return place


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("dm-0", "dm", r"device-mapper \(LVM, LUKS, multipath\)"),
        ("md0", "md", r"md \(RAID\)"),
        ("bcache0", None, "vda"),
    ],
)
def test_what_has_to_be_assembled_first_is_refused(sysfs: Sysfs, name: str, kind: str | None, layer: str) -> None:
    volume(sysfs, "253:0", name, kind)

    with pytest.raises(ImageError, match=f"stands on {layer}: the capture kernel cannot .* with --target"):
        modules_for_device(os.makedev(253, 0), sysfs.root)
    with pytest.raises(ImageError, match=f"stands on {layer}"):
        plain_disk(os.makedev(253, 0), sysfs.root)


def test_a_partition_of_a_raid_is_refused_as_well(sysfs: Sysfs) -> None:
    volume(sysfs, "9:0", "md0", "md")
    partition = sysfs.block("259:0", "virtual/block/md0/md0p1")
    (partition / "partition").write_text("1\n")

    with pytest.raises(ImageError, match=r"stands on md \(RAID\)"):
        plain_disk(os.makedev(259, 0), sysfs.root)


def test_a_disk_below_a_volume_is_plain(sysfs: Sysfs) -> None:
    volume(sysfs, "253:0", "dm-0", "dm")
    disk = sysfs.root / "devices/pci0000:00/0000:00:02.0/virtio1/block/vda"
    (disk / "slaves").mkdir()

    assert plain_disk(os.makedev(254, 0), sysfs.root) == disk.resolve()


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


NO_SYSFS = Path("/nowhere")


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    with_space = str(tmp_path / "with space").replace(" ", r"\040")
    path.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/root rw\n"
        f"40 27 0:30 /@crash {with_space} rw - btrfs /dev/vdb rw\n"
        f"41 27 8:1 / {tmp_path}/over rw - ext4 /dev/sda1 rw\n"
        f"42 27 8:2 / {tmp_path}/over rw - xfs /dev/sdb1 rw\n"
    )
    return path


def test_the_mount_of_a_path_that_does_not_exist_yet_is_its_parents(mountinfo: Path, tmp_path: Path) -> None:
    mount = mount_of(tmp_path / "with" / "nothing", mountinfo, NO_SYSFS)

    assert mount == Mount("/dev/root", Path("/"), "/", "ext4")
    assert path_on_device(tmp_path / "with" / "nothing", mount) == str(tmp_path / "with" / "nothing")


def test_blanks_in_mount_points_and_parts_of_file_systems_are_understood(mountinfo: Path, tmp_path: Path) -> None:
    place = tmp_path / "with space"
    place.mkdir()

    mount = mount_of(place / "var", mountinfo, NO_SYSFS)

    assert mount == Mount("/dev/vdb", place, "/@crash", "btrfs")
    assert path_on_device(place / "var/crash", mount) == "/@crash/var/crash"


def test_the_last_mount_on_a_place_is_the_one_that_shows(mountinfo: Path, tmp_path: Path) -> None:
    (tmp_path / "over").mkdir()

    assert mount_of(tmp_path / "over", mountinfo, NO_SYSFS).device == "/dev/sdb1"


def test_a_link_to_another_mount_is_saved_where_it_leads(mountinfo: Path, tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    (tmp_path / "crash").symlink_to("with space/dumps")  # to be made by the capture kernel

    mount = mount_of(tmp_path / "crash", mountinfo, NO_SYSFS)

    assert mount.device == "/dev/vdb"
    assert path_on_device(tmp_path / "crash", mount) == "/@crash/dumps"
    assert path_on_device(tmp_path / "crash/more", mount) == "/@crash/dumps/more"


def test_a_link_within_its_file_system_is_followed(mountinfo: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "crash").symlink_to(tmp_path / "real")

    mount = mount_of(tmp_path / "crash", mountinfo, NO_SYSFS)

    assert path_on_device(tmp_path / "crash", mount) == str(tmp_path / "real")


def test_the_root_device_is_named_by_its_number(mountinfo: Path, tmp_path: Path, sysfs: Sysfs) -> None:
    disk = virtio_disk(sysfs)
    (disk / "uevent").write_text("MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\n")

    assert mount_of(tmp_path, mountinfo, sysfs.root).device == "/dev/vda"


def test_btrfs_has_a_number_of_no_device_and_keeps_its_source(mountinfo: Path, tmp_path: Path, sysfs: Sysfs) -> None:
    virtio_disk(sysfs)
    (tmp_path / "with space").mkdir()

    assert mount_of(tmp_path / "with space", mountinfo, sysfs.root).device == "/dev/vdb"


@pytest.mark.parametrize("target", ["PARTUUID=1-2", "PARTLABEL=crash", "ID=x", "UUID", "vda", "server:/export"])
def test_a_target_that_the_capture_kernel_does_not_know_is_wrong_usage(target: str) -> None:
    with pytest.raises(UsageError, match="only UUID=…, LABEL=… and paths below /dev are known"):
        find_device(target)


@pytest.fixture
def findfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A findfs that knows one label, and says of the others what util-linux's says."""
    program = tmp_path / "findfs"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "LABEL=my crash" ] && echo /dev/vdb && exit\n'
        "echo \"findfs: unable to resolve '$1'\" >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


@pytest.mark.usefixtures("findfs")
def test_findfs_knows_who_carries_a_label() -> None:
    assert find_device("LABEL=my crash") == Path("/dev/vdb")
    assert find_device("UUID=0123") is None


def test_a_path_is_a_device_while_it_is_there() -> None:
    assert find_device("/dev/null") == Path("/dev/null")
    assert find_device("/dev/no=such-disk") is None


def keyboard(sysfs: Sysfs, number: int, device: str, keys: str) -> None:
    place = sysfs.root / "devices" / device / f"input/input{number}"
    (place / "capabilities").mkdir(parents=True)
    (place / "capabilities/key").write_text(f"{keys}\n")
    event = sysfs.root / "class/input" / f"event{number}"
    event.mkdir(parents=True)
    (event / "device").symlink_to(place)


def test_a_keyboard_needs_every_driver_between_the_bus_and_its_keys(sysfs: Sysfs) -> None:
    sysfs.driver("pci0/0000:00:14.0", "xhci_pci")
    sysfs.driver("pci0/0000:00:14.0/usb1/1-1/1-1:1.0", "usbhid")
    sysfs.driver("pci0/0000:00:14.0/usb1/1-1/1-1:1.0/0003:046D:C31C.0001", "hid_generic", loaded=False)
    sysfs.driver("platform/i8042/serio0", "atkbd")
    # What a USB and an AT keyboard show in capabilities/key.
    usb = "1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe"
    keyboard(sysfs, 3, "pci0/0000:00:14.0/usb1/1-1/1-1:1.0/0003:046D:C31C.0001", usb)
    keyboard(sysfs, 4, "platform/i8042/serio0", "402000000 3803078f800d001 feffffdfffefffff fffffffffffffffe")

    assert keyboard_modules(sysfs.root) == ("xhci_pci", "usbhid", "hid_generic", "atkbd")


def test_jacks_buttons_and_mice_are_no_keyboards(sysfs: Sysfs) -> None:
    for number, module, keys in (
        (0, "snd_hda_intel", "0"),
        (1, "button", "10000000000000 0"),  # the power button: KEY_POWER is 116
        (2, "psmouse", "70000 0 0 0 0"),  # BTN_LEFT is 0x110
    ):
        sysfs.driver(f"platform/device{number}", module)
        keyboard(sysfs, number, f"platform/device{number}", keys)

    assert keyboard_modules(sysfs.root) == ()


def test_a_machine_without_input_devices_has_no_keyboard(sysfs: Sysfs) -> None:
    assert keyboard_modules(sysfs.root) == ()
