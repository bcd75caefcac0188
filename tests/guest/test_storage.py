"""Targets that have to be put together first, on real crash boots: LVM, md, one on the other.

The healthy machine says what its target needs (initramfs.targets), as ``vmcapture initramfs`` would ask it there; the
image with that is built on the host, and loaded by the machine.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from capture.boot.raw import signature
from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from initramfs import cli
from initramfs.devices import Needed
from initramfs.image import ImageRequest, build_image
from initramfs.volumes import LVM_CONF
from tests.guest import cache, disk, host
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE, Case
from tests.guest.conftest import unavailable
from tests.guest.crash import (
    SAVE_TIMEOUT,
    WORKLOAD,
    ImageStore,
    demand,
    healthy,
    image_python,
)
from tests.guest.qemu import BOOT_TIMEOUT, Disk, Machine

PROGRAMS = ("lvm", "mdadm", "dmsetup", "mke2fs")
MODULES = ("dm_mod", "md_mod", "raid1", "raid456", "dm_raid", "dm_thin_pool", "virtiofs")
MKE2FS = "/usr/sbin/mke2fs -q -t ext4"  # (the shell would take busybox's)
ARMED = "armed"
"""Label of the disk with the image."""


@pytest.fixture(scope="module")
def store(guest_folder: Path) -> ImageStore:
    if (line := host.missing((*host.CYCLE, *PROGRAMS))) is not None:
        unavailable(line)
    programs = tuple(map(host.find, PROGRAMS))
    return ImageStore(guest_folder / "storage", healthy_needed=Needed(built_in=MODULES, binaries=programs))


@pytest.fixture(scope="module")
def case(kernels: Callable[[str], Kernel]) -> Case:
    kernels(RESCUE.kernel)  # skips here, where it can say why
    return RESCUE


def use_lvm(machine: Machine) -> None:
    """Have LVM make its nodes by itself in the healthy machine: that has no udev either."""
    conf = LVM_CONF.decode().replace("metadata_read_only = 1", "metadata_read_only = 0")
    demand(
        machine, f"export LVM_SYSTEM_DIR=/run/lvm.d; mkdir /run/lvm.d; cat > /run/lvm.d/lvm.conf << 'END'\n{conf}END"
    )


def needed_by(machine: Machine, target: str) -> Needed:
    """What the healthy machine says that an image for ``target`` has to hold."""
    program = f"""
        import json
        from initramfs.targets import needed_by
        found = needed_by("{target}")
        files = [(place, content.decode()) for place, content in found.files]
        print(json.dumps((found.loaded, found.built_in, list(map(str, found.binaries)), files)))
    """
    demand(machine, f"cat > /run/ask.py << 'END'\n{textwrap.dedent(program)}END")
    said = demand(machine, f"{image_python(machine)} /run/ask.py")
    loaded, built_in, binaries, files = json.loads(said.strip().splitlines()[-1])
    return Needed(
        tuple(loaded),
        tuple(built_in),
        tuple(host.find(Path(path).name) for path in binaries),
        tuple((place, content.encode()) for place, content in files),
    )


def arm(machine: Machine, case: Case, target: str, workdir: Path, append: str = "") -> Needed:
    """Build the image that ``target`` needs, and load it."""
    needed = needed_by(machine, target)
    kernel = cache.kernel(case.kernel)
    contents = workdir / "armed"
    contents.mkdir()
    build_image(
        ImageRequest(
            output=contents / "capture.img",
            kernel_release=kernel.release,
            modules_dir=kernel.modules_dir,
            modules=needed.loaded,
            optional_modules=needed.built_in,
            binaries=needed.binaries,
            files=needed.files,
        )
    )
    machine.attach(Disk(disk.make(workdir / "armed.ext4", "128M", ARMED, content=contents), read_only=True))
    demand(machine, "mkdir -p /run/armed; until mount -t ext4 -o ro LABEL=armed /run/armed; do sleep 1; done")
    demand(
        machine,
        "vmcapture load --cpus 1 --kernel-image /run/healthy/vmlinuz --image /run/armed/capture.img"
        f" --target {target} --final shell --append 'console=ttyS0 {append}'",
        timeout=BOOT_TIMEOUT,
    )
    return needed


def crash_and_verify(machine: Machine, mount: str, before: str = "true") -> str:
    """Crash the machine, let it save, and hold the dump against /proc/vmcore; what it said meanwhile."""
    for command in WORKLOAD:
        demand(machine, command)
    machine.send(f"{before}; echo c > /proc/sysrq-trigger")
    machine.expect("Kernel panic - not syncing: sysrq triggered crash", BOOT_TIMEOUT)
    said = machine.expect(r"(?s).*^vmcapture: (not saved|saved )[^\n]*\n", BOOT_TIMEOUT + SAVE_TIMEOUT)[0]
    assert "\nvmcapture: saved in " in said, said
    machine.shell()
    demand(machine, f"mkdir -p /run/look && {mount} /run/look")
    against = "vmcapture verify --no-progress /run/look/var/crash/*/vmcore --against /proc/vmcore"
    assert "pages equal the source" in demand(machine, against, timeout=SAVE_TIMEOUT)
    demand(machine, "umount /run/look")
    return said


MIRROR = "mdadm --create /dev/md7 --run --level 1 --raid-devices 2 --assume-clean /dev/vdc /dev/vdd"
LV = "lvm lvcreate -Wn -n dumps -L 800M"
WITHOUT_THE_PLAIN_DISK = "until [ ! -e /dev/vdb ]; do sleep 1; done"


def test_a_logical_volume_on_a_mirror_is_found_by_its_uuid_under_other_names(
    case: Case, store: ImageStore, tmp_path: Path
) -> None:
    """The plain disk before those of the array goes away before the crash: theirs have other names then."""
    disks = (disk.blank(tmp_path / "a"), disk.blank(tmp_path / "b"))
    with healthy(case, store, tmp_path, more_disks=disks) as machine:
        use_lvm(machine)
        demand(machine, f"{MIRROR} && lvm vgcreate crash /dev/md7 && {LV} crash && {MKE2FS} /dev/crash/dumps")
        needed = arm(machine, case, "/dev/crash/dumps", tmp_path)
        machine.detach("disk1-device")
        demand(machine, WITHOUT_THE_PLAIN_DISK)
        said = crash_and_verify(machine, "mount /dev/mapper/crash-dumps")
        assert demand(machine, "cat /sys/block/md*/md/sync_action").split() == ["frozen"]
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    assert {"md_mod", "raid1", "dm_mod", "virtio_blk"} <= set(needed.loaded)
    assert [path.name for path in needed.binaries] == ["mdadm", "lvm"]
    assert "lacks" not in said
    assert re.search(r"^vmcapture: saved in UUID=[0-9a-f-]{36}/var/crash/", said, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "volume", "more"),
    [
        (f"lvm vgcreate crash /dev/vdc /dev/vdd && {LV} -i 2 crash", "/dev/mapper/crash-dumps", ()),
        (f"lvm vgcreate crash /dev/vdc /dev/vdd && {LV} --type raid1 -m 1 --nosync crash", "/dev/mapper/crash-dumps",
         ("dm_raid", "raid1")),
        ("lvm vgcreate crash /dev/vdc /dev/vdd && lvm lvcreate -T -L 700M -V 800M -n dumps crash/pool",
         "/dev/mapper/crash-dumps", ("dm_thin_pool",)),
        ("mdadm --create /dev/md7 --run --level 5 --raid-devices 3 --assume-clean /dev/vdc /dev/vdd /dev/vde",
         "/dev/md7", ("raid456",)),
        # The superblock at the end: each leg looks like the file system itself.
        (f"{MIRROR} --metadata 1.0", "/dev/md7", ("raid1",)),
    ],
    ids=["striped", "raid1-lv", "thin", "raid5", "raid1-metadata-1.0"],
)  # fmt: skip
def test_volumes_of_other_types(
    make: str, volume: str, more: tuple[str, ...], case: Case, store: ImageStore, tmp_path: Path
) -> None:
    disks = tuple(disk.blank(tmp_path / name) for name in "abc")
    with healthy(case, store, tmp_path, more_disks=disks) as machine:
        use_lvm(machine)
        demand(machine, f"{make} && {MKE2FS} -L dumps {volume}")
        needed = arm(machine, case, "LABEL=dumps", tmp_path)
        machine.detach("disk1-device")
        demand(machine, WITHOUT_THE_PLAIN_DISK)
        top = "/dev/md0" if volume == "/dev/md7" else volume
        assert "saved in LABEL=dumps/var/crash/" in crash_and_verify(machine, f"mount {top}")
    assert set(more) <= set(needed.loaded)


@pytest.mark.long
@pytest.mark.parametrize("known", [False, True], ids=["until-the-crash", "before-the-crash"])
def test_a_dead_disk_of_a_mirror_costs_no_dump(known: bool, case: Case, store: ImageStore, tmp_path: Path) -> None:
    disks = (disk.blank(tmp_path / "a"), disk.blank(tmp_path / "b"))
    with healthy(case, store, tmp_path, more_disks=disks) as machine:
        demand(machine, f"{MIRROR} && {MKE2FS} /dev/md7")
        if known:
            demand(machine, "mdadm /dev/md7 --fail /dev/vdc --remove /dev/vdc")
        arm(machine, case, "/dev/md7", tmp_path)
        gone = "true" if known else "dd if=/dev/zero of=/dev/vdc bs=1M count=4 oflag=direct"
        said = crash_and_verify(machine, "mount /dev/md0", gone)
    assert "array md7 lacks 1 of its disks, and is used without" in said


@pytest.mark.long
def test_a_raw_partition_gets_a_file_system_and_is_emptied_afterwards(
    case: Case, store: ImageStore, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        unavailable("only root may mount what a guest saved on a raw partition")
    partition = disk.blank(tmp_path / "raw")
    with partition.image.open("r+b") as table:  # an MBR: one partition, from 1 MiB to the end
        table.seek(440)
        table.write(bytes.fromhex("efbeadde0000"))
        table.write(bytes((0, 1, 1, 0, 0x83, 0, 0, 0)) + struct.pack("<II", 2048, (1 << 21) - 2048) + bytes(48))
        table.write(b"\x55\xaa")
    with healthy(case, store, tmp_path, more_disks=(partition,)) as machine:
        needed = arm(machine, case, "raw:/dev/vdc1", tmp_path)
        machine.detach("disk1-device")
        demand(machine, WITHOUT_THE_PLAIN_DISK)
        said = crash_and_verify(machine, "mount /dev/vdb1")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    assert [path.name for path in needed.binaries] == ["mke2fs", "blkid", "findfs"]
    assert "saved in raw:PARTUUID=deadbeef-01/var/crash/" in said

    device = host.run("losetup", "--find", "--show", "--offset", "1M", partition.image).output.strip()
    try:
        assert cli.main(["collect", "--to", str(tmp_path / "collected"), device]) == 0
        assert signature(device) is None
    finally:
        host.run("losetup", "--detach", device)
    (saved,) = (tmp_path / "collected").iterdir()
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
    assert json.loads((saved / "manifest.json").read_text())["complete"]


@pytest.mark.long
def test_a_directory_of_the_virtual_machines_host(case: Case, store: ImageStore, tmp_path: Path) -> None:
    daemon = Path("/usr/lib/qemu/virtiofsd")
    if not daemon.exists():
        unavailable(f"{daemon} is missing; as root: apt-get install qemu-system-common")
    if os.geteuid() != 0:
        unavailable("only root may run virtiofsd")
    shared, socket = tmp_path / "shared", tmp_path / "virtiofs"
    shared.mkdir()
    machine_with_it = replace(
        case,
        arguments=(
            "-object", f"memory-backend-memfd,id=memory,size={case.memory},share=on", "-numa", "node,memdev=memory",
            "-chardev", f"socket,id=virtiofs,path={socket}",
            "-device", "vhost-user-fs-pci,chardev=virtiofs,tag=dumps",
        ),
    )  # fmt: skip
    serve = [str(daemon), f"--socket-path={socket}", "-o", f"source={shared}", "-o", "sandbox=chroot"]
    with (tmp_path / "virtiofsd.log").open("wb") as log, subprocess.Popen(serve, stdout=log, stderr=log) as server:
        try:
            with healthy(machine_with_it, store, tmp_path) as machine:
                needed = arm(machine, case, "virtiofs:dumps", tmp_path)
                said = crash_and_verify(machine, "mount -t virtiofs dumps")
        finally:
            server.terminate()
    assert {"virtio_pci", "virtiofs"} <= set(needed.loaded)
    assert "saved in virtiofs:dumps/var/crash/" in said
    (saved,) = (shared / "var/crash").iterdir()
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
    assert json.loads((saved / "manifest.json").read_text())["complete"]
