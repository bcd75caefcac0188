"""A Debian 12 server with our package crashes three times: saved by SSH and by NFS to another machine, and on a logical
volume of its own.

The tests are what happens to one machine, in this order; each of its crashes is opened with drgn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_printk_records

from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from initramfs.devices import Needed
from tests.guest import cache, debian, disk, server
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.conftest import unavailable
from tests.guest.crash import HOTPLUG_BYTES, SAVE_TIMEOUT, ImageStore, demand
from tests.guest.host import HostError
from tests.guest.qemu import Card, Disk, Machine
from tests.guest.server import EXPORT, FOLDER, NAME, USER, Keys
from tests.readers import bitmaps, drgn_program

pytestmark = pytest.mark.long

CRASHKERNEL = "crashkernel=256M"
MAC, SERVER_MAC = "52:54:00:00:00:02", "52:54:00:00:00:01"
SERVER, OURS = "192.0.2.1", "192.0.2.2"
UP = ("ip link set eth0 up", f"ip addr add {SERVER}/24 dev eth0")
NETWORK = f"[Match]\\nMACAddress={MAC}\\n[Network]\\nAddress={OURS}/24\\n"
KEY = "/root/.ssh/kdump_id_rsa"
CONNECTED = (
    f"printf '{NETWORK}' > /etc/systemd/network/wire.network && systemctl enable --now systemd-networkd"
    f" && echo '{SERVER} {NAME}' >> /etc/hosts && mkdir -p -m 700 /root/.ssh"
    f" && install -m 600 /mnt/user {KEY} && install -m 600 /mnt/known_hosts /root/.ssh/known_hosts"
    f" && until ping -c 1 {NAME}; do sleep 1; done"
)
SSH = f"ssh {USER}@{NAME}\\nsshkey {KEY}\\npath {FOLDER}\\n"
NFS = f"nfs {NAME}:{EXPORT}\\npath {FOLDER}\\n"
VOLUME = (
    "pvcreate -q /dev/vdb && vgcreate -q logs /dev/vdb && lvcreate -q -y -n crash -L 2G logs"
    " && mkfs.ext4 -q /dev/logs/crash && blkid -o value -s UUID /dev/logs/crash"
)
OFFLINE = "$(grep -l offline /sys/devices/system/memory/memory*/state)"
ONLINE = f'( until [ -n "{OFFLINE}" ]; do sleep 1; done; for state in {OFFLINE}; do echo online > $state; done )'
REARMED = (
    "until [ $(stat -c %Y /run/vmcapture/loaded.json) != {loaded} ]"
    " && [ $(systemctl is-active vmcapture-rearm.service) = inactive ]; do sleep 1; done"
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return server.make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def files(package: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the machine finds in /mnt: the package, the key that the server lets in, and the server's own."""
    folder = tmp_path_factory.mktemp("files") / "files"
    shutil.copytree(package, folder)
    shutil.copy(keys.user, folder)
    (folder / "known_hosts").write_bytes(keys.known_hosts())
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """Where the disks of both machines are."""
    folder = tmp_path_factory.mktemp("machines")
    try:
        debian.base()
        server.make_disk(folder / "server.ext4", keys)
    except HostError as error:
        unavailable(str(error))
    return folder


@pytest.fixture(scope="module")
def store(shared_folder: Path) -> ImageStore:
    return ImageStore(shared_folder / "server-images", healthy_needed=server.MODULES + Needed(("virtio_net",)))


@pytest.fixture(scope="module")
def vmlinux(debug_vmlinux: Callable[[Kernel], Path]) -> Path:
    try:
        return debug_vmlinux(cache.kernel(f"linux-image-{debian.base().release}"))
    except HostError as error:
        unavailable(str(error))


@contextmanager
def both(workdir: Path, store: ImageStore, kernel: Kernel, **options: object) -> Iterator[Machine]:
    """The Debian machine, connected to the server; the server is off, and its disk at rest, when this ends."""
    near, far = server.wire()
    with near, far, server.running(kernel, store, workdir / "server.ext4", (Card(near, SERVER_MAC),), UP) as there:
        with debian.running(workdir, append=CRASHKERNEL, cards=(Card(far, MAC),), **options) as machine:  # type: ignore[arg-type]
            yield machine
        server.switch_off(there)
    disk.replay(workdir / "server.ext4")


@pytest.fixture(scope="module")
def server_kernel(kernels: Callable[[str], Kernel]) -> Kernel:
    return kernels(RESCUE.kernel)


