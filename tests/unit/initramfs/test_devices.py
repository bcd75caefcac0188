"""What sysfs and mountinfo say about a disk becomes module names; the trees are made the way the kernel makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs.devices import (
    Mount,
    find_device,
    keyboard_modules,
    modules_for_filesystem,
    mount_of,
    path_on_device,
)

from .conftest import Sysfs, virtio_disk


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
