"""Whether a server could be reached now: real sockets, and each form of a target's name."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from initramfs import reach


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("nfs:server:/export", ("server", 2049)),
        ("nfs:[fe80::1]:/export/a", ("fe80::1", 2049)),
        ("ssh:kdump@server", ("server", 22)),
        ("ssh:kdump@server:2222", ("server", 2222)),
        ("ssh:kdump@[fe80::1]", ("fe80::1", 22)),
        ("ssh:kdump@[fe80::1]:2222", ("fe80::1", 2222)),
    ],
)
def test_the_server_is_asked_at_the_port_of_its_service(
    target: str, place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        assert timeout == reach.TIMEOUT
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    found = reach.reach(target, "/var/crash")
    assert asked == [place]
    assert found.reached
    assert found.what.startswith(f"{target}: port {place[1]} answers")


def test_a_real_port_that_answers_and_one_that_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"ssh:kdump@127.0.0.1:{server.getsockname()[1]}"
        assert reach.reach(target, "/").reached
    found = reach.reach(target, "/")
    assert found.reached is False
    assert found.what == f"{target}: Connection refused"
    assert found.remedy


@pytest.mark.parametrize("target", ["ssh:kdump@a..b", "ssh:kdump@server:65536", "nfs:server"])
def test_a_target_that_makes_no_sense_is_a_line(target: str) -> None:
    found = reach.reach(target, "/var/crash")
    assert found.reached is False
    assert found.what.startswith(f"{target}: ")


def test_a_raw_partition_is_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(bytes(1 << 20))
    found = reach.reach(f"raw:{tmp_path}/part", "/var/crash")
    assert (found.reached, found.free) == (True, 1 << 20)
    assert reach.reach("raw:PARTUUID=0", "/var/crash").reached is False


def test_what_cannot_be_tried_from_here_is_not_called_good() -> None:
    assert reach.reach("virtiofs:dumps", "/var/crash").reached is None
