"""Asks the healthy system what a block device stands on: disks, md arrays, logical volumes of LVM, one on another.

What the capture kernel cannot put together is refused here, while somebody is there to choose another target. The image
gets the programs that put the rest together, and for each volume a file that says which (capture.boot.volumes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capture.boot.volumes import LVM, MD, VOLUMES, lvm_uuid
from initramfs import devices, tools
from initramfs.devices import SYS, Needed
from initramfs.errors import ImageError, ToolError

LVM_CONF = b"""\
# For the capture kernel: no udev to wait for, nothing to be written but the volume that is activated, and no memory set
# aside for the moment when that is suspended.
devices {
    dir = "/dev"
    scan = [ "/dev" ]
    obtain_device_list_from_udev = 0
    external_device_info_source = "none"
    use_devicesfile = 0
    hints = "none"
    multipath_component_detection = 0
    md_component_detection = 1
    md_component_checks = "full"
}
activation {
    udev_sync = 0
    udev_rules = 0
    verify_udev_operations = 0
    monitoring = 0
    activation_mode = "degraded"
    reserved_memory = 0
    reserved_stack = 0
    use_mlockall = 0
}
global {
    metadata_read_only = 1
    locking_dir = "/run/lvm"
    use_lvmlockd = 0
    use_lvmpolld = 0
    event_activation = 0
    thin_check_executable = ""
    notify_dbus = 0
}
backup {
    backup = 0
    archive = 0
}
log {
    silent = 0
    syslog = 0
}
"""
REMEDY = "name a plain partition, a logical volume or an array with --target, or a server (nfs:, ssh:)"
_RAID = {
    "linear": "linear", "raid0": "raid0", "raid1": "raid1", "raid10": "raid10",
    "raid4": "raid456", "raid5": "raid456", "raid6": "raid456",
}  # fmt: skip
"""RAID level → its module (drivers/md). dm-raid asks for it by name while it is mapped."""
_TYPES = {
    "linear": (), "striped": (), "raid": ("dm_raid",), "thin": ("dm_thin_pool",), "thin-pool": ("dm_thin_pool",),
}  # fmt: skip
"""What a logical volume may be mapped with (``dmsetup table``) → modules besides dm_mod."""
_WHY_NOT = {
    "mirror": "a mirror of the old type (lvconvert --type raid1 makes a new one of it)",
    "snapshot": "a snapshot, whose tables may take more memory than there is",
    "snapshot-origin": "of which there are snapshots, whose tables may take more memory than there is",
}
_UUID = 32
"""Characters of a UUID of LVM, without dashes; a logical volume has its group's and its own (``LVM-…`` in dm/uuid)."""


class _Part(NamedTuple):
    """One layer: modules and programs that it takes, and what the capture kernel is told of it where it has to act."""

    modules: tuple[str, ...] = ()
    binaries: tuple[Path, ...] = ()
    kind: str = ""
    identity: str = ""
    name: str = ""


def needed_by_device(device: Path | int, sys: Path = SYS) -> Needed:
    """Return what the image has to hold for a block device: its path, or its device number.

    Raises:
        ImageError: it is none, or the capture kernel could not put together what it stands on.
        ToolError: a program that is asked, or that the image needs, is not installed.
    """
    parts = tuple(dict.fromkeys(_Layers(device, sys).parts()))
    files = [
        (f"{VOLUMES}/{number}-{part.identity}", f"{part.kind} {part.identity} {part.name}\n".encode())
        for number, part in enumerate(part for part in parts if part.kind)
    ]
    if any(part.kind == LVM for part in parts):
        files.append(("/etc/lvm/lvm.conf", LVM_CONF))
    return devices.needed((name for part in parts for name in part.modules), sys) + Needed(
        binaries=tuple(dict.fromkeys(path for part in parts for path in part.binaries)), files=tuple(files)
    )


def stable_name(device: Path, sys: Path = SYS) -> str | None:
    """Return the name that a device has in another kernel, too: that of a logical volume; None for others."""
    mapped = devices.block_directory(device, sys) / "dm/name"
    return f"/dev/mapper/{_line(mapped)}" if mapped.exists() else None


