"""Asks the healthy system how it reaches a server: interfaces, addresses, drivers; for the capture kernel.

``ip -json`` and sysfs know everything. What the capture kernel could not make again (Wi-Fi, tunnels, a bridge of
several cards) is refused here, while the machine is healthy.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capture.boot.network import knock
from capture.boot.routes import BOND, CARD, VLAN, Link, Route
from initramfs import tools
from initramfs.devices import SYS, Needed, driver_modules, needed
from initramfs.errors import ImageError, ToolError

MODULES = {BOND: "bonding", VLAN: "8021q"}
BUILT_IN_MOSTLY = ("af_packet", "ipv6")
"""What DHCP, and a server with an IPv6 address, need of the kernel."""
APPLETS = ("ip", "udhcpc", "arping")
"""What the capture kernel's busybox has to know."""
_BOND_OPTIONS = (
    "mode", "miimon", "updelay", "downdelay", "arp_interval", "arp_ip_target", "arp_validate", "lacp_rate",
    "xmit_hash_policy", "ad_select", "min_links", "fail_over_mac", "primary_reselect", "all_slaves_active",
    "primary",
)  # fmt: skip
"""In an order in which they can be set (Documentation/networking/bonding.rst): the mode decides what others mean, and a
primary has to be a member."""
_BOND_DEFAULTS = {"0", "", "none", "any"}
REMEDY = "name a server that is reached by an Ethernet card, a bond or a VLAN, or a disk of this machine"

Entry = Mapping[str, Any]
"""One of ip's JSON objects."""


class Interfaces(NamedTuple):
    """What ``ip -json`` says of all interfaces, by name."""

    links: Mapping[str, Entry]
    addresses: Mapping[str, Entry]


def resolve(server: str, port: int) -> list[str]:
    """Return the addresses of a server, best first.

    Raises:
        ImageError: it has none.
    """
    try:
        name = server.encode() if server.isascii() else server
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{server}: its address cannot be looked up: {said}; is the name right?") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def route_to(server: str, port: int, sys: Path = SYS) -> Route:
    """Return how this machine reaches a server: the first of its addresses that answers at the port, else the first
    that there is a way to.

    Raises:
        ImageError: there is no way, or none that the capture kernel could take.
        ToolError: iproute2 is not installed.
    """
    routes: list[Route] = []
    refused: list[ImageError] = []
    for address in resolve(server, port):
        try:
            routes.append(_route(server, address, sys))
        except ImageError as error:
            refused.append(error)
            continue
        if answers(address, port):
            return routes[-1]
    if routes:
        return routes[0]
    raise refused[0]


def answers(address: str, port: int, patience: float = 5.0) -> bool:
    """Whether something listens at a TCP port."""
    try:
        knock(address, port, patience)
    except OSError:
        return False
    return True


def _route(server: str, address: str, sys: Path) -> Route:
    interfaces = Interfaces(_by_name(ip("-details", "link", "show")), _by_name(ip("address", "show")))
    try:
        (hop,) = ip("route", "get", address)
    except (ToolError, ValueError) as error:
        raise ImageError(f"{server}: this machine has no route to {address} ({error})") from None
    return describe(server, address, hop, interfaces, sys)


def ip(*words: str) -> list[Entry]:
    """Return what ``ip -json`` answers."""
    program = tools.require("ip", "iproute2")
    said = tools.run([program, "-json", *words])
    try:
        entries = json.loads(said or "[]")
    except ValueError:
        raise ToolError(f"{program} -json {' '.join(words)}: no JSON; install a newer iproute2") from None
    return [entry for entry in entries if isinstance(entry, dict) and entry]


def _by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    return {str(entry["ifname"]): entry for entry in entries if "ifname" in entry}


def describe(server: str, address: str, hop: Entry, interfaces: Interfaces, sys: Path = SYS) -> Route:
    """Return the route to a server from what ``ip route get`` says (``hop``) and what interfaces there are.

    Raises:
        ImageError: the capture kernel could not take it.
    """
    name = str(hop.get("dev", ""))
    if hop.get("type") == "local" or name == "lo":
        raise ImageError(f"{server}: {address} is this machine itself, which will have crashed; name another machine")
    if "via" in hop:
        raise ImageError(f"{server}: {address} is reached through a gateway of another family; {REMEDY}")
    if name not in interfaces.links:
        raise ImageError(f"{server}: no route to {address} says by which interface; see ip route get {address}")
    source, dynamic = _source(server, name, str(hop.get("prefsrc", "")), address, interfaces)
    links = tuple(_links(server, _port_of(server, name, interfaces, sys), interfaces, sys))
    return Route(server, address, links, source, str(hop.get("gateway", "")), dynamic)


