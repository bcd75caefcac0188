"""A directory of the virtual machine's host, seen from the healthy machine; a real one: tests.guest.test_storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs import targets, virtiofs
from initramfs.devices import Mount
from initramfs.errors import ImageError

from .conftest import Sysfs


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``mount`` and ``umount`` that note their calls; the former fails while there is a file ``gone``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mount", "umount"):
        (programs / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n'
            f'[ {name} = mount ] && [ -e {tmp_path}/gone ] && echo "wrong tag" >&2 && exit 32\nexit 0\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def test_it_is_tried_and_needs_the_modules_of_its_device(
    mount: Path, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.driver("pci0000:00/0000:00:05.0", "virtio_pci")
    sysfs.driver("pci0000:00/0000:00:05.0/virtio3", "virtiofs")
    devices = sysfs.root / "bus/virtio/drivers/virtiofs"
    devices.mkdir(parents=True)
    (devices / "virtio3").symlink_to(sysfs.root / "devices/pci0000:00/0000:00:05.0/virtio3")
    (devices / "module").symlink_to(sysfs.root / "module/virtiofs")
    assert virtiofs.driver_modules(sysfs.root) == ("virtio_pci", "virtiofs")
    monkeypatch.setattr(virtiofs, "driver_modules", lambda: ("virtio_pci", "virtiofs"))
    found = virtiofs.needed("virtiofs:dumps")
    assert {"virtio_pci", "virtiofs"} <= {*found.loaded, *found.built_in}
    tried, over = (mount / "calls").read_text().splitlines()
    assert tried.startswith("mount -t virtiofs dumps /")
    assert over == f"umount {tried.split()[-1]}"


def test_one_that_is_not_offered_is_refused_by_initramfs_and_said_by_load(mount: Path) -> None:
    (mount / "gone").touch()
    with pytest.raises(
        ImageError, match=r"virtiofs:dumps cannot be mounted here: /.*/mount .*: wrong tag; does its host off"
    ):
        virtiofs.needed("virtiofs:dumps")
    said: list[str] = []
    assert virtiofs.named("virtiofs:dumps", said.append) == "virtiofs:dumps"
    assert len(said) == 1


def test_a_tag_is_needed(mount: Path) -> None:
    with pytest.raises(UsageError, match="virtiofs:: a tag is missing"):
        virtiofs.needed("virtiofs:")
    assert not (mount / "calls").exists()


@pytest.mark.usefixtures("mount")
def test_a_crash_directory_on_one_is_its_target() -> None:
    assert targets.named_mount(Mount("dumps", Path("/var/crash"), "/", "virtiofs")) == "virtiofs:dumps"
