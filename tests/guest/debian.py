"""A Debian 12 machine with systemd, as a server has it: made once with debootstrap, booted from a copy of its disk.

Root is logged in on the serial console. The disk is kept in the cache under the digest of its recipe::

    ROOT/debian/KEY/    disk.ext4 (LABEL=debian), vmlinuz, initrd.img, release; renamed here when it is whole

To make it takes root, a mirror, and three minutes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guest import cache, disk, host
from tests.guest.crash import booted, demand
from tests.guest.host import HostError
from tests.guest.qemu import Card, Disk, Hardware, Machine

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
"""Where apt of this host names no other one of that suite."""
LABEL = "debian"
SIZE = "4G"
SYSTEM = (
    "systemd", "systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "iputils-ping", "e2fsprogs",
    "initramfs-tools", "linux-image-cloud-amd64",
)  # fmt: skip
NEEDED = (
    "busybox-static", "kexec-tools", "python3", "python3-cffi-backend", "python3-numpy", "python3-pyelftools",
    "python3-tqdm", "python3-zstandard", "squashfs-tools", "zstd",
)  # fmt: skip
"""What our package depends on: a guest has no network to install it from."""
TARGETS = ("lvm2", "mdadm", "nfs-common", "openssh-client", "sshfs", "age", "xfsprogs")
"""What it suggests: for targets of every kind."""
IMAGE_BUILDERS = ("dracut-core",)
"""Besides initramfs-tools, which the machine's own initrd is made by."""
PEER = "kdump-tools"
"""Lies in /root, with what it depends on installed: a server has it before ours."""
PEER_NEEDS = ("bsdextrautils", "debconf", "file", "linux-base", "lsb-base", "makedumpfile", "ucf")
PROGRAMS = ("chroot", "cp", "debootstrap", "mke2fs", "unshare")

GETTY = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I dumb
"""
FILES = {
    "etc/fstab": f"LABEL={LABEL} / ext4 errors=remount-ro 0 1\n",
    "etc/hostname": "server\n",
    "etc/hosts": "127.0.0.1 localhost server\n",
    "etc/initramfs-tools/conf.d/small": "MODULES=list\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
    "etc/systemd/system/serial-getty@ttyS0.service.d/login.conf": GETTY,
    "etc/motd": "",
    "root/.bashrc": "PS1='# '\nbind 'set enable-bracketed-paste off'\n",
}
# What a server does on its own of an evening, and what takes a minute of an emulated CPU.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "blk-availability.service", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "lvm2-monitor.service",
    "man-db.timer", "mdmonitor.service", "nfs-blkmap.service", "rpcbind.service", "rpcbind.socket",
    "systemd-timesyncd.service",
)  # fmt: skip

BOOT_TIMEOUT = 600.0
INSTALL_TIMEOUT = 1200.0
APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -y"
ARM_TIMEOUT = 1800.0
"""An emulated CPU takes some minutes to build an image, a busy one three times as many."""
ARMED = (
    "( until systemctl is-active -q vmcapture.service;"
    " do systemctl is-failed -q vmcapture.service && exit 1; sleep 1; done )"
)
"""A command that waits until the machine armed itself at its start."""
REPORTED = "( until journalctl -q -o cat -u vmcapture-report.service | grep -q 'saved\\|crash'; do sleep 1; done )"
"""A command that waits until it has looked for new crashes."""


@dataclass(frozen=True, slots=True)
class Debian:
    """What a machine boots; ``disk`` is for copies only."""

    disk: Path
    vmlinuz: Path
    initrd: Path
    release: str  # uname -r


def base() -> Debian:
    """The machine of the recipe above, from the cache or made now.

    Raises:
        HostError: it is not in the cache, and cannot be made: root, debootstrap or a mirror is missing.
    """
    recipe = repr((SUITE, SIZE, SYSTEM, NEEDED, TARGETS, IMAGE_BUILDERS, PEER, PEER_NEEDS, FILES, MASKED))
    folder = cache.root() / "debian" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not folder.is_dir():
        if os.geteuid() != 0:
            raise HostError(
                f"{folder} is not there, and to make it (debootstrap) takes root: run the tests as root once"
            )
        if (line := host.missing(PROGRAMS)) is not None:
            raise HostError(line)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with cache.scratch_folder() as scratch:
            made = scratch / "made"
            made.mkdir()
            _make(scratch / "tree", made)
            cache.rename_into_place(made, folder)
    release = (folder / "release").read_text().strip()
    return Debian(folder / "disk.ext4", folder / "vmlinuz", folder / "initrd.img", release)


def _make(tree: Path, made: Path) -> None:
    """Put the machine's files into ``tree``, and what it boots into ``made``."""
    packages = ",".join((*SYSTEM, *NEEDED, *TARGETS, *IMAGE_BUILDERS, *PEER_NEEDS))
    # What it mounts in there goes with it, whatever happens: the folder is removed then.
    host.run("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={packages}", SUITE, tree, _mirror())
    for name, text in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cache.download([PEER], tree / "root")
    host.run("chroot", tree, "sh", "-c", "apt-get clean && rm -rf /var/lib/apt/lists/* && passwd -d root")
    host.run("chroot", tree, "systemctl", "mask", *MASKED)
    host.run("chroot", tree, "update-initramfs", "-u")
    (tree / "etc/machine-id").write_text("uninitialized\n")
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.copy(kernel, made / "vmlinuz")
    shutil.copy(tree / "boot" / f"initrd.img-{release}", made / "initrd.img")
    (made / "release").write_text(release + "\n")
    disk.make(made / "disk.ext4", SIZE, LABEL, content=tree)


def _mirror() -> str:
    """The mirror of the suite that this host's apt uses."""
    said = host.run("apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {SUITE}", "Created-By: Packages")
    return next(iter(said.output.split()), MIRROR)


@contextmanager
def running(
    workdir: Path,
    *,
    append: str = "",
    memory: str = "1G",
    cpus: int = 2,
    cpu_model: str = "max",
    disks: tuple[Disk, ...] = (),
    cards: tuple[Card, ...] = (),
    files: Path | None = None,
    arguments: tuple[str, ...] = (),
) -> Iterator[Machine]:
    """A machine at root's shell. Its disk, /dev/vda, is a copy in ``workdir``, which stays for the next call.

    ``files`` is a folder whose files it finds in /mnt; ``disks`` follow as /dev/vdb and so on (from /dev/vdc on with
    ``files``).
    """
    debian = base()
    workdir.mkdir(parents=True, exist_ok=True)
    own = workdir / "debian.ext4"
    if not own.exists():
        host.run("cp", "--sparse=always", debian.disk, own)
    more = list(disks)
    if files is not None:
        content = disk.make(workdir / "files.ext4", "256M", "files", content=files)
        more.insert(0, Disk(content, read_only=True))
    hardware = Hardware(
        kernel=debian.vmlinuz,
        initrd=debian.initrd,
        append=f"root=LABEL={LABEL} console=ttyS0 systemd.show_status=0 no_timer_check {append}",
        memory=memory,
        cpus=cpus,
        cpu_model=cpu_model,
        disks=(Disk(own), *more),
        cards=cards,
        arguments=arguments,
    )
    with booted(hardware, workdir / "console.log", BOOT_TIMEOUT) as machine:
        if files is not None:
            demand(machine, "mount -o ro LABEL=files /mnt")
        yield machine


def power_off(machine: Machine) -> None:
    """End it as a person does."""
    machine.send("systemctl poweroff")
    machine.wait_exit(BOOT_TIMEOUT)
