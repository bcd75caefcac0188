"""Targets of every kind, seen from the healthy machine."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

import capture.boot.targets
from capture.errors import UsageError
from initramfs import targets
from initramfs.devices import Mount, Needed
from initramfs.targets import Kind


def never(*_: object) -> NoReturn:
    raise AssertionError


def test_both_sides_know_the_same_kinds() -> None:
    assert targets.KINDS.keys() == capture.boot.targets.KINDS.keys()


@pytest.mark.parametrize("target", ["gopher:hole", "server:/export"])
def test_an_unknown_kind_is_wrong_usage_on_either_way(target: str) -> None:
    for ask in (targets.needed_by, lambda target: targets.named(target, never)):
        with pytest.raises(UsageError, match=f"{target}: no such kind of target; known: UUID=…, LABEL=…, /dev/…"):
            ask(target)


def test_a_mount_of_a_kind_is_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Needed(("gopher",), files=(("/etc/hole", b"deep"),))
    kind = Kind(
        {"gopher:hole": needed}.__getitem__,
        never,
        filesystems=("gopherfs",),
        of_mount=lambda mount: f"gopher:{mount.device}",
    )
    monkeypatch.setitem(targets.KINDS, "gopher", kind)
    mount = Mount("hole", Path("/var/crash"), "/", "gopherfs")
    assert targets.needed_by_mount(mount) == needed
    assert targets.named_mount(mount) == "gopher:hole"
