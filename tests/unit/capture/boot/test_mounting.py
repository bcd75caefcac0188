"""Where targets are mounted: a place that is in use, or hangs, is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capture.boot import mounting
from capture.boot.mounting import mounted
from capture.console import Console
from capture.errors import TargetError
from tests.faults import tmpfs

Tools = Callable[..., Path]

MOUNT, NAME = ("mount", "server:/export"), "a target"


@pytest.fixture
def mounted_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    mount = shutil.which("mount") or "mount"  # a test may put another one first in the PATH
    with tmpfs(tmp_path / "mnt", "size=64k"):
        yield tmp_path / "mnt"
        if not os.path.ismount(tmp_path / "mnt"):
            subprocess.run([mount, "-t", "tmpfs", "tmpfs", tmp_path / "mnt"], check=True)


def test_where_somebody_works_in_what_is_mounted_another_place_is_taken(
    mounted_already: Path, tools: Tools, console: Console
) -> None:
    umount = shutil.which("umount")
    tools(mount="exit 0", umount=f'case $* in *-2) exit 0;; esac; exec {umount} "$@"')
    with (mounted_already / "file").open("w"), mounted(MOUNT, NAME, NAME, console) as root:
        assert root == mounted_already.with_name("mnt-2")
    assert os.path.ismount(mounted_already)
    assert console.lines == []


def test_a_place_that_was_given_up_is_never_touched_again(tools: Tools, console: Console) -> None:
    calls = tools(mount="exit 0", umount="exit 0")
    for number in range(1, mounting._MOST_MOUNT_POINTS + 1):
        with mounted(MOUNT, NAME, NAME, console) as root:
            assert root.name == (f"mnt-{number}" if number > 1 else "mnt")
        mounting.give_up_mount_points()
    calls.unlink()
    with pytest.raises(TargetError, match="all in use"), mounted(MOUNT, NAME, NAME, console):
        pytest.fail("mounted")
    assert not calls.exists()


def test_a_mount_that_a_killed_save_left_behind_is_taken_away(
    mounted_already: Path, tools: Tools, console: Console
) -> None:
    umount = shutil.which("umount")
    calls = tools(mount="exit 0", umount=f'exec {umount} "$@"')
    with mounted(MOUNT, NAME, NAME, console):
        assert not os.path.ismount(mounted_already)
        assert [line.split()[0] for line in calls.read_text().splitlines()] == ["umount", "mount"]


def test_a_link_to_itself_on_a_target_is_left_to_those_who_make_directories(tmp_path: Path) -> None:
    """Nothing leads out of it; the next target has its turn where none can be made."""
    (tmp_path / "loop").symlink_to("loop")
    assert mounting.inside(tmp_path, "/loop/crash", "a target") == tmp_path / "loop/crash"
    with pytest.raises(OSError, match="symbolic links"):
        (tmp_path / "loop/crash").mkdir()
