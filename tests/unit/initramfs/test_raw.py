"""A raw partition seen from the healthy machine. What is on it, on real block devices: test_collect."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs import devices, raw, tools, volumes
from initramfs.devices import Needed
from initramfs.errors import ImageError, ToolError


@pytest.fixture
def partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty partition, and a blkid that says so."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", str(programs))
    for name, script in (("blkid", "echo PART_ENTRY_UUID=deadbeef-03"), ("mke2fs", "exit 0"), ("findfs", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    node = tmp_path / "sda3"
    node.write_bytes(bytes(4096))
    monkeypatch.setattr(devices, "find_device", lambda _place, tags: node if tags == ("PARTUUID",) else None)
    monkeypatch.setattr(volumes, "needed_by_device", lambda _: Needed(("nvme",)))
    return node


def test_the_image_gets_a_file_system_and_what_makes_it(partition: Path) -> None:
    found = raw.needed("raw:/dev/sda3")
    assert found.loaded == ("nvme", "ext4")
    assert [path.name for path in found.binaries] == ["mke2fs", "blkid", "findfs"]
    (partition.parent / "bin/mke2fs").unlink()
    with pytest.raises(ToolError, match="mke2fs was not found: install e2fsprogs"):
        raw.needed("raw:/dev/sda3")


def test_it_is_handed_over_by_what_stays_the_same(partition: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert raw.named("raw:/dev/sda3", said.append) == "raw:PARTUUID=deadbeef-03"
    (partition.parent / "bin/blkid").write_text("#!/bin/sh\nexit 2\n")
    monkeypatch.setattr(volumes, "stable_name", lambda _: "/dev/mapper/vg-crash")
    assert raw.named("raw:/dev/vg/crash", said.append) == "raw:/dev/mapper/vg-crash"
    monkeypatch.setattr(volumes, "stable_name", lambda _: None)
    with pytest.raises(ImageError, match="may be another disk there: name a partition"):
        raw.named("raw:/dev/sda", said.append)
    assert said == []


def test_one_that_is_not_there_is_said_by_load_and_refused_by_initramfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda *_, **__: None)
    said: list[str] = []
    assert raw.named("raw:PARTUUID=1-2", said.append) == "raw:PARTUUID=1-2"
    assert said == ["raw:PARTUUID=1-2: no block device of this machine carries it now"]
    with pytest.raises(ImageError, match="raw:PARTUUID=1-2: no block device of this machine carries it now; is it att"):
        raw.needed("raw:PARTUUID=1-2")


@pytest.mark.parametrize("target", ["raw:", "raw:UUID=1", "raw:LABEL=x", "raw:sda3"])
def test_names_that_say_too_little_are_wrong_usage(target: str) -> None:
    with pytest.raises(
        UsageError, match="a raw target is raw:PARTUUID=… or raw:/dev/…, a partition or a logical volume"
    ):
        raw.needed(target)
