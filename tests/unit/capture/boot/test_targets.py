"""Targets of every kind: told apart, and handed to the module that mounts them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import targets
from capture.boot.targets import KINDS, devices_of, kind_of, mounted_target, patience
from capture.console import Console
from capture.errors import TargetError

Tools = Callable[..., Path]


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("LABEL=crash", ""),
        ("LABEL=a:b", ""),
        ("UUID=0123", ""),
        ("/dev/vdb", ""),
        ("/dev/disk/by-path/pci-0000:00:04.0", ""),
        ("crash", ""),
        ("nfs:server:/export", "nfs"),
        ("nfs:[fe80::1]:/export=1", "nfs"),
        ("raw:PARTUUID=01-02", "raw"),
    ],
)
def test_the_word_before_the_first_colon_is_the_kind(target: str, kind: str) -> None:
    assert kind_of(target) == kind


def test_a_server_is_waited_for_longer_than_a_disk_where_nobody_says_how_long() -> None:
    spanning_tree = 30
    assert patience("nfs:server:/export", None) == patience("ssh:server", None) > spanning_tree + 10
    assert patience("/dev/vdb", None) == patience("raw:/dev/vdb", None) == 30
    assert patience("nfs:server:/export", 5) == patience("/dev/vdb", 5) == 5
    assert patience("ssh:server", 0) == 0


def test_every_kind_has_a_module_that_mounts_it() -> None:
    for module in KINDS.values():
        assert callable(importlib.import_module(module).mounted)


def test_a_target_of_its_kind_is_mounted_and_unmounted(
    tools: Tools, block_device: Callable[[], Path], tmp_path: Path, console: Console
) -> None:
    disk = block_device()
    calls = tools(mount="exit 0", umount="exit 0")
    with mounted_target(str(disk), 0, console) as root:
        assert root == tmp_path / "mnt"
    assert calls.read_text().splitlines() == [f"mount -o rw {disk} {root}", f"umount {root}"]


def test_a_kind_that_nobody_knows_is_a_line_with_the_way_out(console: Console) -> None:
    with pytest.raises(TargetError, match=r"target gopher:hole: no such kind of target; .*vmcapture save DIR"):
        mounted_target("gopher:hole", 0, console)


def test_only_local_targets_are_looked_for_in_advance(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tools(findfs="case $1 in LABEL=here) echo /dev/vdb;; *) exit 1;; esac")
    monkeypatch.setitem(targets.KINDS, "nfs", "capture.boot.none")
    assert devices_of(["nfs:server:/export", "LABEL=gone", "LABEL=here"]) == {"LABEL=here": "/dev/vdb"}
    assert calls.read_text().splitlines() == ["findfs LABEL=gone", "findfs LABEL=here"]
