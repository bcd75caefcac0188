"""A directory of the virtual machine's host; a real one: tests.guest.test_storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot.targets import mounted_target
from capture.console import Console
from capture.errors import TargetError

Tools = Callable[..., Path]


def test_it_is_mounted_by_its_tag_and_unmounted_after(tools: Tools, console: Console) -> None:
    calls = tools(mount="exit 0", umount="exit 0")
    with mounted_target("virtiofs:dumps", 0, console) as root:
        assert calls.read_text() == f"mount -t virtiofs -o rw dumps {root}\n"
    assert calls.read_text().splitlines()[1:] == [f"umount {root}"]


def test_one_that_is_not_there_yet_is_tried_again(tools: Tools, tmp_path: Path, console: Console) -> None:
    tools(
        mount=f"[ -e {tmp_path}/tried ] || {{ echo > {tmp_path}/tried; echo no such tag >&2; exit 1; }}",
        umount="exit 0",
    )
    with mounted_target("virtiofs:dumps", 5, console) as root:
        assert root.is_dir()
    assert console.lines == ["waiting up to 5 s for virtiofs:dumps"]


def test_one_that_does_not_come_is_a_line(tools: Tools, console: Console) -> None:
    tools(mount="echo no such tag >&2; exit 1")
    with pytest.raises(TargetError, match="virtiofs:dumps cannot be mounted: no such tag"):
        mounted_target("virtiofs:dumps", 0, console).__enter__()
