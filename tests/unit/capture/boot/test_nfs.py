"""NFS targets: what the words mean, and what a refusal says. Real mounts are in tests/guest/test_network.py."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from capture.boot import mounting, network, nfs, routes
from capture.boot.nfs import Export
from capture.boot.routes import BOND, CARD, Link, Route
from capture.console import Console
from capture.errors import TargetError, UsageError


@pytest.mark.parametrize(
    ("target", "export"),
    [
        ("nfs:server:/export", Export("server", "/export")),
        ("nfs:192.0.2.1:/", Export("192.0.2.1", "/")),
        ("nfs:[2001:db8::1]:/a/b:c", Export("2001:db8::1", "/a/b:c")),
        ("nfs:dumps.example:/srv/dumps", Export("dumps.example", "/srv/dumps")),
    ],
)
def test_a_target_names_server_and_export(target: str, export: Export) -> None:
    assert nfs.parse(target) == export


@pytest.mark.parametrize(
    "target",
    ["nfs:", "nfs:server", "nfs:server:export", "nfs::/x", "nfs:2001:db8::1:/x", "nfs:[fe80::1%eth0]:/x", "nfs:s:/a,b",
     "nfs:user@server:/x", "ssh:server:/x", "nfs:server:/x y"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_right_form(target: str, console: Console) -> None:
    with pytest.raises(UsageError, match=r"not of the form nfs:SERVER:/EXPORT"):
        nfs.parse(target)
    with pytest.raises(TargetError, match=r"not of the form nfs:SERVER:/EXPORT"), nfs.mounted(target, 0, console):
        pass


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ((errno.EACCES,) * 4, "Permission denied; the server does not export /x to this machine"),
        ((errno.ENOENT,) * 3 + (errno.EACCES,), "Permission denied; the server does not export /x to this machine"),
        ((errno.EPROTONOSUPPORT,) * 3 + (errno.ENOENT,), "No such file or directory; the server does not export /x"),
        ((errno.EPROTONOSUPPORT,) * 4, "Protocol not supported; no NFS 4.2, 4.1, 4.0, 3 there"),
        ((errno.ENODEV,), "No such device; this kernel has no NFS: module nfs"),
        ((errno.ETIMEDOUT,), "Connection timed out; see to the server"),
    ],
)
def test_of_what_each_version_was_answered_the_most_telling_is_said(failures: tuple[int, ...], said: str) -> None:
    line = nfs._refusal(Export("server", "/x"), "192.0.2.1", list(failures))
    assert line.startswith(f"nfs:server:/x cannot be mounted from 192.0.2.1: {said}")
    assert "\n" not in line


def test_a_kernel_that_cannot_mount_says_so(tmp_path: Path) -> None:
    """Whoever runs this is no root, or the kernel has no NFS, or nobody answers on this port of this machine."""
    with pytest.raises(TargetError, match=r"nfs:server:/x cannot be mounted from 127\.0\.0\.1: "):
        nfs.mount(Export("server", "/x"), "127.0.0.1", tmp_path)


@pytest.mark.parametrize("before", ["", "\n", "of-the-command-line\n"])
def test_a_server_can_tell_capture_kernels_apart_that_all_have_no_name(
    before: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two clients with one name it ends what the first one has begun; by then nothing is mounted yet."""
    (tmp_path / "nfs4_unique_id").write_text(before)
    monkeypatch.setattr(nfs, "_UNIQUE_ID", tmp_path / "nfs4_unique_id")
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    monkeypatch.setattr(network, "connect", lambda *_: "127.0.0.1")
    links = (Link(CARD, "eth0", hardware="52:54:00:00:00:02"), Link(CARD, "eth1", hardware="52:54:00:00:00:03"))
    route = Route("server", "127.0.0.1", (*links, Link(BOND, "bond0", members=("eth0", "eth1"))), "192.0.2.2/24")
    monkeypatch.setattr(routes, "route_to", lambda _server: route)
    with pytest.raises(TargetError, match="cannot be mounted"), nfs.mounted("nfs:server:/x", 0, console):
        pass
    said = (tmp_path / "nfs4_unique_id").read_text()
    assert said == (before if before.strip() else "vmcapture-52:54:00:00:00:02")
    (tmp_path / "nfs4_unique_id").unlink()
    with pytest.raises(TargetError, match="cannot be mounted"), nfs.mounted("nfs:server:/x", 0, console):
        pass
