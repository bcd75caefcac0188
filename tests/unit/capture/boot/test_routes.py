"""How servers are reached, as a file of the image."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.boot import routes
from capture.boot.routes import BOND, CARD, VLAN, Link, Route
from capture.errors import TargetError

ROUTE = Route(
    "dumps.example",
    "192.0.2.1",
    (
        Link(CARD, "eth0", hardware="52:54:00:00:00:02", mtu=9000),
        Link(CARD, "eth1", hardware="52:54:00:00:00:03", address="52:54:00:00:00:04"),
        Link(BOND, "bond0", members=("eth0", "eth1"), options=(("mode", "802.3ad"), ("miimon", "100"))),
        Link(VLAN, "bond0.7", below="bond0", vlan=7, protocol="802.1Q", mtu=1500),
    ),
    "10.0.0.2/24",
    "10.0.0.1",
    dynamic=True,
)

texts = st.text(max_size=20)
links = st.builds(
    Link, texts, texts, texts, texts, st.integers(), st.lists(texts, max_size=3).map(tuple),
    st.lists(st.tuples(texts, texts), max_size=3).map(tuple), texts, st.integers(), texts,
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)


def test_a_route_says_everything_in_one_line() -> None:
    assert ROUTE.line == (
        "dumps.example is 192.0.2.1 through 10.0.0.1, from 10.0.0.2/24 (DHCP) on bond0.7 over bond0 over "
        "eth1 (52:54:00:00:00:03) over eth0 (52:54:00:00:00:02)"
    )


@given(
    st.builds(
        Route, texts, texts, st.lists(links, min_size=1, max_size=4).map(tuple), texts, texts, dynamic=st.booleans()
    )
)
def test_what_is_written_is_read(route: Route) -> None:
    assert routes.parse(routes.dump(route)) == route


@given(st.binary(max_size=64))
def test_bytes_that_are_no_route_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        routes.parse(text)


@given(st.sampled_from([("route",), ("route", "links"), ("route", "links", 0), ("format",)]), anything)
def test_a_file_with_something_else_in_it_is_refused_or_still_a_route(
    place: tuple[str | int, ...], value: object
) -> None:
    values = json.loads(routes.dump(ROUTE))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with contextlib.suppress(ValueError):
        assert routes.parse(json.dumps(values).encode()).links


def test_a_server_that_the_image_does_not_know_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"other: the image knows no way to it .*build the image with this target"):
        routes.route_to("other", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TargetError, match=r"broken: .*broken.json cannot be read: .*vmcapture save DIR"):
        routes.route_to("broken", tmp_path)
    routes.place_of(ROUTE.server, tmp_path).write_bytes(routes.dump(ROUTE))
    assert routes.route_to(ROUTE.server, tmp_path) == ROUTE
