"""Asks the healthy system what the crash target will need: the modules behind a block device and its file system.

sysfs knows the driver of every device between a disk and the root of the bus tree. What stands on other block devices
is taken apart by initramfs.volumes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from capture.boot.volumes import tops
from capture.errors import UsageError
from initramfs import tools
from initramfs.errors import ImageError, ToolError

SYS = Path("/sys")
BY_UUID = Path("/dev/disk/by-uuid")
TAGS = ("UUID", "LABEL")  # what findfs knows in every busybox

# A file system that asks for more modules while it mounts (request_module), by the kernel's defaults in fs/fat/Kconfig.
ASKED_FOR_AT_MOUNT = {"vfat": ("nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8")}
KEY_ENTER = 28  # include/uapi/linux/input-event-codes.h


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system: its device, where it is mounted, which part of it, its type."""

    device: str
    point: Path
    root: str
    kind: str


@dataclass(frozen=True, slots=True)
class Needed:
    """What an image has to hold for something: kernel modules first of all.

    Module names: ``loaded`` now as modules, or part of the running kernel (another kernel may have them as modules).
    ``binaries`` go in with their shared objects; ``files`` are (path in the image, host file or the bytes themselves).
    """

    loaded: tuple[str, ...] = ()
    built_in: tuple[str, ...] = ()
    binaries: tuple[Path, ...] = ()
    files: tuple[tuple[str, Path | bytes], ...] = ()

    def __add__(self, other: Needed) -> Needed:
        return Needed(
            (*self.loaded, *other.loaded),
            (*self.built_in, *other.built_in),
            (*self.binaries, *other.binaries),
            (*self.files, *other.files),
        )


def mount_of(path: Path, mountinfo: Path = Path("/proc/self/mountinfo"), sys: Path = SYS) -> Mount:
    """Return the mount that holds the path, or its nearest existing parent; links are followed."""
    place = Path(os.path.realpath(path))  # (Path.resolve() does not survive a link to itself)
    while not place.exists():
        place = place.parent
    best: Mount | None = None
    number = ""
    for mount, its_number in mounts(mountinfo):
        # A later mount on the same place hides the earlier one.
        if place.is_relative_to(mount.point) and (best is None or len(mount.point.parts) >= len(best.point.parts)):
            best, number = mount, its_number
    if best is None:
        raise ImageError(f"{path}: no mounted file system holds it")
    # The kernel calls what it mounted itself /dev/root, and no such node exists.
    return best if Path(best.device).exists() else replace(best, device=_name_of(number, sys) or best.device)


def mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> Iterator[tuple[Mount, str]]:
    """Yield what is mounted, with its device number (``253:1``), in the order in which it was."""
    for line in mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        point, root = Path(_unescape(fields[4])), _unescape(fields[3])
        yield Mount(device=_unescape(kind[1]), point=point, root=root, kind=kind[0]), fields[2]


def _name_of(number: str, sys: Path) -> str | None:
    """Return the node of a device number; None for an anonymous one (0:N: btrfs, tmpfs)."""
    uevent = sys / "dev/block" / number / "uevent"
    for line in uevent.read_text(encoding="utf-8").splitlines() if uevent.exists() else ():
        key, _, value = line.partition("=")
        if key == "DEVNAME":
            return f"/dev/{value}"
    return None


def path_on_device(path: Path, mount: Mount) -> str:
    """Return where a path of the running system is, counted from the root of its file system; links are followed."""
    return str(Path(mount.root) / Path(os.path.realpath(path)).relative_to(mount.point))


def find_device(target: str, tags: Collection[str] = TAGS) -> Path | None:
    """Return the device node of ``/dev/…`` or ``TAG=…``, one of ``tags``; None when this machine has none now."""
    if target.startswith("/dev/"):
        return Path(target) if Path(target).exists() else None
    tag, separator, _ = target.partition("=")
    if not separator or tag not in tags:
        known = ", ".join(f"{tag}=…" for tag in tags)
        raise UsageError(f"{target}: as a target only {known} and paths below /dev are known")
    findfs = tools.require("findfs", "util-linux")
    try:
        return Path(tops(tools.run([findfs, target]).strip())[0])  # (a busybox finds the leg of a mirror as well)
    except ToolError:
        return None


def all_with_label(label: str) -> list[Path]:
    """Return all devices with a file system of that label, of which udev has a link to one only.

    Raises:
        ToolError: there is no blkid.
    """
    # 2: there are none. What is in its cache may be gone.
    command: list[str | Path] = [
        tools.require("blkid", "util-linux"),
        "-c",
        "/dev/null",
        "-o",
        "device",
        "-t",
        f"LABEL={label}",
    ]
    return [Path(device) for device in dict.fromkeys(tops(name)[0] for name in tools.run(command, good=(0, 2)).split())]


def absent(target: str) -> str:
    """Return the line for a target that is not there."""
    return f"{target}: no block device of this machine carries it now"


def uuid_of(device: str) -> str | None:
    """Return the UUID of the file system on a device, if it has one."""
    node = Path(device)
    if not node.exists():
        return None
    for link in sorted(BY_UUID.iterdir()) if BY_UUID.is_dir() else ():
        if link.resolve() == node.resolve():
            return link.name
    return _tags(device).get("UUID")


def filesystem_of(device: str) -> str | None:
    """Return the type of the file system on a device that need not be mounted."""
    return _tags(device).get("TYPE")


