"""The network brought up: two namespaces of this kernel with a cable between them, by the capture kernel's busybox.

VLAN and bond need modules: they are in tests/guest/test_network.py.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from capture.boot import network, routes
from capture.boot.routes import BOND, CARD, Link, Route
from capture.console import Console
from capture.errors import TargetError
from tests.guest.conftest import unavailable

REPOSITORY = Path(__file__).resolve().parents[4]
PORT = 2049
MAC = "52:54:00:00:00:02"
STATIC = Route("server", "192.0.2.1", (Link(CARD, "enp1s0", hardware=MAC, mtu=1400),), "192.0.2.2/24")
LISTEN = "import socket, sys; s = socket.create_server((sys.argv[1], int(sys.argv[2])), family=int(sys.argv[3]))\n"
LISTEN += "while True: s.accept()"
CONNECT = """\
import json, sys
from pathlib import Path
from capture.boot import network, routes
from capture.console import Console
from capture.errors import TargetError
network.LEASE_SCRIPT = Path(sys.argv[1]) / "run/lease"
route = routes.parse(sys.stdin.buffer.read())
console = Console(quiet=True)
said = []
for _ in range(int(sys.argv[4])):
    try:
        said.append(network.connect(route, int(sys.argv[2]), float(sys.argv[3]), console))
    except TargetError as error:
        said.append(str(error))
