"""A server on a private network of QEMU's: a real OpenSSH, and the kernel's NFS server, in a tree of Debian packages.

The machine boots as a healthy one does, and goes on in the tree on its disk (LABEL=server). What is saved on it is read
from the disk when it is off.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from initramfs.devices import Needed
from tests.guest import cache, disk, host
from tests.guest.cache import Kernel
from tests.guest.crash import ImageStore, booted, demand
from tests.guest.qemu import BOOT_TIMEOUT, Card, Disk, Hardware, Machine

PACKAGES = (
    "openssh-server", "openssh-sftp-server", "nfs-kernel-server", "nfs-common", "rpcbind", "netbase", "busybox-static",
    "libc6", "libwrap0", "libtirpc3", "libtirpc-common", "libevent-core-2.1-7", "libgssapi-krb5-2", "libkrb5-3",
    "libk5crypto3", "libkrb5support0", "libcom-err2", "libkeyutils1", "libnfsidmap1", "libpam0g", "libaudit1",
    "libcap-ng0", "libselinux1", "libpcre2-8-0", "libsystemd0", "liblzma5", "libzstd1", "liblz4-1", "libcap2",
    "libgcrypt20", "libgpg-error0", "libssl3", "zlib1g", "libcrypt1", "libblkid1", "libuuid1", "libnsl2",
)  # fmt: skip
"""The two servers and the libraries that they are linked to: 20 MB."""
MODULES = Needed(("virtio_net", "nfsd"), ("8021q", "bonding", "af_packet"))
NAME, USER = "dumps.example", "crash"
HOME, FOLDER = f"/home/{USER}", "/var/crash"
"""The user that dumps are saved as: where it has its keys, and where it may write."""
EXPORT, READ_ONLY = "/srv/dumps", "/srv/frozen"
NOBODY = 65534
_USER_ID = 1000
_EXPORTS = f"{EXPORT} *(rw,sync,no_subtree_check)\n{READ_ONLY} *(ro,sync,no_subtree_check)\n"
_SSHD = "HostKey /etc/ssh/host_key\nUsePAM no\nSubsystem sftp /usr/lib/openssh/sftp-server\nPasswordAuthentication no\n"
_ACCOUNTS = f"""\
root:x:0:0:root:/root:/bin/sh
sshd:x:100:{NOBODY}::/run/sshd:/bin/false
_rpc:x:101:{NOBODY}::/run/rpcbind:/bin/false
{USER}:x:{_USER_ID}:{_USER_ID}::{HOME}:/bin/sh
nobody:x:{NOBODY}:{NOBODY}::/:/bin/false
"""
_GROUPS = f"root:x:0:\n{USER}:x:{_USER_ID}:\nnogroup:x:{NOBODY}:\n"
_START = f"""\
set -e
mkdir -p /run/sshd /run/rpcbind /var/lib/nfs/v4recovery
for table in etab rmtab; do : > /var/lib/nfs/$table; done
chown -R root:root /etc /root /home
chown -R {USER}:{USER} {HOME} {FOLDER}
chown -R nobody:nogroup {EXPORT}
/usr/sbin/sshd -E /var/log/sshd.log
mount -t nfsd nfsd /proc/fs/nfsd
/sbin/rpcbind -w
/usr/sbin/exportfs -ra
/usr/sbin/rpc.nfsd -G 10 -L 10 4
/usr/sbin/rpc.mountd
echo Y > /proc/fs/nfsd/v4_end_grace
"""


@dataclass(frozen=True, slots=True)
class Keys:
    """Secret keys, each with its public half beside it: the server's own, and the one that it lets in."""

    server: Path
    user: Path

    def known_hosts(self, name: str = NAME) -> bytes:
        """A line for known_hosts."""
        kind, key = self.server.with_suffix(".pub").read_text().split()[:2]
        return f"{name} {kind} {key}\n".encode()


def make_keys(folder: Path) -> Keys:
    """Two keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = Keys(folder / "server", folder / "user")
    for path in (keys.server, keys.user):
        subprocess.run(
            [host.find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True
        )
    return keys


def make_disk(image: Path, keys: Keys, size: str = "3G") -> None:
    """The server's disk."""
    tree = image.with_suffix(".tree")
    shutil.copytree(cache.tree("server", PACKAGES), tree, symlinks=True)
    try:
        files: dict[str, str | bytes] = {
            "etc/passwd": _ACCOUNTS,
            "etc/group": _GROUPS,
            "etc/exports": _EXPORTS,
            "etc/ssh/sshd_config": _SSHD,
            "etc/ssh/host_key": keys.server.read_bytes(),
            f"{HOME[1:]}/.ssh/authorized_keys": keys.user.with_suffix(".pub").read_bytes(),
            "start": _START,
        }
        for folder in ("proc", "sys", "dev", "run", "tmp", "root", "var/log", FOLDER[1:], EXPORT[1:], READ_ONLY[1:]):
            (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / "bin/sh").symlink_to("busybox")  # dash's place; sshd lets nobody in whose shell is not there
        for name, content in files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            path.chmod(0o600 if name.endswith(("_key", "_keys")) else 0o644)
        disk.make(image, size, "server", content=tree)
    finally:
        shutil.rmtree(tree)


def wire() -> tuple[socket.socket, socket.socket]:
    """The two ends of a network cable."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


@contextmanager
def running(
    kernel: Kernel, store: ImageStore, image: Path, cards: tuple[Card, ...], network: tuple[str, ...]
) -> Iterator[Machine]:
    """The server with these cards; ``network`` are the commands that set them up (busybox's ip)."""
    hardware = Hardware(
        kernel=kernel.vmlinuz,
        initrd=store.images(kernel).healthy,
        memory="512M",
        disks=(Disk(image),),
        cards=cards,
    )
    with booted(hardware, image.with_name("server.log")) as machine:
        demand(machine, "mkdir -p /run/server && mount -t ext4 LABEL=server /run/server")
        for folder in ("proc", "sys", "dev"):
            demand(machine, f"mount --bind /{folder} /run/server/{folder}")
        demand(machine, "mount -t tmpfs run /run/server/run")
        for command in ("ip link set lo up", *network):
            demand(machine, command)
        # The tree's own programs find their libraries without a cache of the loader's.
        demand(machine, "chroot /run/server /bin/busybox sh /start", timeout=BOOT_TIMEOUT)
        yield machine


def switch_off(machine: Machine) -> None:
    """Bring everything to the disk, so that it can be read."""
    machine.send("sync; mount -o remount,ro /run/server; poweroff -f")
    machine.wait_exit(BOOT_TIMEOUT)