def other_use_of(device: str) -> str | None:
    """Return the type of what is on a device and is no file system; None where one is, or where nobody knows."""
    blkid = tools.find("blkid")
    try:
        said = "" if blkid is None else tools.run([blkid, "-p", "-o", "export", device])
    except ToolError:  # there is nothing that it knows, or more than one thing; or it is a busybox's, which has no -p
        return None
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    kind = found.get("TYPE")
    if kind is None or (found.get("USAGE", "filesystem") == "filesystem" and not kind.endswith("_member")):
        return None  # (zfs_member passes for a file system)
    return kind


def _tags(device: str) -> dict[str, str]:
    """Return what blkid says of a device; util-linux and busybox print it alike: ``/dev/vdb: UUID="…" TYPE="ext4"``."""
    blkid = tools.find("blkid")
    if blkid is None:
        return {}
    try:
        said = tools.run([blkid, device])
    except ToolError:  # there is nothing that it knows
        return {}
    return dict(re.findall(r' (\w+)="([^"]*)"', said))


def needed(names: Iterable[str], sys: Path = SYS) -> Needed:
    """Tell the loaded modules of these from those that are built in, in their order."""
    names = tuple(dict.fromkeys(names))
    loaded = tuple(name for name in names if is_loaded(name, sys))
    return Needed(loaded, tuple(name for name in names if name not in loaded))


def block_directory(device: Path | int, sys: Path = SYS) -> Path:
    """Return the directory in sysfs of a block device: its path, or its device number.

    Raises:
        ImageError: it is none.
    """
    number = device if isinstance(device, int) else _number(device)
    place = sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not place.exists():
        raise ImageError(f"{device}: the kernel shows no block device {place.name} in {place.parent}")
    return place.resolve()


def disk_of(block: Path) -> Path:
    """Return the directory in sysfs of the disk that the block device of ``block`` is, or is a part of."""
    return block.parent if (block / "partition").exists() else block


def keyboard_modules(sys: Path = SYS) -> tuple[str, ...]:
    """Return the modules behind the keyboards of this machine, which its rescue shell will need."""
    names: dict[str, None] = {}
    for link in sorted((sys / "class/input").glob("event*/device")):
        if _is_keyboard(link):
            names.update(dict.fromkeys(driver_modules(link.resolve(), sys)))
    return tuple(names)


def _is_keyboard(device: Path) -> bool:
    """Tell a keyboard from the jacks of a sound card, power buttons and the like: those have no Enter key."""
    bitmap = device / "capabilities/key"  # words in hexadecimal, the lowest keys in the last one
    words = bitmap.read_text(encoding="utf-8").split() if bitmap.exists() else []
    return bool(words) and bool(int(words[-1], 16) >> KEY_ENTER & 1)


def modules_for_filesystem(kind: str, sys: Path = SYS) -> Needed:
    """Return the modules that mounting a file system of this type takes."""
    kind = kind.partition(".")[0]
    companions = ASKED_FOR_AT_MOUNT.get(kind, ())
    if is_loaded(kind, sys):
        return Needed((kind,), companions)
    return Needed((), (kind, *companions))


def is_loaded(name: str, sys: Path = SYS) -> bool:
    """Tell a loaded module from a built-in one: only the former has a state."""
    return (sys / "module" / name.replace("-", "_") / "initstate").exists()


def _number(device: Path) -> int:
    try:
        status = device.stat()
    except OSError as error:
        raise ImageError(f"{device}: {error.strerror}; is the disk attached?") from error
    if not stat.S_ISBLK(status.st_mode):
        raise ImageError(f"{device} is no block device")
    return status.st_rdev


def disk_modules(disk: Path, sys: Path = SYS) -> Iterator[str]:
    """Yield the modules of a disk, a directory in sysfs, from the bus down to it."""
    for device in (*_controllers(disk), (disk / "device").resolve()):
        yield from driver_modules(device, sys)


def _controllers(disk: Path) -> list[Path]:
    """Return those of a disk with several paths (NVMe), which hangs below no bus: its subsystem lists them."""
    return [link.resolve() for link in sorted(disk.parent.glob("nvme*")) if link.is_symlink()]


def has_hardware(disk: Path, sys: Path = SYS) -> bool:
    """Tell whether a driver brings a disk, a directory in sysfs, from the hardware of this machine.

    Nothing does so for a file (loop) or what is fetched over a network by the kernel itself (nbd, NVMe over fabrics). A
    SCSI disk has a driver of its own (sd) in any case; what counts is its adapter, and iSCSI in software has none.
    """
    device = (disk / "device").resolve()
    scsi = (device / "subsystem").exists() and (device / "subsystem").resolve().name == "scsi"
    places = [*_controllers(disk), device.parent if scsi else device]
    return any(any(_driven(place, sys)) for place in places)


def driver_modules(device: Path, sys: Path = SYS) -> tuple[str, ...]:
    """Return the modules that drive a device of sysfs and all that it hangs on, from the bus down to it."""
    return tuple(reversed(list(_up_to_the_bus(device, sys))))


def _up_to_the_bus(device: Path, sys: Path) -> Iterator[str]:
    for driver in _driven(device, sys):
        module = driver / "module"
        if module.exists():
            yield module.resolve().name


def _driven(device: Path, sys: Path) -> Iterator[Path]:
    """Yield the drivers of a device and of all that it hangs on."""
    for place in (device, *device.parents):
        if place == (sys / "devices").resolve():
            return
        if (place / "driver").exists():
            yield place / "driver"


def _unescape(text: str) -> str:
    r"""Undo mountinfo's octal escapes: \040 is a space."""
    parts = text.split("\\")
    return parts[0] + "".join(
        chr(int(part[:3], 8)) + part[3:] if part[:3].isdigit() else "\\" + part for part in parts[1:]
    )