print(json.dumps([said, console.lines]))
"""


@dataclass(frozen=True, slots=True)
class Cable:
    """Two namespaces: ours, whose card has MAC, and the server's, which is 192.0.2.1 and 2001:db8::1."""

    ours: str
    server: str
    tools: Path

    def there(self, *command: str) -> None:
        """Run something on the server."""
        subprocess.run(["ip", "netns", "exec", self.server, *command], check=True, capture_output=True)

    def here(self, *command: str) -> str:
        """Run something with us; what it prints."""
        command = ("ip", "netns", "exec", self.ours, *command)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @contextmanager
    def running(self, *command: str) -> Iterator[None]:
        """Something runs on the server."""
        process = subprocess.Popen(["ip", "netns", "exec", self.server, *command], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def listening(self, address: str = "192.0.2.1") -> Iterator[None]:
        """Somebody listens at PORT."""
        family = "10" if ":" in address else "2"
        with self.running(sys.executable, "-c", LISTEN, address, str(PORT), family):
            for _ in range(100):
                asked = ["ip", "netns", "exec", self.server, str(self.tools / "netstat"), "-tln"]
                found = subprocess.run(asked, capture_output=True, check=True).stdout
                if f":{PORT} ".encode() in found:
                    break
                time.sleep(0.05)
            yield

    def connect(self, route: Route, wait: float = 0, *, times: int = 1) -> tuple[list[str], list[str]]:
        """What ``connect`` answers or raises, each time, and the lines that it says."""
        environment = {"PATH": f"{self.tools}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        words = ["ip", "netns", "exec", self.ours, sys.executable, "-c", CONNECT, str(self.tools), str(PORT), str(wait)]
        said = subprocess.run(
            ["env", *(f"{name}={value}" for name, value in environment.items()), shutil.which("ip") or "ip",
             *words[1:], str(times)],
            input=routes.dump(route), capture_output=True, check=True,
        )  # fmt: skip
        answers, lines = json.loads(said.stdout)
        return answers, lines


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    busybox = shutil.which("busybox")
    if os.geteuid() != 0 or shutil.which("ip") is None or busybox is None:
        unavailable("network namespaces need root, the packages iproute2 and busybox-static")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ip", "arping", "udhcpc", "udhcpd", "netstat"):
        (tools / name).symlink_to(busybox)
    tag = f"{os.getpid()}"
    cable = Cable(f"vmc-ours-{tag}", f"vmc-server-{tag}", tools)
    try:
        for name in (cable.ours, cable.server):
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        cable.here("ip", "link", "add", "eth0", "address", MAC, "type", "veth", "peer", "name", "eth9")
        cable.here("ip", "link", "set", "eth9", "netns", cable.server)
    except subprocess.CalledProcessError as error:
        unavailable(f"no network namespaces here: {error.stderr}")
    try:
        cable.there("ip", "link", "set", "lo", "up")
        cable.there("ip", "link", "set", "eth9", "up")
        cable.there("ip", "addr", "add", "192.0.2.1/24", "dev", "eth9")
        cable.there("ip", "addr", "add", "2001:db8::1/64", "dev", "eth9", "nodad")
        yield cable
    finally:
        for name in (cable.ours, cable.server):
            subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_card_is_found_by_its_address_and_a_second_save_finds_all_up(cable: Cable) -> None:
    with cable.listening():
        answers, lines = cable.connect(STATIC, 5, times=2)
    assert answers == ["192.0.2.1", "192.0.2.1"]
    assert not [line for line in lines if "DHCP" in line]
    assert "mtu 1400" in cable.here("ip", "link", "show", "eth0")


def test_a_gateway_outside_of_our_prefix(cable: Cable) -> None:
    cable.there("ip", "addr", "add", "198.51.100.1/32", "dev", "lo")
    cable.there("ip", "route", "add", "203.0.113.9", "dev", "eth9")
    route = STATIC._replace(address="198.51.100.1", source="203.0.113.9/32", gateway="192.0.2.1")
    with cable.listening("198.51.100.1"):
        answers, _ = cable.connect(route, 5, times=2)
    assert answers == ["198.51.100.1"] * 2


def test_ipv6_without_waiting_for_neighbours_that_might_object(cable: Cable) -> None:
    route = STATIC._replace(address="2001:db8::1", source="2001:db8::2/64")
    with cable.listening("2001:db8::1"):
        answers, _ = cable.connect(route, 3)
    assert answers == ["2001:db8::1"]
    assert "tentative" not in cable.here("ip", "-6", "addr", "show", "dev", "eth0")


def test_a_link_local_gateway(cable: Cable) -> None:
    cable.there("ip", "addr", "add", "fe80::99/64", "dev", "eth9", "nodad")
    cable.there("ip", "addr", "add", "2001:db8:1::1/128", "dev", "lo")
    route = STATIC._replace(address="2001:db8:1::1", source="2001:db8::2/64", gateway="fe80::99")
    with cable.listening("2001:db8:1::1"):
        assert cable.connect(route, 3)[0] == ["2001:db8:1::1"]


def test_a_server_that_comes_late_is_waited_for_and_that_is_said_once(cable: Cable) -> None:
    late = f"sleep 2; exec {sys.executable} -c '{LISTEN}' 192.0.2.1 {PORT} 2"
    with cable.running("sh", "-c", late):
        answers, lines = cable.connect(STATIC, 20)
    assert answers == ["192.0.2.1"]
    assert len([line for line in lines if line.startswith("waiting up to 20 s for server (192.0.2.1, port 2049)")]) == 1


def test_nobody_there_is_one_line_in_time(cable: Cable) -> None:
    started = time.monotonic()
    (line,), _ = cable.connect(STATIC, 1)
    assert time.monotonic() - started < 10
    assert line.startswith("server: 192.0.2.1 does not answer at port 2049 after 1 s, from 192.0.2.2/24 on eth0: ")
    assert "vmcapture save DIR" in line


def test_a_cable_that_is_not_plugged_in(cable: Cable) -> None:
    cable.there("ip", "link", "set", "eth9", "down")
    (line,), lines = cable.connect(STATIC, 1)
    assert line == "eth0: no carrier after 1 s: see to its cable or switch, and save again"
    assert len([said for said in lines if "for a carrier on eth0" in said]) == 1


def test_a_card_that_is_not_there_is_named_with_those_that_are(cable: Cable) -> None:
    other = STATIC._replace(links=(Link(CARD, "enp1s0", hardware="52:54:00:00:00:07"),))
    (line,), _ = cable.connect(other, 0)
    assert line.startswith(f"no network card 52:54:00:00:00:07 (it was enp1s0); there is eth0 {MAC}: is its driver")


def test_a_leased_address_is_used_again_and_dhcp_asked_when_it_is_taken(cable: Cable, tmp_path: Path) -> None:
    """A real DHCP server; first nobody else has our address, then the server itself has it."""
    leased = STATIC._replace(dynamic=True)
    with cable.listening():
        answers, lines = cable.connect(leased, 5)
    assert (answers, lines) == (["192.0.2.1"], [])
    cable.here("ip", "addr", "flush", "dev", "eth0")
    cable.there("ip", "addr", "add", "192.0.2.2/24", "dev", "eth9")
    (tmp_path / "leases").touch()
    (tmp_path / "udhcpd.conf").write_text(
        f"start 192.0.2.50\nend 192.0.2.60\ninterface eth9\nlease_file {tmp_path}/leases\npidfile {tmp_path}/pid\n"
        "option subnet 255.255.255.0\noption router 192.0.2.1\n"
    )
    with cable.listening(), cable.running(str(cable.tools / "udhcpd"), "-f", str(tmp_path / "udhcpd.conf")):
        answers, lines = cable.connect(leased, 30)
    assert answers == ["192.0.2.1"]
    assert lines[0] == "192.0.2.2/24 is another machine's now: asking DHCP for an address"
    assert lines[1].startswith("DHCP on eth0: 192.0.2.5")
    addresses = cable.here("ip", "-4", "addr", "show", "dev", "eth0")
    assert "192.0.2.5" in addresses
    assert "192.0.2.2/" not in addresses


@pytest.mark.parametrize("refused", ["up", "down"], ids=["of no use", "not taken"])
def test_a_bond_goes_on_without_a_card_that_does_not_come_up(
    refused: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a driver without its firmware answers; bonds need a module, so sysfs and ip are told what to say."""
    sys_net, there = tmp_path / "net", {"eth0": "52:54:00:00:00:02", "eth1": "52:54:00:00:00:03"}
    for name, address in there.items():
        (sys_net / name).mkdir(parents=True)
        (sys_net / name / "type").write_text("1\n")
        (sys_net / name / "address").write_text(f"{address}\n")
    (sys_net / "bond0/bonding").mkdir(parents=True)
    (sys_net / "bond0/bonding/slaves").touch()
    (sys_net / "bond0/carrier").write_text("1\n")
    failing = "{ echo 'ip: SIOCSIFFLAGS: No such file' >&2; exit 1; }"
    (tmp_path / "ip").write_text(f"#!/bin/sh\n[ \"$*\" != 'link set eth0 {refused}' ] || {failing}\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(network, "SYS", sys_net)
    cards = tuple(Link(CARD, name, hardware=address) for name, address in there.items())
    route = Route("server", "127.0.0.1", (*cards, Link(BOND, "bond0", members=tuple(there))), "192.0.2.2/24")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.connect(route, port, 1, console) == "127.0.0.1"
    assert (sys_net / "bond0/bonding/slaves").read_text() == "+eth1"
    (line,) = console.lines
    assert line.endswith(f"ip link set eth0 {refused}: SIOCSIFFLAGS: No such file; going on without it")
    (tmp_path / "ip").write_text("#!/bin/sh\ncase $* in *eth?' down') exit 1;; esac\n")
    (sys_net / "bond0/bonding/slaves").write_text("")
    with pytest.raises(TargetError, match=r"^bond0: it takes none of its network cards: eth0, eth1; see dmesg$"):
        network.connect(route._replace(links=(*cards, route.links[-1]._replace(address=""))), port, 0, console)


def test_a_card_that_has_its_address_is_not_given_it_again(cable: Cable) -> None:
    """eth_mac_addr says EBUSY of a card that is up, unless its driver can change that: for the second target it is."""
    real, other = (cable.tools / "ip").readlink(), "52:54:00:00:00:07"
    (cable.tools / "ip").unlink()
    busy = '[ "$(cat /sys/class/net/eth0/operstate)" = down ] || { echo busy >&2; exit 1; }'
    (cable.tools / "ip").write_text(f'#!/bin/sh\ncase "$*" in *address*) {busy};; esac\nexec {real} ip "$@"\n')
    (cable.tools / "ip").chmod(0o755)
    with cable.listening():
        answers, _ = cable.connect(
            STATIC._replace(links=(Link(CARD, "eth0", hardware=MAC, address=other),)), 5, times=2
        )
    assert answers == ["192.0.2.1", "192.0.2.1"]
    assert other in cable.here("ip", "link", "show", "eth0")


def test_a_kernel_without_packet_sockets_says_of_no_address_that_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arping ends as if it were; and there would be no DHCP either."""
    busybox, setpriv = shutil.which("busybox"), shutil.which("setpriv")
    if os.geteuid() != 0 or busybox is None or setpriv is None:
        unavailable("a program without packet sockets needs root, setpriv and the package busybox-static")
    script = f'#!/bin/sh\nexec {setpriv} --bounding-set=-net_raw --inh-caps=-net_raw {busybox} arping "$@"\n'
    (tmp_path / "arping").write_text(script)
    (tmp_path / "arping").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert subprocess.run(["arping", "-D", "-q", "-I", "lo", "192.0.2.2"], check=False).returncode == 1
    assert not network._is_taken(STATIC._replace(dynamic=True), "lo")
