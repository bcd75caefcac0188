"""How the healthy machine reaches a server: what ``ip -json`` and sysfs say, in the words of iproute2 6.1."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.boot.routes import BOND, CARD, VLAN, Link
from initramfs import network
from initramfs.errors import ImageError, ToolError
from initramfs.network import Interfaces, describe
from tests.unit.initramfs.conftest import Sysfs

ADDRESS = "192.0.2.9"


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


def card(sysfs: Sysfs, name: str, number: int, **more: Any) -> dict[str, Any]:
    """A card, and its directory in sysfs."""
    device = f"pci0000:00/0000:00:0{number}.0/virtio{number}"
    sysfs.driver(device, "virtio_net")
    sysfs.driver(str(Path(device).parent), "virtio_pci")
    interface = sysfs.root / "class/net" / name
    interface.mkdir(parents=True)
    (interface / "device").symlink_to(sysfs.root / "devices" / device)
    return {"ifname": name, "mtu": 1500, "link_type": "ether", "address": f"52:54:00:00:00:0{number}", **more}


def stacked(name: str, kind: str, data: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """An interface that the kernel made."""
    info = {"info_kind": kind, **({"info_data": data} if data else {})}
    return {"ifname": name, "mtu": 1500, "link_type": "ether", "address": "52:54:00:00:00:01", "linkinfo": info, **more}


def interfaces(*links: dict[str, Any], on: str, addresses: tuple[dict[str, Any], ...] = ()) -> Interfaces:
    given = addresses or ({"family": "inet", "local": "192.0.2.2", "prefixlen": 24, "scope": "global"},)
    return Interfaces({link["ifname"]: link for link in links}, {on: {"ifname": on, "addr_info": list(given)}})


def hop(device: str, **more: Any) -> dict[str, Any]:
    return {"dst": ADDRESS, "dev": device, "prefsrc": "192.0.2.2", "flags": [], "uid": 0, "cache": [], **more}


def test_a_card_with_a_gateway_and_a_lease(sysfs: Sysfs) -> None:
    there = interfaces(
        card(sysfs, "enp1s0", 1, mtu=9000),
        on="enp1s0",
        addresses=(
            {"family": "inet", "local": "192.0.2.2", "prefixlen": 25, "scope": "global", "dynamic": True},
            {"family": "inet6", "local": "fe80::1", "prefixlen": 64, "scope": "link"},
        ),
    )
    route = describe("server", ADDRESS, hop("enp1s0", gateway="192.0.2.126"), there, sysfs.root)
    assert (route.source, route.gateway, route.dynamic) == ("192.0.2.2/25", "192.0.2.126", True)
    assert route.links == (Link(CARD, "enp1s0", hardware="52:54:00:00:00:01", mtu=9000),)
    needed = network.modules(route, sysfs.root)
    assert needed.loaded == ("virtio_pci", "virtio_net")
    assert needed.built_in == network.BUILT_IN_MOSTLY


def test_a_vlan_on_a_bond_of_two_cards(sysfs: Sysfs) -> None:
    """The cards are known by their own addresses, not by the one that the bond gave them."""
    bonding = sysfs.root / "class/net/bond0/bonding"
    bonding.mkdir(parents=True)
    for name, text in {
        "mode": "active-backup 1", "miimon": "100", "updelay": "0", "xmit_hash_policy": "layer2 0",
        "arp_ip_target": "", "primary_reselect": "always 0", "fail_over_mac": "none 0", "lacp_rate": "slow 0",
    }.items():  # fmt: skip
        (bonding / name).write_text(f"{text}\n")
    there = interfaces(
        card(sysfs, "eth1", 3, master="bond0", address="52:54:00:00:00:02", permaddr="52:54:00:00:00:03"),
        card(sysfs, "eth0", 2, master="bond0"),
        stacked("bond0", "bond", {"mode": "active-backup"}),
        stacked("storage", "vlan", {"protocol": "802.1Q", "id": 7}, link="bond0", mtu=1496),
        on="storage",
    )
    route = describe("server", ADDRESS, hop("storage"), there, sysfs.root)
    assert [link.name for link in route.links] == ["eth0", "eth1", "bond0", "storage"]
    assert [link.hardware for link in route.links[:2]] == ["52:54:00:00:00:02", "52:54:00:00:00:03"]
    assert [link.address for link in route.links[:2]] == ["", ""]
    options = (("mode", "active-backup"), ("miimon", "100"), ("lacp_rate", "slow"), ("xmit_hash_policy", "layer2"),
               ("primary_reselect", "always"))  # fmt: skip
    assert route.links[2] == Link(
        BOND, "bond0", address="52:54:00:00:00:01", mtu=1500, members=("eth0", "eth1"), options=options
    )
    assert route.links[3] == Link(VLAN, "storage", mtu=1496, below="bond0", vlan=7, protocol="802.1Q")
    assert {"bonding", "8021q"} <= {*network.modules(route, sysfs.root).built_in}


def test_a_card_with_a_borrowed_address_has_both(sysfs: Sysfs) -> None:
    there = interfaces(card(sysfs, "eth0", 1, address="02:00:00:00:00:09", permaddr="52:54:00:00:00:01"), on="eth0")
    (link,) = describe("server", ADDRESS, hop("eth0"), there, sysfs.root).links
    assert (link.hardware, link.address) == ("52:54:00:00:00:01", "02:00:00:00:00:09")


def test_a_bridge_is_its_only_card(sysfs: Sysfs) -> None:
    bridge, port = stacked("br0", "bridge"), card(sysfs, "eth0", 1, master="br0")
    guest = stacked("vnet0", "tun", master="br0")
    route = describe("server", ADDRESS, hop("br0"), interfaces(bridge, port, guest, on="br0"), sysfs.root)
    assert [link.name for link in route.links] == ["eth0"]
    assert route.source == "192.0.2.2/24"
    second = card(sysfs, "eth1", 2, master="br0")
    with pytest.raises(ImageError, match=r"the bridge br0, which has several: eth0, eth1; name a server"):
        describe("server", ADDRESS, hop("br0"), interfaces(bridge, port, second, on="br0"), sysfs.root)
    with pytest.raises(ImageError, match=r"the bridge br0, which has no card in it; name a server"):
        describe("server", ADDRESS, hop("br0"), interfaces(bridge, guest, on="br0"), sysfs.root)


def test_ipv6_leaves_temporary_addresses_to_themselves(sysfs: Sysfs) -> None:
    there = interfaces(
        card(sysfs, "eth0", 1),
        on="eth0",
        addresses=(
            {"family": "inet", "local": "192.0.2.2", "prefixlen": 24, "scope": "global"},
            {"family": "inet6", "local": "2001:db8::7ea", "prefixlen": 64, "scope": "global", "temporary": True,
             "dynamic": True},
            {"family": "inet6", "local": "2001:db8::2", "prefixlen": 64, "scope": "global", "dynamic": True},
        ),
    )  # fmt: skip
    way = hop("eth0", dst="2001:db8:1::1", prefsrc="2001:db8::7ea", gateway="fe80::1")
    route = describe("server", "2001:db8:1::1", way, there, sysfs.root)
    assert (route.source, route.gateway, route.dynamic) == ("2001:db8::2/64", "fe80::1", False)


@pytest.mark.parametrize(
    ("way", "link", "why"),
    [
        ({"type": "local", "dev": "lo"}, {}, "192.0.2.9 is this machine itself"),
        ({"dev": "wg0"}, {"ifname": "wg0", "link_type": "none", "linkinfo": {"info_kind": "wireguard"}},
         r"reached by wg0 \(wireguard\), which the capture kernel cannot make; name a server"),
        ({"dev": "ib0"}, {"ifname": "ib0", "link_type": "infiniband"}, r"reached by ib0 \(infiniband\)"),
        ({"dev": "eth0", "via": {"family": "inet6", "host": "fe80::1"}}, {}, "a gateway of another family"),
        ({"dev": "gone"}, {}, "says by which interface"),
        ({}, {}, "says by which interface"),
        ({"dev": "v"}, {"ifname": "v", "link": "elsewhere", "linkinfo": {"info_kind": "vlan"}}, "network namespace"),
        ({"dev": "b"}, {"ifname": "b", "linkinfo": {"info_kind": "bond"}}, "the bond b has no cards"),
    ],
)  # fmt: skip
def test_what_the_capture_kernel_cannot_have_is_refused_now(
    way: dict[str, Any], link: dict[str, Any], why: str, sysfs: Sysfs
) -> None:
    there = interfaces(*([link] if link else []), on=str(way.get("dev", "")))
    with pytest.raises(ImageError, match=rf"^server: .*{why}"):
        describe("server", ADDRESS, way, there, sysfs.root)


def test_wifi_and_an_interface_without_address_are_refused(sysfs: Sysfs) -> None:
    wifi = card(sysfs, "wlan0", 1)
    (sysfs.root / "class/net/wlan0/phy80211").mkdir()
    with pytest.raises(ImageError, match=r"wlan0 \(Wi-Fi\)"):
        describe("server", ADDRESS, hop("wlan0"), interfaces(wifi, on="wlan0"), sysfs.root)
    bare = Interfaces({"eth0": card(sysfs, "eth0", 2)}, {})
    with pytest.raises(ImageError, match=r"eth0, by which 192.0.2.9 is reached, has no address of its own"):
        describe("server", ADDRESS, hop("eth0"), bare, sysfs.root)


@given(kinds=st.lists(st.sampled_from(["vlan", "bond"]), max_size=5), bridged=st.booleans())
@settings(deadline=None)
def test_whatever_stands_on_what_each_link_comes_after_those_below(
    kinds: list[str], bridged: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sysfs = Sysfs(tmp_path_factory.mktemp("sys"))
    links = [card(sysfs, "eth0", 1)]
    for number, kind in enumerate(kinds):
        below = links[-1]["ifname"]
        if kind == "bond":
            links[-1]["master"] = f"l{number}"
            links.append(stacked(f"l{number}", "bond"))
        else:
            links.append(stacked(f"l{number}", "vlan", {"protocol": "802.1Q", "id": number + 1}, link=below))
    top = links[-1]["ifname"]
    if bridged:
        links[-1]["master"] = "br0"
        links.append(stacked("br0", "bridge"))
    on = "br0" if bridged else top
    route = describe("server", ADDRESS, hop(on), interfaces(*links, on=on), sysfs.root)
    made: set[str] = set()
    for link in route.links:
        assert {*link.members, *([link.below] if link.below else [])} <= made
        made.add(link.name)
    assert route.links[-1].name == top


def test_this_machine_is_asked_in_json() -> None:
    """The real iproute2, about the only interface that every machine has."""
    if shutil.which("ip") is None:
        pytest.skip("no ip here: apt-get install iproute2")
    (loopback,) = [entry for entry in network.ip("address", "show") if entry.get("ifname") == "lo"]
    assert loopback["link_type"] == "loopback"
    with pytest.raises(ImageError, match=r"^localhost: .* is this machine itself"):
        network.route_to("localhost", 9)
    with pytest.raises(ToolError):
        network.ip("no-such-object")


def test_a_name_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^no-such-host\.invalid: its address cannot be looked up: .*; is the"):
        network.resolve("no-such-host.invalid", 22)
    with pytest.raises(ImageError):
        network.resolve("a" * 300, 22)