class _Layers:
    """What a block device stands on. ``asked`` is what the administrator named."""

    def __init__(self, asked: Path | int, sys: Path) -> None:
        self._asked = asked
        self._sys = sys

    def parts(self) -> Iterator[_Part]:
        """Yield the layers, each after what it stands on."""
        return self._walk(devices.block_directory(self._asked, self._sys), group="")

    def _walk(self, block: Path, group: str) -> Iterator[_Part]:
        """``group``: the UUID of the volume group of which the layer above is a logical volume."""
        disk = devices.disk_of(block)
        below = [link.resolve() for link in sorted((disk / "slaves").glob("*"))]
        own_group = ""
        if (disk / "dm").exists():
            part = self._logical_volume(disk)
            own_group = part.identity[len("LVM-") :][:_UUID]
            if own_group == group:  # (a leg of a mirror, a thin pool: it comes with what is above)
                part = _Part(part.modules)
            elif disk != block:
                raise self._cannot(f"a partition inside of {part.name}, a logical volume")
        elif (disk / "md").exists():
            part = self._array(disk)
        elif below:
            raise self._cannot(" and ".join(path.name for path in below))
        elif not devices.has_hardware(disk, self._sys):
            raise self._cannot(
                f"{disk.name}, no disk of this machine's hardware (a file, iSCSI, nbd, NVMe over a network)"
            )
        else:
            part = _Part(tuple(devices.disk_modules(disk, self._sys)))
        for path in below:
            yield from self._walk(path, own_group)
        yield part

    def _cannot(self, what: str) -> ImageError:
        return ImageError(f"{self._asked} stands on {what}: the capture kernel cannot put that together; {REMEDY}")

    def _logical_volume(self, block: Path) -> _Part:
        """Return the logical volume that a device-mapper device is.

        Raises:
            ImageError: it is something else, or of a type that cannot be activated.
        """
        identity, name = _line(block / "dm/uuid"), _line(block / "dm/name")
        if identity.startswith("CRYPT-"):
            raise ImageError(
                f"{self._asked} stands on {name}, which is encrypted (LUKS): nobody gives the capture kernel its key; "
                f"{REMEDY}, and have the dump itself encrypted: --recipients"
            )
        if not identity.startswith("LVM-"):
            what = "multipath" if "mpath-" in identity else "device-mapper, but not LVM"
            raise self._cannot(f"{name} ({what})")
        modules = ["dm_mod"]
        for row in tools.run([self._tool("dmsetup", "dmsetup"), "table", name]).splitlines():
            kind, *rest = row.split()[2:]
            if kind not in _TYPES:
                raise self._cannot(f"{name}, {_WHY_NOT.get(kind, f'mapped by dm-{kind}')}")
            modules += _TYPES[kind]
            if kind == "raid":
                modules.append(self._raid_module(rest[0], name))
        lvm = self._tool("lvm", "lvm2")
        group = lvm_uuid(identity[: len("LVM-") + _UUID])
        said = tools.run([lvm, "vgs", "--noheadings", "-o", "vg_systemid,vg_lock_type", "-S", f"vg_uuid={group}"])
        if said.strip() not in ("", "none"):
            raise self._cannot(f"{name}, whose volume group belongs to a system or a cluster ({said.strip()})")
        return _Part(tuple(modules), (lvm,), LVM, identity, name)

    def _array(self, block: Path) -> _Part:
        """Return the md array of a directory in sysfs.

        Raises:
            ImageError: it needs more than mdadm to be used.
        """
        if _line(block / "md/metadata_version").startswith("external"):
            raise self._cannot(f"{block.name}, an array of the firmware's (IMSM or DDF)")
        mdadm = self._tool("mdadm", "mdadm")
        said = tools.run([mdadm, "--detail", "--export", f"/dev/{block.name}"])
        found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        if "MD_UUID" not in found:
            raise self._cannot(f"{block.name}, an array without a superblock")
        module = self._raid_module(_line(block / "md/level"), block.name)
        return _Part(("md_mod", module), (mdadm,), MD, found["MD_UUID"], block.name)

    def _raid_module(self, level: str, name: str) -> str:
        """Return the module of a level: ``raid1`` of md, ``raid6_zr`` of device-mapper."""
        module = _RAID.get(level.partition("_")[0])
        if module is None:
            raise self._cannot(f"{name}, of RAID level {level}")
        return module

    def _tool(self, name: str, package: str) -> Path:
        try:
            return tools.require(name, package)
        except ToolError as error:
            raise ToolError(f"{self._asked} cannot be put together in the capture kernel: {error}") from None


def _line(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
