"""Targets that have to be put together first, on real crash boots: LVM, md, one on the other.

The healthy machine says what its target needs (initramfs.targets), as ``vmcapture initramfs`` would ask it there; the
image with that is built on the host, and loaded by the machine.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from initramfs.devices import Needed
from initramfs.image import ImageRequest, build_image
from initramfs.volumes import LVM_CONF
from tests.guest import cache, disk, host
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE, Case
from tests.guest.conftest import unavailable
from tests.guest.crash import SAVE_TIMEOUT, WORKLOAD, ImageStore, demand, healthy, image_python
from tests.guest.qemu import BOOT_TIMEOUT, Disk, Machine

PROGRAMS = ("lvm", "mdadm", "dmsetup", "mke2fs")
MODULES = ("dm_mod", "md_mod", "raid1", "raid456", "dm_raid", "dm_thin_pool")
ARMED = "armed"
"""Label of the disk with the image."""


@pytest.fixture(scope="module")
def store(guest_folder: Path) -> ImageStore:
    if (line := host.missing((*host.CYCLE, *PROGRAMS))) is not None:
        unavailable(line)
    programs = tuple(map(host.find, PROGRAMS))
    return ImageStore(guest_folder / "storage", healthy_programs=programs, healthy_modules=MODULES)


@pytest.fixture(scope="module")
def case(kernels: Callable[[str], Kernel]) -> Case:
    kernels(RESCUE.kernel)  # skips here, where it can say why
    return RESCUE


def blank(path: Path, size: int = 1 << 30) -> Disk:
    with path.open("wb") as image:
        image.truncate(size)
    return Disk(path)


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
    said = machine.expect(r"(?s)(.*)^vmcapture: (not saved|saved in )[^\n]*\n", BOOT_TIMEOUT + SAVE_TIMEOUT)
    assert said[2] == "saved in ", said[0]
    machine.shell()
    demand(machine, f"mkdir -p /run/look && {mount} /run/look")
    verify = "vmcapture verify /run/look/var/crash/*/vmcore --against /proc/vmcore"
    assert "good" in demand(machine, verify, timeout=SAVE_TIMEOUT)
    demand(machine, "umount /run/look")
    return said[0]


def test_a_logical_volume_on_a_mirror_is_found_by_its_uuid_under_other_names(
    case: Case, store: ImageStore, tmp_path: Path
) -> None:
    """The plain disk before those of the array goes away before the crash: theirs have other names then."""
    disks = (blank(tmp_path / "a"), blank(tmp_path / "b"))
    with healthy(case, store, tmp_path, more_disks=disks) as machine:
        use_lvm(machine)
        demand(machine, "mdadm --create /dev/md7 --run --level 1 --raid-devices 2 --assume-clean /dev/vdc /dev/vdd")
        demand(machine, "lvm vgcreate crash /dev/md7 && lvm lvcreate -Wn -n dumps -L 800M crash")
        demand(machine, "mke2fs -q -t ext4 /dev/crash/dumps")
        needed = arm(machine, case, "/dev/crash/dumps", tmp_path)
        print(needed)
        machine.detach("disk1-device")
        demand(machine, "until [ ! -e /dev/vdb ]; do sleep 1; done")
        said = crash_and_verify(machine, "mount /dev/mapper/crash-dumps")
        print(said)
        print(machine.run("lvm lvs; cat /proc/mdstat; cat /sys/block/md*/md/sync_action; ls /dev/vd*")[1])
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
