"""What is mounted for a moment is gone afterwards, or stays whole."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from capture.boot.raw import FILE_SYSTEM, LABEL
from capture.boot.routes import Route
from initramfs import collect, mounting, remote, virtiofs
from initramfs.errors import ImageError, ToolError
from tests.faults import tmpfs


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which whatever is mounted has a dump on it, and somebody looks at it just then.

    The directory in which mount points are made is returned.
    """
    programs, points = tmp_path / "bin", tmp_path / "points"
    for folder in (programs, points):
        folder.mkdir()
    (programs / "mount").write_text('#!/bin/sh\nfor point; do :; done\necho dump > "$point/vmcore"\n')
    (programs / "umount").write_text('#!/bin/sh\necho "umount: $1: target is busy." >&2\nexit 32\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(points))
    return points


def dumps(points: Path) -> list[str]:
    return [path.read_text() for path in points.rglob("vmcore")]


def test_what_cannot_be_unmounted_loses_nothing(busy: Path) -> None:
    with pytest.raises(ToolError, match=r"still there, unmount it: .*target is busy"), mounting.mounted_for_now("x"):
        pass
    assert dumps(busy) == ["dump\n"]


def test_nor_does_a_server_or_a_directory_of_the_host(busy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initramfs.network.answers", lambda *_: True)
    route = Route("server", "127.0.0.1", (), "192.0.2.2/24")

    def mount(point: Path, _secrets: Path) -> None:
        (point / "vmcore").write_text("dump\n")

    with pytest.raises(ImageError, match="target is busy"), remote.tried("nfs:server:/x", route, 1, mount):
        pass
    with pytest.raises(ImageError, match="target is busy"):
        virtiofs.needed("virtiofs:dumps")
    assert dumps(busy) == ["dump\n"] * 2


def test_nor_does_a_raw_partition(busy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "signature", lambda _: {"TYPE": FILE_SYSTEM, "LABEL": LABEL})
    with pytest.raises(ToolError, match="target is busy"):
        collect.collect(tmp_path / "vdz1", tmp_path / "crash", print)
    assert dumps(busy) == ["dump\n"]


@pytest.mark.parametrize("interrupted", [True, False])
def test_whoever_is_interrupted_leaves_no_mount(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tmpfs(tmp_path / "tried", "size=64k"):  # skips where nothing may be mounted
        points = tmp_path / "points"
    points.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(points))

    def mount(point: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", point], check=True)
        (point / "vmcore").write_text("dump\n")
        if interrupted:
            raise KeyboardInterrupt

    try:
        with mounting.mounted_by(mount) as point:
            assert dumps(points) == ["dump\n"]
            assert os.path.ismount(point)
    except KeyboardInterrupt:
        assert interrupted
    assert list(points.iterdir()) == []


def test_why_a_server_has_gone_is_said_and_not_that_there_is_nothing_to_unmount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tmpfs(tmp_path / "tried", "size=64k"):  # skips where nothing may be mounted
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def mount(point: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", point], check=True)

    def lose(point: Path) -> None:
        subprocess.run(["umount", point], check=True)
        raise ImageError("the connection is lost")

    with pytest.raises(ImageError, match="the connection is lost"), mounting.mounted_by(mount) as point:
        lose(point)
    with pytest.raises(ToolError, match="unmount it"), mounting.mounted_by(mount) as point:
        subprocess.run(["umount", point], check=True)  # what was written meanwhile is not there
