"""``vmcapture estimate`` as it measures: what it prints has been saved with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from initramfs import qemu
from initramfs.cli import main
from initramfs.estimate import STEP
from tests.guest import disk, host
from tests.guest.cache import Kernel
from tests.guest.cases import LINUX_6_1
from tests.guest.conftest import unavailable
from tests.readers import drgn_reader


def test_a_capture_kernel_with_what_is_printed_saves_everything(
    kernels: Callable[[str], Kernel],
    guest_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (line := host.missing()) is not None:
        unavailable(line)
    kernel = kernels(LINUX_6_1)
    kept = guest_folder / "estimate"
    kept.mkdir()
    run = qemu.run

    def keep(words: list[str], log: Path, *others: Any, **more: Any) -> str:
        """Run the guest; its disk and its console stay, under the number of MiB that were reserved."""
        console = run(words, log, *others, **more)
        (reserved,) = (word.partition("=")[2] for word in " ".join(words).split() if word.startswith("crashkernel="))
        os.link(log.with_name("target.ext4"), kept / f"{reserved}.ext4")
        (kept / f"{reserved}.log").write_text(console)
        return console

    monkeypatch.setattr(qemu, "run", keep)
    monkeypatch.setenv("TMPDIR", str(kept))
    monkeypatch.setattr("tempfile.tempdir", None)

    # What the guest's disk needs is not all in the image: virtio_pci is not.
    arguments = ["--modules-dir", str(kernel.modules_dir), "--kernel-image", str(kernel.vmlinuz)]
    assert main(["estimate", "--json", *arguments, "--module", "virtio_blk"]) == 0

    values = json.loads(capsys.readouterr().out)
    measured = values["measured"]
    assert values["not_measured"] is None
    assert values["reservation"] == measured["reservation"]
    assert measured["reservation"] % STEP == 0
    assert measured["memory_available_least"] >= measured["spare_wanted"] > 0
    assert measured["kernel_release"] == kernel.release

    reserved = f"{values['reservation'] >> 20}M"
    assert values["parameter"] == f"crashkernel={reserved}"
    assert f" crashkernel={reserved}" in (kept / f"{reserved}.log").read_text()
    image = kept / f"{reserved}.ext4"
    disk.check(image)
    (name,) = disk.names(image, "/var/crash")
    saved = disk.extract(image, f"/var/crash/{name}", kept / "saved")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["dump"]["level"] == 31
    assert manifest["kernel"]["release"] == kernel.release
    assert manifest["capture_machine"]["memory_total"] < values["reservation"]
    assert manifest["capture_machine"]["memory_available_least"] == measured["memory_available_least"]
    assert manifest["capture_machine"]["peak_rss"] == measured["peak_rss"]
    drgn_reader(saved / "vmcore")

    # Nothing else is left of it.
    assert [path.name for path in kept.iterdir() if path.name.startswith("vmcapture-")] == []
