"""Targets of every kind, seen from the healthy machine."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

import capture.boot.targets
from capture.errors import UsageError
from initramfs import cpio, targets
from initramfs.devices import Mount, Needed
from initramfs.errors import ImageError
from initramfs.image import LOAD_ORDER
from initramfs.targets import Kind
from initramfs.tree import File, Tree


def never(*_: object) -> NoReturn:
    raise AssertionError


def test_both_sides_know_the_same_kinds() -> None:
    assert targets.KINDS.keys() == capture.boot.targets.KINDS.keys()


@pytest.mark.parametrize("target", ["gopher:hole", "server:/export"])
def test_an_unknown_kind_is_wrong_usage_on_either_way(target: str) -> None:
    for ask in (targets.needed_by, lambda target: targets.named(target, never)):
        with pytest.raises(UsageError, match=f"{target}: no such kind of target; known: UUID=…, LABEL=…, /dev/…"):
            ask(target)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of ours without the modules of LVM."""
    tree = Tree()
    tree.add(LOAD_ORDER, File(b"virtio_blk.ko\nvirtio_pci.ko\next4.ko\n"))
    with (tmp_path / "image").open("wb") as file:
        cpio.write(tree, file)
    return tmp_path / "image"


def test_an_image_of_before_the_disk_became_a_logical_volume_is_doubted(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"UUID=1": Needed(("virtio_blk",), ("xfs",)), "UUID=2": Needed(("virtio-blk", "dm_mod", "dm_raid", "nfs"))}
    kind = targets.KINDS[""]._replace(needed=lambda target, _: used[target])
    monkeypatch.setitem(targets.KINDS, "", kind)
    monkeypatch.setattr(targets, "is_loaded", lambda name: name != "nfs")
    assert targets.lacking_modules(["UUID=1"], image) is None
    said = targets.lacking_modules(["virtiofs:tag", "UUID=1", "UUID=2"], image)
    assert said == (
        f"{image} has no dm_mod and no dm_raid, which UUID=2 uses now: build the image anew, vmcapture initramfs with "
        "the same --target, and load it"
    )
    (image.parent / "other").write_bytes(b"x" * 1000)
    assert targets.lacking_modules(["UUID=2"], image.parent / "other") is None


def test_a_disk_that_is_not_there_is_not_judged(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: str, _: object) -> NoReturn:
        raise ImageError(target)

    monkeypatch.setitem(targets.KINDS, "", targets.KINDS[""]._replace(needed=refuse))
    assert targets.lacking_modules(["UUID=1"], image) is None


def test_the_most_demanding_target_is_counted_once() -> None:
    ssh = targets.memory_of(["ssh:u@h"])
    assert targets.memory_of(["UUID=1", "ssh:u@h", "ssh:u@g", "nfs:s:/e"]) == max(ssh, targets.memory_of(["nfs:s:/e"]))
    assert ssh > targets.memory_of(["UUID=1"]) == targets.memory_of([]) == 0


def test_a_mount_of_a_kind_is_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Needed(("gopher",), files=(("/etc/hole", b"deep"),))
    kind = Kind(
        lambda target, _: {"gopher:hole": needed}[target],
        never,
        filesystems=("gopherfs",),
        of_mount=lambda mount: f"gopher:{mount.device}",
    )
    monkeypatch.setitem(targets.KINDS, "gopher", kind)
    mount = Mount("hole", Path("/var/crash"), "/", "gopherfs")
    assert targets.needed_by_mount(mount) == needed
    assert targets.named_mount(mount) == "gopher:hole"
