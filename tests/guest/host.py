"""Programs of the host that the guest tests run, and the one line that says which package brings a missing one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES: Mapping[str, str] = {
    "age": "age",
    "age-keygen": "age",
    "apt-get": "apt",
    "blkid": "util-linux",
    "busybox": "busybox-static",
    "chroot": "coreutils",
    "cp": "coreutils",
    "crash": "crash",
    "debootstrap": "debootstrap",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "dmsetup": "dmsetup",
    "dpkg": "dpkg",
    "e2fsck": "e2fsprogs",
    "gdb": "gdb",
    "ip": "iproute2",
    "kexec": "kexec-tools",
    "losetup": "mount",
    "lvm": "lvm2",
    "makedumpfile": "makedumpfile",
    "mdadm": "mdadm",
    "mke2fs": "e2fsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.xfs": "xfsprogs",
    "mksquashfs": "squashfs-tools",
    "mount": "mount",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshfs": "sshfs",
    "tar": "tar",
    "umount": "mount",
    "unshare": "util-linux",
}
"""Program → the Debian package that has it."""

_NOT_ALWAYS = {
    "age", "age-keygen", "chroot", "cp", "crash", "debootstrap", "dmsetup", "gdb", "ip", "losetup", "lvm",
    "makedumpfile", "mdadm", "mkfs.btrfs", "mkfs.xfs", "mount", "qemu-storage-daemon", "ssh", "ssh-keygen", "sshfs",
    "umount", "unshare",
}  # fmt: skip
CYCLE = sorted(PACKAGES.keys() - _NOT_ALWAYS)
"""What a whole crash cycle needs on the host; the others only look at what it left."""

# An ordinary user's PATH has no sbin on Debian, where mke2fs, debugfs, depmod and kexec live.
SEARCH_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"


SCRATCH = os.environ.get("TMPDIR", "/var/tmp")
"""Where gigabytes may lie for a while: /tmp is in memory on many systems."""


class HostError(Exception):
    """The host lacks something, or one of its programs failed; the message says what to do."""


def missing(programs: Iterable[str] = CYCLE) -> str | None:
    """One line that names the missing programs and how to install them; None when all are there."""
    absent = sorted(name for name in programs if shutil.which(name, path=SEARCH_PATH) is None)
    if not absent:
        return None
    packages = " ".join(sorted({PACKAGES[name] for name in absent}))
    return f"missing on this host: {', '.join(absent)}; as root: apt-get install {packages}"


def find(program: str) -> Path:
    """Where a program is.

    Raises:
        HostError: it is not installed.
    """
    found = shutil.which(program, path=SEARCH_PATH)
    if found is None:
        raise HostError(missing([program]))
    return Path(found)


@dataclass(frozen=True, slots=True)
class Said:
    """What a program printed."""

    output: str
    complaints: str


def run(program: str, *arguments: str | Path, cwd: Path | None = None, good: Sequence[int] = (0,)) -> Said:
    """Run a program to its end, with nothing on its standard input.

    Raises:
        HostError: it is missing, or its exit status is not one of ``good``.
    """
    command = [str(find(program)), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode not in good:
        said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise HostError(f"{program} failed with status {done.returncode}: {said}")
    return Said(done.stdout, done.stderr)