def _source(server: str, name: str, preferred: str, address: str, interfaces: Interfaces) -> tuple[str, bool]:
    """Return our address with its prefix length, and whether DHCP (IPv4) leased it.

    A temporary address (RFC 8981) will not be this machine's for long: another one of the same network stands for it.
    """
    family = "inet6" if ipaddress.ip_address(address).version == 6 else "inet"
    rows = [
        row
        for row in interfaces.addresses.get(name, {}).get("addr_info", ())
        if row.get("family") == family and row.get("local") and row.get("scope") in ("global", "site")
    ]
    chosen = next((row for row in rows if row["local"] == preferred), None)
    if chosen is None or chosen.get("temporary"):
        lasting = [row for row in rows if not row.get("temporary") and not row.get("deprecated")]
        chosen = next(iter(lasting), chosen)
    if chosen is None:
        raise ImageError(f"{server}: {name}, by which {address} is reached, has no address of its own; {REMEDY}")
    leased = bool(chosen.get("dynamic")) and family == "inet"
    return f"{chosen['local']}/{chosen.get('prefixlen', 128 if family == 'inet6' else 32)}", leased


def _port_of(server: str, name: str, interfaces: Interfaces, sys: Path) -> str:
    """Return the interface itself, or of a bridge the port that leads out of this machine."""
    if _kind(interfaces.links[name]) != "bridge":
        return name
    ports = [
        port
        for port, link in sorted(interfaces.links.items())
        if link.get("master") == name and (_kind(link) in (BOND, VLAN) or _is_card(port, link, sys))
    ]
    if len(ports) == 1:
        return ports[0]
    raise ImageError(
        f"{server}: it is reached by the bridge {name}, which has "
        f"{'no card in it' if not ports else 'several: ' + ', '.join(ports)}; {REMEDY}"
    )


def _links(server: str, name: str, interfaces: Interfaces, sys: Path) -> Iterator[Link]:
    """Yield what has to be made, from the cards up to ``name``."""
    link = interfaces.links.get(name)
    if link is None:
        raise ImageError(f"{server}: {name} is in another network namespace; {REMEDY}")
    mtu = int(link.get("mtu") or 0)
    data = link.get("linkinfo", {}).get("info_data", {})
    kind = _kind(link)
    if kind == VLAN:
        below = str(link.get("link", ""))
        yield from _links(server, below, interfaces, sys)
        protocol = str(data.get("protocol", "802.1Q"))
        yield Link(VLAN, name, mtu=mtu, below=below, vlan=int(data.get("id") or 0), protocol=protocol)
    elif kind == BOND:
        members = tuple(sorted(port for port, found in interfaces.links.items() if found.get("master") == name))
        if not members:
            raise ImageError(f"{server}: the bond {name} has no cards; {REMEDY}")
        for member in members:
            yield from _links(server, member, interfaces, sys)
        options = tuple(_bond_options(sys / "class/net" / name / "bonding"))
        yield Link(BOND, name, address=str(link.get("address", "")), mtu=mtu, members=members, options=options)
    elif _is_card(name, link, sys):
        own = str(link.get("permaddr") or link.get("address") or "")
        now = str(link.get("address") or "")
        alone = "master" not in link or _kind(interfaces.links.get(str(link["master"]), {})) != BOND
        yield Link(CARD, name, hardware=own, address=now if alone and now != own else "", mtu=mtu)
    else:
        what = kind or ("Wi-Fi" if _is_wireless(name, sys) else str(link.get("link_type", "no Ethernet")))
        raise ImageError(f"{server}: it is reached by {name} ({what}), which the capture kernel cannot make; {REMEDY}")


def _kind(link: Entry) -> str:
    """Return what the kernel made an interface as: vlan, bond, bridge, tun …; empty for hardware."""
    return str(link.get("linkinfo", {}).get("info_kind", ""))


def _is_card(name: str, link: Entry, sys: Path) -> bool:
    device = sys / "class/net" / name / "device"
    return not _kind(link) and link.get("link_type") == "ether" and device.exists() and not _is_wireless(name, sys)


def _is_wireless(name: str, sys: Path) -> bool:
    return any((sys / "class/net" / name / mark).exists() for mark in ("wireless", "phy80211"))


def _bond_options(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what a bond was told, but for what is nothing."""
    for name in _BOND_OPTIONS:
        file = folder / name
        words = file.read_text(encoding="utf-8").split() if file.is_file() else []
        if name == "arp_ip_target":
            yield from ((name, f"+{target}") for target in words)
        elif words and words[0] not in _BOND_DEFAULTS:  # "802.3ad 4": the name, and its number
            yield name, words[0]


def modules(route: Route, sys: Path = SYS) -> Needed:
    """Return the modules behind the interfaces of a route, and their drivers."""
    names: list[str] = []
    for link in route.links:
        if link.kind in MODULES:
            names.append(MODULES[link.kind])
            continue
        card = sys / "class/net" / link.name
        # What drives the other end of its MII is no parent of the card.
        for device in (card / "phydev", card / "device"):
            if device.exists():
                names += driver_modules(device.resolve(), sys)
    return needed(names, sys) + Needed((), BUILT_IN_MOSTLY)
