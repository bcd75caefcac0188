"""The network of the capture kernel: the interfaces of one route, brought up when a target's turn comes.

busybox's ``ip`` makes and addresses them, sysfs does the bonding. What is there already is taken as it is: a
second save finds everything up.

An address that the healthy system had from a DHCP server is used again, because the lease has outlived the crash: no
server has to answer, and exports and firewalls know the address. Only where another machine answers for it by now, or
the server cannot be reached from it, DHCP is asked for a new one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from capture import pulse
from capture.boot.programs import ended
from capture.boot.routes import BOND, CARD, Link, Route
from capture.boot.waiting import attempts
from capture.console import Console
from capture.errors import TargetError

SYS = Path("/sys/class/net")
SETTINGS = Path("/proc/sys/net")
LEASE_SCRIPT = Path("/run/vmcapture/lease")
PRIMARY = "primary"
"""The option of a bond that names a member."""
_ETHERNET = "1"  # ARPHRD_ETHER, include/uapi/linux/if_arp.h
_POLL = 0.25
_ANSWER = 3.0
"""Seconds for one attempt to reach a server: the first packet may get lost while a neighbour is looked for."""
_MEMBER_TIME = 5.0
"""Seconds to wait for a card that a bond can do without."""
_LEASE_TIME = 20
_LEASE = '#!/bin/sh\n[ "$1" = bound ] && echo "lease $ip/$mask ${router%% *}"\nexit 0\n'


def connect(route: Route, port: int, wait: float, console: Console) -> str:
    """Bring up what leads to a server, and wait until it answers at a TCP port; return its address.

    It all has ``wait`` seconds, but one attempt is always made.

    Raises:
        TargetError: a card is missing, has no carrier, or the server does not answer.
    """
    deadline = time.monotonic() + wait
    names: dict[str, str] = {}
    try:
        members = {member for link in route.links for member in link.members}
        for link in route.links:
            try:
                until = min(deadline, time.monotonic() + _MEMBER_TIME) if link.name in members else deadline
                names[link.name] = _bring_up(link, names, until, console)
            except (TargetError, OSError) as error:  # (it is not there, or its firmware is not)
                if link.name not in members:
                    raise
                console.say(f"{error}; going on without it")  # what a bond is for
        interface = names[route.links[-1].name]
        _wait_for_carrier(interface, deadline, wait, console)
        taken = route.dynamic and _is_taken(route, interface)
        if taken:
            console.say(f"{route.source} is another machine's now: asking DHCP for an address")
            _use_lease(route, interface, console)
        else:
            _use(route.source, route.gateway, route.address, interface)
        half = time.monotonic() + (deadline - time.monotonic()) / 2
        ask = route.dynamic and not taken
        failure = _reach(route, port, half if ask else deadline, console, wait)
        if failure and ask:
            console.say(f"{route.server} does not answer to {route.source}: asking DHCP for an address")
            _use_lease(route, interface, console)
            failure = _reach(route, port, deadline, console, wait)
    except OSError as error:
        raise TargetError(f"{route.server}: the network cannot be set up: {error}") from None
    if failure:
        raise TargetError(
            f"{route.server}: {route.address} does not answer at port {port} after {wait:.0f} s, from "
            f"{route.source} on {interface}: {failure}; see to the server or the cable and save "
            "again, or mount any disk and name it: vmcapture save DIR"
        )
    return route.address


def _bring_up(link: Link, names: Mapping[str, str], deadline: float, console: Console) -> str:
    """Make one interface as it was, and switch it on; return its name here."""
    if link.kind == CARD:
        name = _card(link, deadline, console)
        # Many a driver refuses even the address that it has while the card is up, as it is for a second target.
        if link.address and _read(SYS / name / "address") != link.address and not (SYS / name / "master").exists():
            _ip("link", "set", name, "address", link.address)
    elif link.kind == BOND:
        name = _bond(link, names, console)
    else:
        name = link.name
        if not (SYS / name).exists():
            below = names[link.below]
            _ip("link", "add", "link", below, "name", name, "type", "vlan",
                "protocol", link.protocol, "id", str(link.vlan))  # fmt: skip
    if link.mtu and int(_read(SYS / name / "mtu") or 0) != link.mtu:
        with contextlib.suppress(OSError):  # a smaller one is slower, and no worse
            _ip("link", "set", name, "mtu", str(link.mtu))
    for setting in ("accept_dad", "dad_transmits"):  # the address was this machine's: nobody has to be asked
        with contextlib.suppress(OSError):
            (SETTINGS / "ipv6/conf" / name / setting).write_text("0")
    _ip("link", "set", name, "up")
    return name


def _card(link: Link, deadline: float, console: Console) -> str:
    """Return the card with this hardware address; its driver may take its time to find it.

    Raises:
        TargetError: there is none.
    """
    for _ in attempts(deadline, console, lambda: f"waiting for network card {link.hardware}", _POLL):
        name = _find_card(link)
        if name is not None:
            return name
    there = ", ".join(f"{path.name} {_read(path / 'address')}" for path in _cards()) or "none at all"
    raise TargetError(
        f"no network card {link.hardware} (it was {link.name}); there is {there}: is its driver in the image? "
        "vmcapture initramfs, or see dmesg"
    )


def _cards() -> list[Path]:
    """Return the Ethernet interfaces that stand on no other one."""
    return [
        path
        for path in sorted(SYS.iterdir())
        if _read(path / "type") == _ETHERNET and not list(path.glob("lower_*")) and not (path / "bonding").exists()
    ]


def _find_card(link: Link) -> str | None:
    for path in _cards():
        # A card in a bond shows the bond's address, where it has been put by a save before this one.
        if link.hardware in (_read(path / "bonding_slave/perm_hwaddr"), _read(path / "address")):
            return path.name
    for path in _cards():
        if link.address and _read(path / "address") == link.address:
            return path.name
    return None


def _bond(link: Link, names: Mapping[str, str], console: Console) -> str:
    bond = SYS / link.name
    if not bond.exists():
        (SYS / "bonding_masters").write_text(f"+{link.name}")
    there = (_read(bond / "bonding/slaves") or "").split()
    if not there:
        _ip("link", "set", link.name, "down")
        for option, value in link.options:
            if option != PRIMARY:
                _set_option(link, option, value, console)
        if link.address:
            with contextlib.suppress(OSError):
                _ip("link", "set", link.name, "address", link.address)
    members = [names[member] for member in link.members if member in names]
    if not members:
        raise TargetError(f"{link.name}: none of its network cards is there: {', '.join(link.members)}; see dmesg")
    for member in members:
        if member not in there:
            try:
                _ip("link", "set", member, "down")
                (bond / "bonding/slaves").write_text(f"+{member}")
            except OSError as error:
                console.say(f"{link.name} does not take {member}: {error}; going on without it")
    if not _read(bond / "bonding/slaves"):
        raise TargetError(f"{link.name}: it takes none of its network cards: {', '.join(members)}; see dmesg")
    for option, value in link.options:
        if option == PRIMARY:
            _set_option(link, option, names.get(value, value), console)
    return link.name


def _set_option(link: Link, option: str, value: str, console: Console) -> None:
    try:
        (SYS / link.name / "bonding" / option).write_text(value)
    except OSError as error:  # its default may do
        console.say(f"{link.name}: {option}={value} is refused: {error.strerror}; going on without it")


def _wait_for_carrier(name: str, deadline: float, wait: float, console: Console) -> None:
    """Wait until there is a cable with something at its other end.

    Raises:
        TargetError: there is not in time.
    """

    def line() -> str:
        return f"waiting up to {max(0.0, deadline - time.monotonic()):.0f} s for a carrier on {name}"

    for _ in attempts(deadline, console, line, _POLL):
        if _read(SYS / name / "carrier") == "1":
            return
    raise TargetError(f"{name}: no carrier after {wait:.0f} s: see to its cable or switch, and save again")


def _use(source: str, gateway: str, server: str, interface: str) -> None:
    """Give the interface its address, and lead what goes to the server through it: no other route is needed."""
    family = f"-{ipaddress.ip_address(server).version}"
    _ip(family, "addr", "add", source, "dev", interface, there_is_well=True)
    if gateway:
        # It need not be within the prefix of our address; the kernel takes no gateway that it cannot reach.
        if not ipaddress.ip_address(gateway).is_link_local:
            _ip(family, "route", "replace", gateway, "dev", interface)
        _ip(family, "route", "replace", server, "via", gateway, "dev", interface)
    else:
        _ip(family, "route", "replace", server, "dev", interface)


def _is_taken(route: Route, interface: str) -> bool:
    """Whether another machine answers for our address (RFC 5227)."""
    address = ipaddress.ip_interface(route.source).ip
    if address.version != 4:
        return False
    try:
        answer = ended(["arping", "-D", "-q", "-c", "2", "-w", "2", "-I", interface, str(address)])
    except OSError:  # no arping: nobody says that it is taken
        return False
    return answer.returncode == 1 and not answer.stderr  # (1 is also that of a kernel without packet sockets)


def _use_lease(route: Route, interface: str, console: Console) -> None:
    """Ask DHCP for an address, and use it; where nobody answers, everything stays as it is."""
    if ipaddress.ip_address(route.address).version != 4:
        return
    try:
        LEASE_SCRIPT.parent.mkdir(parents=True, exist_ok=True)
        LEASE_SCRIPT.write_text(_LEASE)
        LEASE_SCRIPT.chmod(0o755)
        said = ended(
            ["udhcpc", "-f", "-q", "-n", "-t", str(_LEASE_TIME // 2), "-T", "2", "-i", interface,
             "-s", str(LEASE_SCRIPT), "-r", str(ipaddress.ip_interface(route.source).ip)]
        ).stdout  # fmt: skip
    except OSError as error:
        console.say(f"DHCP on {interface}: {error}")
        return
    words = next((line.split() for line in said.splitlines() if line.startswith("lease ")), None)
    if words is None:
        console.say(f"DHCP on {interface}: no answer in {_LEASE_TIME} s")
        return
    source, gateway = words[1], words[2] if len(words) > 2 else ""
    try:
        if ipaddress.ip_address(route.address) in ipaddress.ip_interface(source).network:
            gateway = ""
    except ValueError:
        console.say(f"DHCP on {interface}: {source} is no address with its network; going on without it")
        return
    console.say(f"DHCP on {interface}: {source}" + (f", through {gateway}" if gateway else ""))
    with contextlib.suppress(OSError):
        _ip("-4", "addr", "flush", "dev", interface)
    _use(source, gateway, route.address, interface)


def _reach(route: Route, port: int, deadline: float, console: Console, wait: float) -> str | None:
    """Try to open a connection until that works; return None then, else what the last attempt ended with."""
    failure = ""

    def line() -> str:
        return f"waiting up to {wait:.0f} s for {route.server} ({route.address}, port {port}): {failure}"

    for _ in attempts(deadline, console, line, _POLL):
        try:
            with pulse.at_target():
                knock(route.address, port, _ANSWER)
        except OSError as error:
            failure = error.strerror or str(error) or "no answer"
        else:
            return None
    return failure


def knock(address: str, port: int, patience: float) -> None:
    """Open a connection to a TCP port and close it.

    Raises:
        OSError: nobody answers within ``patience`` seconds.
    """
    # Not create_connection, which looks addresses up like names: the image has no codec for those.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as knocking:
        knocking.settimeout(patience)
        knocking.connect((address, port))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # (carrier cannot even be read of an interface that is down)
        return None


def _ip(*words: str, there_is_well: bool = False) -> None:
    """Run ``ip``.

    Raises:
        OSError: it refuses; where ``there_is_well``, not because what is to be added is there.
    """
    answer = ended(["ip", *words])
    said = " ".join((answer.stderr or answer.stdout).split())
    if answer.returncode and not (there_is_well and "exists" in said):
        raise OSError(f"ip {' '.join(words)}: {said.removeprefix('ip: ') or f'status {answer.returncode}'}")
