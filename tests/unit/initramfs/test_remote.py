"""What targets on other machines have in common: a file written where the dumps will be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from capture.boot import routes
from capture.boot.routes import CARD, Link, Route
from capture.boot.ssh import Credentials, Login, mount
from capture.errors import TargetError
from initramfs import network, nfs, remote, ssh
from initramfs.devices import Mount
from initramfs.errors import ImageError
from initramfs.image import static_busybox
from tests.faults import tmpfs
from tests.unit.conftest import running_openssh


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "srv").mkdir()
    remote.probe(tmp_path, "/srv/new/er", "nfs:server:/x")
    assert list((tmp_path / "srv").iterdir()) == []


def test_a_directory_that_leads_away_from_the_server_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/var")
    with pytest.raises(TargetError, match=r"^nfs:server:/x: /link/crash on it is a symbolic link to /var/crash"):
        remote.probe(tmp_path, "/link/crash", "nfs:server:/x")


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "size=4k") as full:
        (full / "taken").write_bytes(bytes(4096))
        with pytest.raises(ImageError, match=r"^nfs:server:/x: / on it cannot be written: No space left .*; make room"):
            remote.probe(full, "/", "nfs:server:/x")
        assert [path.name for path in full.iterdir()] == ["taken"]
    with (
        tmpfs(tmp_path / "frozen", "size=4k,ro") as frozen,
        pytest.raises(ImageError, match=r"/ on it cannot be written: Read-only file system; .*export it rw"),
    ):
        remote.probe(frozen, "/crash", "nfs:server:/x")


def test_a_full_ssh_server_is_told_to_make_room(tmp_path: Path) -> None:
    """sshfs says that of it in another way."""
    point = tmp_path / "point"
    point.mkdir()
    with tmpfs(tmp_path / "full", "size=4k") as full, running_openssh(tmp_path) as server:
        (full / "taken").write_bytes(bytes(4096))
        (tmp_path / "known").write_bytes(server.known_hosts("pinned"))
        has = Credentials(server.key, tmp_path / "known")
        mount(Login("root", "pinned", server.port), "127.0.0.1", point, has, scratch=tmp_path / "scratch")
        try:
            with pytest.raises(ImageError, match=r"full on it cannot be written: .*; make room there"):
                remote.probe(point, str(full), "ssh:root@pinned")
        finally:
            subprocess.run(["umount", point], check=True)


def test_what_the_image_needs_for_a_network_is_there() -> None:
    """The busybox of this machine knows what the capture kernel will type."""
    route = Route("server", "192.0.2.1", (Link(CARD, "none0", hardware="52:54:00:00:00:02"),), "192.0.2.2/24")
    needed = remote.needed(route)
    assert remote.routes_in(needed.files) == [route]
    assert routes.parse(dict(needed.files)[str(routes.place_of("server"))]) == route  # type: ignore[arg-type]


def test_a_busybox_without_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "APPLETS", ("ip", "no_such_applet"))
    route = Route("server", "192.0.2.1", (Link(CARD, "none0"),), "192.0.2.2/24")
    with pytest.raises(ImageError, match=rf"{static_busybox()} has no no_such_applet: install busybox-static"):
        remote.needed(route)


def test_before_it_is_tried_somebody_has_to_listen() -> None:
    route = Route("server", "127.0.0.1", (Link(CARD, "eth0"),), "192.0.2.2/24")
    with (
        pytest.raises(ImageError, match=r"^nfs:server:/x: 127.0.0.1 does not answer at port 1: .* --no-check"),
        remote.tried("nfs:server:/x", route, 1, lambda *_: pytest.fail("mounted")),
    ):
        pass


def test_a_server_that_does_not_answer_now_is_a_doubt_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert nfs.named("nfs:no-such-host.invalid:/x", said.append) == "nfs:no-such-host.invalid:/x"
    assert "its address cannot be looked up" in said.pop()
    route = Route("server", "127.0.0.1", (Link(CARD, "eth0"),), "192.0.2.2/24")
    monkeypatch.setattr(network, "route_to", lambda *_: route)
    assert ssh.named("ssh:u@server:1", said.append) == "ssh:u@server:1"
    assert said == ["ssh:u@server:1: 127.0.0.1 does not answer at port 1 now"]


def test_what_is_mounted_by_nfs_is_a_target() -> None:
    assert nfs.of_mount(Mount("server:/export", Path("/var/crash"), "/", "nfs4")) == "nfs:server:/export"
