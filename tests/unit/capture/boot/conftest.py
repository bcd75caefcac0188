"""Fixtures of the boot side: a console, the mount commands as scripts, a real disk."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capture.boot import mounting
from capture.console import Console
from tests.faults import loop_device


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``tools(mount="exit 0")``: scripts in place of findfs, mount and umount; calls are noted in ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    shell = Path("/bin/sh").resolve()

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            (folder / name).write_text(f'#!{shell}\necho {name} "$@" >> {tmp_path}/calls\n{script}\n')
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path / "calls"

    return make


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A small ext4 disk on a loop device: (device, label)."""
    label = f"vmc{os.getpid()}"
    with loop_device(tmp_path / "disk.img", 16 << 20) as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-L", label, device], check=True, capture_output=True)
        yield str(device), label


@pytest.fixture
def block_device(tmp_path: Path) -> Callable[[str], Path]:
    """Make the node of a block device; nothing is ever read from it."""

    def make(name: str = "disk") -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root makes device nodes")
        os.mknod(tmp_path / name, 0o060600, os.makedev(7, 0))
        return tmp_path / name

    return make


@pytest.fixture
def disk(tools: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``disk(umount="exit 0")``: a target whose mount and umount are shell scripts; returns the folder it shows."""

    def make(*, umount: str = "exit 0") -> Path:
        tools(findfs="echo /dev/vdb1", mount="exit 0", umount=umount)
        return tmp_path / "mnt"

    return make