def configure(machine: Machine, text: str, target: str) -> None:
    """Write the configuration and arm with it; status has to have no doubt."""
    demand(machine, f"printf '{text}' > /etc/vmcapture.conf")
    demand(machine, "vmcapture arm", debian.ARM_TIMEOUT)
    print(said := demand(machine, "vmcapture status"))
    assert said.startswith("armed: a crash now would be saved")
    assert target in json.loads(demand(machine, "cat /run/vmcapture/loaded.json"))["command_line"]


def crash(machine: Machine, saved_in: str) -> None:
    """Crash it, and wait until it restarts."""
    machine.send("sync; echo c > /proc/sysrq-trigger")
    machine.expect("Kernel panic - not syncing: sysrq triggered crash", 60.0)
    print(machine.expect(rf"^vmcapture: saved in {saved_in}[^\n]*", SAVE_TIMEOUT)[0])
    machine.wait_exit(120.0)  # -no-reboot: a restart is the end


def opened(saved: Path, vmlinux: Path) -> None:
    """What crash was saved: whole, every page right, and what drgn finds in it."""
    assert json.loads((saved / "manifest.json").read_text())["complete"]
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
    program = drgn_program(saved / "vmcore", vmlinux)
    tasks = {task.comm.string_().decode() for task in for_each_task(program)}
    assert {"systemd", "systemd-journal", "kthreadd", "bash"} <= tasks
    assert any(b"sysrq triggered crash" in record.text for record in get_printk_records(program))


def only(image: Path, place: str, into: Path) -> Path:
    (name,) = (name for name in disk.names(image, place) if not name.startswith("."))
    return disk.extract(image, f"{place}/{name}", into)


def test_by_ssh(
    workdir: Path, files: Path, store: ImageStore, server_kernel: Kernel, vmlinux: Path, tmp_path: Path
) -> None:
    with both(workdir, store, server_kernel, files=files) as machine:
        demand(machine, CONNECTED)
        demand(machine, f"{debian.APT} install /mnt/*.deb", debian.INSTALL_TIMEOUT)
        configure(machine, SSH, f"ssh:{USER}@{NAME}")
        crash(machine, f"ssh:{USER}@{NAME}{FOLDER}/")
    opened(only(workdir / "server.ext4", FOLDER, tmp_path / "saved"), vmlinux)


def test_by_nfs_after_a_start_at_which_it_armed_itself(
    workdir: Path, store: ImageStore, server_kernel: Kernel, vmlinux: Path, tmp_path: Path
) -> None:
    with both(workdir, store, server_kernel) as machine:
        demand(machine, debian.ARMED, debian.ARM_TIMEOUT)
        configure(machine, NFS, f"nfs:{NAME}:{EXPORT}")
        crash(machine, f"nfs:{NAME}:{EXPORT}{FOLDER}/")
    opened(only(workdir / "server.ext4", f"{EXPORT}{FOLDER}", tmp_path / "saved"), vmlinux)


def test_on_its_logical_volume_with_memory_that_was_plugged_in(workdir: Path) -> None:
    volume = disk.blank(workdir / "volume.img", 3 << 30)
    with debian.running(workdir, append=CRASHKERNEL, disks=(volume,), memory="1G,slots=1,maxmem=4G") as machine:
        uuid = demand(machine, VOLUME, debian.ARM_TIMEOUT).split()[-1]
        configure(machine, f"ext4 UUID={uuid}\\n", f"UUID={uuid}")
        loaded = demand(machine, "stat -c %Y /run/vmcapture/loaded.json").strip()
        machine.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "added", "size": HOTPLUG_BYTES})
        machine.qmp("device_add", driver="pc-dimm", id="dimm", memdev="added")
        demand(machine, ONLINE)
        demand(machine, f"( {REARMED.format(loaded=loaded)} )", debian.ARM_TIMEOUT)
        crash(machine, f"UUID={uuid}")


def test_when_it_is_back_it_knows_what_was_saved_on_the_volume(workdir: Path, vmlinux: Path, tmp_path: Path) -> None:
    with debian.running(workdir, append=CRASHKERNEL, disks=(Disk(workdir / "volume.img"),)) as machine:
        demand(machine, debian.REPORTED, debian.ARM_TIMEOUT)
        print(said := demand(machine, "vmcapture list; vmcapture show", SAVE_TIMEOUT))
        assert "sysrq triggered crash" in said
        demand(machine, "mount /dev/logs/crash /mnt && cp -a /mnt/var/crash /root/saved && umount /mnt", SAVE_TIMEOUT)
        debian.power_off(machine)
    image = workdir / "debian.ext4"
    disk.replay(image)
    saved = only(image, "/root/saved", tmp_path / "saved")
    opened(saved, vmlinux)
    assert bitmaps(saved / "vmcore")[1].nonzero()[0][-1] >= (4 << 30) // 4096  # of what was plugged in
