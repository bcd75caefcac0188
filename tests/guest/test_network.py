"""A crash saved on another machine: a real OpenSSH and the kernel's NFS server on a private network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import routes, ssh
from capture.boot.routes import CARD, Link, Route
from initramfs.devices import Needed
from initramfs.network import BUILT_IN_MOSTLY
from tests.guest import host, server
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.conftest import unavailable
from tests.guest.crash import (
    SAVE_TIMEOUT,
    ImageStore,
    demand,
    image_python,
    memory_bytes,
    panicked,
)  # fmt: skip
from tests.guest.host import HostError
from tests.guest.qemu import BOOT_TIMEOUT, Card, Disk, Machine
from tests.guest.server import EXPORT, NAME, USER, Keys

MAC = "52:54:00:00:00:02"
SERVER_MAC = "52:54:00:00:00:01"
SERVER, OURS = "192.0.2.1", "192.0.2.2"
SSH, NFS = f"ssh:{USER}@{NAME}", f"nfs:{NAME}:{EXPORT}"
ROUTE = Route(NAME, SERVER, (Link(CARD, "eth0", hardware=MAC, mtu=1500),), f"{OURS}/24")
UP = ("ip link set eth0 up", f"ip addr add {SERVER}/24 dev eth0")
NETWORK_MODULES = Needed(("virtio_net", "nfs", "nfsv4", "fuse"), ("nfsv3", "8021q", "bonding", *BUILT_IN_MOSTLY))
HOME = "/run/home"


@pytest.fixture(scope="session")
def keys(guest_folder: Path) -> Keys:
    return server.make_keys(guest_folder / "keys")


def programs() -> tuple[Path, ...]:
    try:
        return host.find("sshfs"), host.find("ssh")
    except HostError as error:
        unavailable(str(error))


def store_for(folder: Path, keys: Keys, route: Route, known_hosts: bytes | None = None) -> ImageStore:
    """Images that know a way to the server, by SSH and by NFS."""
    place = ssh.credentials(ssh.parse(SSH))
    capture = Needed(
        files=(
            (str(routes.place_of(NAME)), routes.dump(route)),
            (str(place.key), keys.user),
            (str(place.known_hosts), known_hosts or keys.known_hosts()),
            ("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        ),
        binaries=programs(),
    )
    healthy = Needed(
        files=(
            ("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
            ("/etc/hosts", f"{route.address} {NAME}\n".encode()),
            ("/etc/nsswitch.conf", b"hosts: files\n"),
            ("/etc/test/key", keys.user),
            ("/etc/test/other", keys.server),
            ("/etc/test/known_hosts", keys.known_hosts()),
        ),
        binaries=(*programs(), host.find("ip"), host.find("ssh-keygen")),
    )
    return ImageStore(
        folder,
        needed=NETWORK_MODULES + capture,
        healthy_needed=NETWORK_MODULES + server.MODULES + healthy,
        more=lambda _kernel, contents: (contents / "remote.py").write_bytes(
            Path(__file__).with_name("remote.py").read_bytes()
        ),
    )


@pytest.fixture(scope="session")
def store(guest_folder: Path, keys: Keys) -> ImageStore:
    return store_for(guest_folder / "network-images", keys, ROUTE)


@pytest.fixture(scope="session")
def kernel(kernels: Callable[[str], Kernel]) -> Kernel:
    return kernels(RESCUE.kernel)


@pytest.fixture
def server_disk(tmp_path: Path, keys: Keys) -> Path:
    try:
        image = tmp_path / "server.ext4"
        server.make_disk(image, keys)
    except HostError as error:
        unavailable(str(error))
    return image


def set_up(machine: Machine, *requests: str) -> list[dict[str, object]]:
    """What the healthy machine finds out about targets, each with path and key: what its image needs, or a refusal."""
    python = image_python(machine)
    demand(machine, f"mkdir -p {HOME}/.ssh && cp /etc/test/known_hosts {HOME}/.ssh/")
    said = demand(machine, f"HOME={HOME} {python} /run/healthy/remote.py {' '.join(requests)}", timeout=BOOT_TIMEOUT)
    return [json.loads(line.removeprefix("looked ")) for line in said.splitlines() if line.startswith("looked ")]


def test_the_same_crash_by_ssh_and_by_nfs(kernel: Kernel, store: ImageStore, server_disk: Path, tmp_path: Path) -> None:
    """What the set-up side finds out is what the image was built with; each dump has every page right."""
    elf = tmp_path / "vmcore.elf"
    with elf.open("wb") as file:
        file.truncate(memory_bytes(RESCUE.memory))
    near, far = server.wire()
    with near, far, server.running(kernel, store, server_disk, (Card(near, SERVER_MAC),), UP) as there:
        with panicked(
            RESCUE, store, tmp_path, final="shell", target=SSH, cards=(Card(far, MAC),), more_disks=(Disk(elf),),
            before=("ip link set eth0 up", f"ip addr add {OURS}/24 dev eth0"),
        ) as machine:  # fmt: skip
            machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
            machine.shell()
            demand(machine, f"sed 's|{SSH}|{NFS}|' /proc/cmdline > /run/line && mount --bind /run/line /proc/cmdline")
            print(demand(machine, "vmcapture save", timeout=SAVE_TIMEOUT))
            demand(machine, "dd if=/proc/vmcore of=/dev/vdc bs=1M && sync", timeout=SAVE_TIMEOUT)
            size = int(demand(machine, "stat -c %s /proc/vmcore"))
            print(demand(machine, "free; mount; ps"))
            machine.send("poweroff -f")
            machine.wait_exit(BOOT_TIMEOUT)
        server.switch_off(there)
    os.truncate(elf, size)
