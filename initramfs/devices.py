"""Asks the healthy system what the crash target will need: the modules behind a block device and its file system.

sysfs knows the driver of every device between a disk and the root of the bus tree; device-mapper and md volumes name
the disks they stand on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from initramfs import tools
from initramfs.errors import ImageError, ToolError

SYS = Path("/sys")
BY_UUID = Path("/dev/disk/by-uuid")
BY_LABEL = Path("/dev/disk/by-label")

# A file system that asks for more modules while it mounts (request_module), by the kernel's defaults in fs/fat/Kconfig.
ASKED_FOR_AT_MOUNT = {"vfat": ("nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8")}
# The module behind a device-mapper volume, from the prefix that its owner puts before the UUID.
MAPPER_MODULES = {"CRYPT": "dm-crypt", "mpath": "dm-multipath", "VERITY": "dm-verity"}
# drivers/md: the personality's module, by the level that sysfs shows.
RAID_MODULES = {"raid4": "raid456", "raid5": "raid456", "raid6": "raid456"}


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system: its device, where it is mounted, which part of it, its type."""

    device: str
    point: Path
    root: str
    kind: str


@dataclass(frozen=True, slots=True)
class Needed:
    """Module names: loaded now as modules, or part of the running kernel (another kernel may have them as modules)."""

    loaded: tuple[str, ...]
    built_in: tuple[str, ...]


def mount_of(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> Mount:
    """Return the mount that holds the path, or its nearest existing parent."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    place = place.resolve()
    best: Mount | None = None
    for line in mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        point = Path(_unescape(fields[4]))
        # A later mount on the same place hides the earlier one.
        if place.is_relative_to(point) and (best is None or len(point.parts) >= len(best.point.parts)):
            best = Mount(device=_unescape(kind[1]), point=point, root=_unescape(fields[3]), kind=kind[0])
    if best is None:
        raise ImageError(f"{path}: no mounted file system holds it")
    return best


def path_on_device(path: Path, mount: Mount) -> str:
    """Return where a path of the running system is, counted from the root of its file system."""
    inside = Path(mount.root) / path.absolute().relative_to(mount.point)
    return str(inside)


def device_node(target: str) -> Path:
    """Return the device node of ``/dev/…``, ``UUID=…`` or ``LABEL=…``."""
    tag, separator, value = target.partition("=")
    directories = {"UUID": BY_UUID, "LABEL": BY_LABEL}
    if not separator or tag not in directories:
        return Path(target)
    link = directories[tag] / value
    if link.exists():
        return link.resolve()
    try:
        return Path(tools.run([tools.require("blkid", "util-linux"), "-l", "-o", "device", "-t", target]).strip())
    except ToolError as error:
        raise ImageError(f"{target}: no block device of this machine carries it; is it attached?") from error


def uuid_of(device: str) -> str | None:
    """Return the UUID of the file system on a device, if it has one."""
    node = Path(device)
    if not node.exists():
        return None
    for link in sorted(BY_UUID.iterdir()) if BY_UUID.is_dir() else ():
        if link.resolve() == node.resolve():
            return link.name
    blkid = tools.find("blkid")
    if blkid is None:
        return None
    try:
        return tools.run([blkid, "-s", "UUID", "-o", "value", node]).strip() or None
    except ToolError:
        return None


def filesystem_of(device: str) -> str | None:
    """Return the type of the file system on a device that need not be mounted."""
    blkid = tools.find("blkid")
    if blkid is None:
        return None
    try:
        return tools.run([blkid, "-s", "TYPE", "-o", "value", device]).strip() or None
    except ToolError:
        return None


def modules_for_device(device: Path | int, sys: Path = SYS) -> Needed:
    """Return the modules that the running kernel drives a block device with: its path, or its device number."""
    number = device if isinstance(device, int) else _number(device)
    start = sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not start.exists():
        raise ImageError(f"{device}: the kernel shows no block device {start.name} in {start.parent}")
    names = tuple(dict.fromkeys(_block_modules(start.resolve(), sys)))
    loaded = tuple(name for name in names if is_loaded(name, sys))
    return Needed(loaded, tuple(name for name in names if name not in loaded))


def modules_for_filesystem(kind: str, sys: Path = SYS) -> Needed:
    """Return the modules that mounting a file system of this type takes."""
    kind = kind.partition(".")[0]
    companions = ASKED_FOR_AT_MOUNT.get(kind, ())
    if is_loaded(kind, sys):
        return Needed((kind,), companions)
    return Needed((), (kind, *companions))


def modules_for_target(target: str) -> Needed:
    """Return everything that a save on the target needs."""
    node = device_node(target)
    device = modules_for_device(node)
    kind = filesystem_of(str(node))
    if kind is None:
        return device
    filesystem = modules_for_filesystem(kind)
    return Needed((*device.loaded, *filesystem.loaded), (*device.built_in, *filesystem.built_in))


def modules_for_mount(mount: Mount) -> Needed:
    """Return everything that a save on a mounted file system needs."""
    if not mount.device.startswith("/dev/"):
        raise ImageError(
            f"{mount.point} is a {mount.kind} without a block device; name the disk for the dump with "
            "--target, or its modules with --module"
        )
    device = modules_for_device(Path(mount.device))
    filesystem = modules_for_filesystem(mount.kind)
    return Needed((*device.loaded, *filesystem.loaded), (*device.built_in, *filesystem.built_in))


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


def _block_modules(block: Path, sys: Path) -> Iterator[str]:
    """Yield the modules of a block device, from the bus down to it; what it stands on comes first."""
    disk = block.parent if (block / "partition").exists() else block
    for below in sorted((disk / "slaves").glob("*")):
        yield from _block_modules(below.resolve(), sys)
    # A disk with several paths (NVMe) hangs below no bus: its subsystem lists the controllers.
    controllers = [link.resolve() for link in sorted(disk.parent.glob("nvme*")) if link.is_symlink()]
    for device in (*controllers, (disk / "device").resolve()):
        yield from reversed(list(_driver_modules(device, sys)))
    if (disk / "dm/uuid").exists():
        yield "dm-mod"
        owner = (disk / "dm/uuid").read_text(encoding="utf-8").partition("-")[0]
        if owner in MAPPER_MODULES:
            yield MAPPER_MODULES[owner]
    if (disk / "md/level").exists():
        level = (disk / "md/level").read_text(encoding="utf-8").strip()
        yield "md-mod"
        yield RAID_MODULES.get(level, level)


def _driver_modules(device: Path, sys: Path) -> Iterator[str]:
    for place in (device, *device.parents):
        if place == (sys / "devices").resolve():
            return
        module = place / "driver/module"
        if module.exists():
            yield module.resolve().name


def _unescape(text: str) -> str:
    r"""Undo mountinfo's octal escapes: \040 is a space."""
    parts = text.split("\\")
    return parts[0] + "".join(
        chr(int(part[:3], 8)) + part[3:] if part[:3].isdigit() else "\\" + part for part in parts[1:]
    )
