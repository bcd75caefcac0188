"""A crash saved on another machine: a real OpenSSH and the kernel's NFS server on a private network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture.boot import routes, ssh
from capture.boot.routes import BOND, CARD, VLAN, Link, Route
from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from initramfs.devices import Needed
from initramfs.network import BUILT_IN_MOSTLY
from tests.guest import disk, host, server
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.conftest import unavailable
from tests.guest.crash import (
    SAVE_TIMEOUT,
    TARGET_FOLDER,
    TARGET_LABEL,
    ImageStore,
    demand,
    healthy,
    image_python,
    load_command,
    memory_bytes,
    only_crash,
    panicked,
    target_image,
)
from tests.guest.host import HostError
from tests.guest.qemu import BOOT_TIMEOUT, Card, Disk, Machine
from tests.guest.reference import different_pages
from tests.guest.server import EXPORT, FOLDER, NAME, READ_ONLY, USER, Keys

MAC = "52:54:00:00:00:02"
SERVER_MAC = "52:54:00:00:00:01"
SERVER, OURS = "192.0.2.1", "192.0.2.2"
SSH, NFS = f"ssh:{USER}@{NAME}", f"nfs:{NAME}:{EXPORT}"
ROUTE = Route(NAME, SERVER, (Link(CARD, "eth0", hardware=MAC, mtu=1500),), f"{OURS}/24")
UP = ("ip link set eth0 up", f"ip addr add {SERVER}/24 dev eth0")
NETWORK_MODULES = Needed(("virtio_net", "nfs", "nfsv4", "fuse"), ("nfsv3", "8021q", "bonding", *BUILT_IN_MOSTLY))
HOME, KEY, OTHER_KEY = "/run/home", "/etc/test/key", "/etc/test/other"
SECOND_MAC = "52:54:00:00:00:03"
TIMEOUT = 20
"""Seconds after which a server is given up."""
SAVED = {"vmcore-dmesg.txt", "registers.txt", "registers.json", "vmcore", "capture-log.txt", "manifest.json"}


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


def set_up(machine: Machine, *requests: str) -> list[dict[str, Any]]:
    """What the healthy machine finds out about targets, each with path and key: what its image needs, or a refusal."""
    python = image_python(machine)
    demand(machine, f"mkdir -p {HOME}/.ssh && cp /etc/test/known_hosts {HOME}/.ssh/")
    said = demand(machine, f"HOME={HOME} {python} /run/healthy/remote.py {' '.join(requests)}", timeout=BOOT_TIMEOUT)
    return [json.loads(line.removeprefix("looked ")) for line in said.splitlines() if line.startswith("looked ")]


def plugged(machine_address: str = f"{OURS}/24") -> tuple[str, ...]:
    """How the healthy machine is connected."""
    return "ip link set eth0 up", f"ip addr add {machine_address} dev eth0"


def test_the_same_crash_by_ssh_and_by_nfs(kernel: Kernel, store: ImageStore, server_disk: Path, tmp_path: Path) -> None:
    """Each dump has every page as it was; and the healthy machine had found out what the image was built with."""
    elf = tmp_path / "vmcore.elf"
    with elf.open("wb") as file:
        file.truncate(memory_bytes(RESCUE.memory))
    near, far = server.wire()
    with near, far, server.running(kernel, store, server_disk, (Card(near, SERVER_MAC),), UP) as there:
        with healthy(RESCUE, store, tmp_path, cards=(Card(far, MAC),), more_disks=(Disk(elf),)) as machine:
            for command in plugged():
                demand(machine, command)
            found = set_up(
                machine, f"{SSH},{FOLDER},{KEY}", f"{NFS},{FOLDER},{KEY}", f"{SSH},{FOLDER},{OTHER_KEY}",
                f"{SSH},/root,{KEY}", f"nfs:{NAME}:{READ_ONLY},/,{KEY}", f"nfs:{NAME}:/none,/,{KEY}",
            )  # fmt: skip
            demand(machine, load_command(RESCUE, "shell", SSH, ""), timeout=BOOT_TIMEOUT)
            machine.send("echo c > /proc/sysrq-trigger")
            machine.expect(rf"^vmcapture: saved in {SSH}{FOLDER}/", BOOT_TIMEOUT + SAVE_TIMEOUT)
            machine.shell()
            demand(machine, f"sed 's|{SSH}|{NFS}|' /proc/cmdline > /run/line && mount --bind /run/line /proc/cmdline")
            by_nfs = demand(machine, "vmcapture save", timeout=SAVE_TIMEOUT)
            demand(machine, "dd if=/proc/vmcore of=/dev/vdc bs=1M && sync", timeout=SAVE_TIMEOUT)
            size = int(demand(machine, "stat -c %s /proc/vmcore"))
            mounts = demand(machine, "cat /proc/mounts")
            machine.send("poweroff -f")
            machine.wait_exit(BOOT_TIMEOUT)
        server.switch_off(there)
    os.truncate(elf, size)

    for answer in found[:2]:
        assert answer["routes"] == [routes.dump(ROUTE).decode()]
        assert {"virtio_net", "virtio_pci"} <= set(answer["modules"])
    assert found[0]["programs"] == ["sshfs", "ssh"]
    refusals = [answer["refused"] for answer in found[2:]]
    assert "Permission denied (publickey" in refusals[0]
    assert "/root on it cannot be written: Permission denied" in refusals[1]
    assert "/ on it cannot be written: Read-only file system; the server lets nobody write: export it rw" in refusals[2]
    assert (
        f"nfs:{NAME}:/none cannot be mounted from {SERVER}: Permission denied; the server does not export /none"
        in refusals[3]
    )

    assert f"{NFS}: NFS 4.2 from {SERVER}" in by_nfs
    assert "sshfs" not in mounts
    assert "nfs" not in mounts
    disk.replay(server_disk)
    for place in (FOLDER, f"{EXPORT}{FOLDER}"):
        (name,) = (name for name in disk.names(server_disk, place) if not name.startswith("."))
        saved = disk.extract(server_disk, f"{place}/{name}", tmp_path / place.replace("/", "-"))
        assert {path.name for path in saved.iterdir()} == SAVED
        assert json.loads((saved / "manifest.json").read_text())["complete"]
        assert disk.stat(server_disk, f"{place}/{name}/vmcore").mode & 0o777 == 0o600
        pages, different = different_pages(saved / "vmcore", elf)
        assert pages > 1000
        assert different == 0


@pytest.mark.long
@pytest.mark.parametrize("when", ["before the crash", "in the midst of the dump"])
def test_a_server_that_is_gone_gives_way_to_the_next_target(
    when: str, kernel: Kernel, store: ImageStore, server_disk: Path, tmp_path: Path
) -> None:
    """Nothing waits for it for ever: not the save, not the reboot."""
    early = when == "before the crash"
    near, far = server.wire()
    with near, far, server.running(kernel, store, server_disk, (Card(near, SERVER_MAC),), UP) as there:
        if early:
            there.qmp("stop")
        with panicked(
            replace(RESCUE, level="1"), store, tmp_path, target=f"{NFS} --target LABEL={TARGET_LABEL}",
            cards=(Card(far, MAC),), append=f"vmcapture.wait=5 vmcapture.timeout={TIMEOUT}",
        ) as machine:  # fmt: skip
            if not early:
                machine.expect(r"saving memory: +[3-8]\d%", BOOT_TIMEOUT + SAVE_TIMEOUT)
                there.qmp("stop")
            line = machine.expect(r"[^\n]*trying the next target, LABEL=crash", BOOT_TIMEOUT)[0]
            machine.expect(r"^vmcapture: saved in LABEL=crash", SAVE_TIMEOUT)
            machine.wait_exit(BOOT_TIMEOUT)
    if early:
        assert f"{NAME}: {SERVER} does not answer at port 2049 after 5 s, from {OURS}/24 on eth0: " in line
    else:
        assert f"saved in part: {NFS}: no answer from the target for {TIMEOUT} s (vmcapture.timeout=)" in line
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0


@pytest.mark.long
def test_a_changed_host_key_is_refused_in_the_capture_kernel(
    kernel: Kernel, keys: Keys, guest_folder: Path, server_disk: Path, tmp_path: Path
) -> None:
    """The shell says why, and a save by hand to the disk is what it says it would be."""
    kind, key = keys.user.with_suffix(".pub").read_text().split()[:2]
    store = store_for(guest_folder / "wrong-key-images", keys, ROUTE, f"{NAME} {kind} {key}\n".encode())
    near, far = server.wire()
    with near, far, server.running(kernel, store, server_disk, (Card(near, SERVER_MAC),), UP) as there:
        with panicked(RESCUE, store, tmp_path, target=SSH, cards=(Card(far, MAC),)) as machine:
            line = machine.expect(r"^vmcapture: not saved: .*\n", BOOT_TIMEOUT + SAVE_TIMEOUT)[0]
            machine.shell()
            demand(machine, f"mount LABEL={TARGET_LABEL} /mnt && vmcapture save /mnt", timeout=SAVE_TIMEOUT)
            demand(machine, "umount /mnt")
        server.switch_off(there)
    assert f"{SSH} cannot be mounted from {SERVER}: Host key verification failed" in line
    assert "to try again: vmcapture save" in line


@pytest.mark.long
def test_ipv6_in_a_vlan_on_a_bond(
    kernel: Kernel, keys: Keys, guest_folder: Path, server_disk: Path, tmp_path: Path
) -> None:
    """The second card has no other end: the bond does without. What the healthy machine had is what is made again."""
    route = Route(
        NAME, "2001:db8::1",
        (
            Link(CARD, "eth0", hardware=MAC, mtu=1500),
            Link(CARD, "eth1", hardware=SECOND_MAC, mtu=1500),
            Link(BOND, "bond7", address=MAC, mtu=1500, members=("eth0", "eth1"),
                 options=(("mode", "active-backup"), ("miimon", "100"), ("primary", "eth0"))),
            Link(VLAN, "storage", mtu=1500, below="bond7", vlan=7, protocol="802.1Q"),
        ),
        "2001:db8::2/64",
    )  # fmt: skip
    store = store_for(guest_folder / "vlan-images", keys, route)
    at_server = (
        "ip link set eth0 up", "ip link add link eth0 name eth0.7 type vlan id 7", "ip link set eth0.7 up",
        "echo 0 > /proc/sys/net/ipv6/conf/eth0.7/accept_dad", "ip addr add 2001:db8::1/64 dev eth0.7", "sleep 2",
    )  # fmt: skip
    here = (
        # busybox's, which the shell prefers, knows no bonds
        "IP=$(which -a ip | grep -m 1 sbin)", "$IP link add bond7 type bond mode active-backup miimon 100",
        "for card in eth0 eth1; do $IP link set $card down && $IP link set $card master bond7 || break; done",
        "$IP link set bond7 type bond primary eth0", "$IP link set bond7 up",
        "$IP link add link bond7 name storage type vlan id 7", "$IP link set storage up",
        "$IP addr add 2001:db8::2/64 dev storage nodad", "sleep 2",
    )  # fmt: skip
    near, far = server.wire()
    dangling, unused = server.wire()
    with near, far, dangling, unused, server.running(
        kernel, store, server_disk, (Card(near, SERVER_MAC),), at_server
    ) as there:  # fmt: skip
        cards = (Card(far, MAC), Card(unused, SECOND_MAC))
        with healthy(RESCUE, store, tmp_path, cards=cards) as machine:
            for command in here:
                demand(machine, command)
            (found,) = set_up(machine, f"{NFS},/,{KEY}")
            demand(machine, load_command(RESCUE, "poweroff", NFS, ""), timeout=BOOT_TIMEOUT)
            machine.send("echo c > /proc/sysrq-trigger")
            machine.expect(rf"^vmcapture: saved in {NFS}", BOOT_TIMEOUT + SAVE_TIMEOUT)
            machine.wait_exit(BOOT_TIMEOUT)
        server.switch_off(there)
    assert routes.parse(found["routes"][0].encode())._replace(links=()) == route._replace(links=())
    links = routes.parse(found["routes"][0].encode()).links
    assert [link._replace(options=()) for link in links] == [link._replace(options=()) for link in route.links]
    assert set(route.links[2].options) <= set(links[2].options)
    disk.replay(server_disk)
    place = f"{EXPORT}{TARGET_FOLDER}"
    (name,) = disk.names(server_disk, place)
    saved = disk.extract(server_disk, f"{place}/{name}", tmp_path / "saved")
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
