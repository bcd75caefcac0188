"""How servers are reached: what the healthy system knew of its network, for the capture kernel.

A file in PLACE for each server that a target names. Names are not resolved in the capture kernel, and cards are known
by their hardware address: the kernel may count them in another order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capture.errors import TargetError

PLACE = Path("/etc/vmcapture/network")
FORMAT = 1
CARD, BOND, VLAN = "card", "bond", "vlan"


class Link(NamedTuple):
    """One interface.

    ``name`` is what the healthy system called it; a card keeps the name that the capture kernel gives it. ``hardware``
    is a card's own address, ``address`` the one that it had where that was another. ``options`` are files of the
    bond's directory in sysfs and what they held, in the order in which they have to be written.
    """

    kind: str
    name: str
    hardware: str = ""
    address: str = ""
    mtu: int = 0
    members: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    below: str = ""
    vlan: int = 0
    protocol: str = ""


class Route(NamedTuple):
    """The way to one server.

    ``server`` is its name in the target, ``address`` the one that it had when the image was built. ``links`` are made
    in this order; the last one carries ``source``, an address with its prefix length. ``gateway`` is the next hop,
    empty where the server is on the same network. ``dynamic``: the address was leased by a DHCP server.
    """

    server: str
    address: str
    links: tuple[Link, ...]
    source: str
    gateway: str = ""
    dynamic: bool = False

    @property
    def line(self) -> str:
        """Everything in one line."""
        by = f" through {self.gateway}" if self.gateway else ""
        over = " over ".join(
            f"{link.name} ({link.hardware})" if link.kind == CARD else link.name for link in reversed(self.links)
        )
        leased = " (DHCP)" if self.dynamic else ""
        return f"{self.server} is {self.address}{by}, from {self.source}{leased} on {over}"


def place_of(server: str, place: Path | None = None) -> Path:
    """Return the file of a server."""
    return (place or PLACE) / f"{server}.json"


def dump(route: Route) -> bytes:
    """Return what stands in the file."""
    values = {**route._asdict(), "links": [link._asdict() for link in route.links]}
    return json.dumps({"format": FORMAT, "route": values}, indent=1).encode() + b"\n"


def parse(text: bytes) -> Route:
    """Return what a file says.

    Raises:
        ValueError: it is none of ours.
    """
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, not {FORMAT}")
        return _route(values["route"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no route ({type(error).__name__}: {error})") from None


def _route(value: Mapping[str, Any]) -> Route:
    route = Route(**{**value, "links": tuple(_link(link) for link in value["links"])})
    if not route.links or not all(isinstance(text, str) for text in (route.server, route.address, route.source)):
        raise TypeError("a route without links, server or addresses")
    return route


def _link(value: Mapping[str, Any]) -> Link:
    options = tuple((str(name), str(setting)) for name, setting in value["options"])
    return Link(**{**value, "members": tuple(value["members"]), "options": options})


def route_to(server: str, place: Path | None = None) -> Route:
    """Return the way to a server that a target names.

    Raises:
        TargetError: the image has none.
    """
    file = place_of(server, place)
    try:
        return parse(file.read_bytes())
    except OSError as error:
        reason = f"the image knows no way to it ({file}: {error.strerror})"
    except ValueError as error:
        reason = f"{file} cannot be read: {error}"
    raise TargetError(
        f"{server}: {reason}; build the image with this target, or mount any disk and name it: vmcapture save DIR"
    )
