"""A local file system as a target: what it needs, and how the capture kernel is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs import devices, local, volumes
from initramfs.devices import Needed
from initramfs.errors import ImageError


def test_an_image_for_a_disk_that_is_not_there_cannot_be_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    with pytest.raises(ImageError, match="UUID=0123: no block device of this machine carries it now; is it"):
        local.needed("UUID=0123")


def test_a_target_without_a_file_system_is_refused_while_the_machine_is_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blkid = tmp_path / "blkid"  # as util-linux answers for a disk of zeros: nothing, and status 2
    blkid.write_text("#!/bin/sh\nexit 2\n")
    blkid.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "find_device", lambda _: Path("/dev/vdb"))
    monkeypatch.setattr(volumes, "needed_by_device", lambda _: Needed(("virtio_blk",), ()))

    with pytest.raises(ImageError, match=r"/dev/vdb: blkid finds no file system on it; make one, mkfs\.ext4 /dev/vdb"):
        local.needed("/dev/vdb")
