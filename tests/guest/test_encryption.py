"""A real crash saved encrypted: nothing of the dead kernel can be read on the disk, everything with the key."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from tests.encryption import Key, make_key
from tests.guest import disk, host
from tests.guest.cases import ENCRYPTED_CASES, Case
from tests.guest.conftest import unavailable
from tests.guest.crash import ImageStore, Saved, crash
from tests.readers import by_hand, drgn_reader, mapped

SECRET = "the-combination-of-the-safe-is-90125"
TOLD = (f"echo {SECRET} > /dev/kmsg", f"export TOLD={SECRET}")
TELLTALES = (SECRET, "Linux version ", "Kernel panic - not syncing", "OSRELEASE=", "KDUMP   ", "makedumpfile", "RIP: ")
"""What memory, log, registers and dump of a dead kernel have in the clear."""
NAMES = (
    "capture-log.txt.age", "manifest-full.json.age", "manifest.json", "registers.json.age", "registers.txt.age",
    "vmcore-dmesg.txt.age", "vmcore.flat.age",
)  # fmt: skip


@pytest.fixture(scope="session")
def key(guest_folder: Path) -> Key:
    """A secret key, and beside it its public half."""
    if (line := host.missing(["age", "age-keygen"])) is not None:
        unavailable(line)
    return make_key(guest_folder)


@pytest.fixture(scope="session")
def encrypting_store(key: Key, guest_folder: Path) -> ImageStore:
    if (line := host.missing()) is not None:
        unavailable(line)
    return ImageStore(guest_folder / "encrypting-images", recipients=key.recipients)


@pytest.fixture(scope="session", params=ENCRYPTED_CASES, ids=str)
def saved(
    request: pytest.FixtureRequest,
    encrypting_store: ImageStore,
    kernels: Callable[[str], Any],
    guest_folder: Path,
) -> Saved:
    case: Case = request.param
    kernels(case.kernel)
    return crash(case, encrypting_store, guest_folder / case.name, before=TOLD)


@pytest.fixture(scope="session")
def opened(saved: Saved, key: Key) -> Path:
    """What was saved, decrypted, as somebody with the key does it; the dump put together."""
    folder = saved.saved.parent / "opened"
    folder.mkdir(exist_ok=True)
    for path in saved.saved.glob("*.age"):
        host.run("age", "-d", "-i", key.secret, "-o", folder / path.name.removesuffix(".age"), path)
    with (folder / "vmcore.flat").open("rb") as flat:
        subprocess.run([sys.executable, "-m", "capture", "dump", "-", str(folder / "vmcore")], stdin=flat, check=True)
    return folder


def manifest(saved: Saved) -> Any:
    return json.loads((saved.saved / "manifest.json").read_text())


def test_everything_is_saved_and_only_the_manifest_is_in_the_clear(saved: Saved) -> None:
    assert sorted(path.name for path in saved.saved.iterdir()) == sorted(NAMES)
    said = manifest(saved)
    assert (said["complete"], said["failed"]) == (True, [])
    assert said["dump"]["whole"]
    assert set(said["files"]) == set(NAMES) - {"manifest.json"}
    for name in NAMES:
        assert disk.stat(saved.target, f"{saved.saved_in_target}/{name}").mode == 0o600


def test_nothing_of_the_dead_kernel_is_anywhere_on_the_disk(saved: Saved) -> None:
    """Not in a file, not in a block that was freed."""
    with saved.target.open("rb") as image, mmap.mmap(image.fileno(), 0, prot=mmap.PROT_READ) as raw:
        assert raw.find(b"age-encryption.org/v1") > 0
        assert [tale for tale in TELLTALES if raw.find(tale.encode()) >= 0] == []


def test_the_key_opens_log_and_registers(saved: Saved, opened: Path) -> None:
    log = (opened / "vmcore-dmesg.txt").read_text()
    assert SECRET in log
    assert "Kernel panic - not syncing: sysrq triggered crash" in log
    assert len(json.loads((opened / "registers.json").read_text())["cpus"]) == saved.case.cpus
    full = json.loads((opened / "manifest-full.json").read_text())
    assert full["kernel"]["panic"].endswith("sysrq triggered crash")
    assert full["files"].items() <= manifest(saved)["files"].items()
    assert re.search("^saving to .*, encrypted to the keys in ", (opened / "capture-log.txt").read_text(), re.MULTILINE)


def test_the_key_opens_the_dump(saved: Saved, opened: Path) -> None:
    with KdumpFile(opened / "vmcore") as dump:
        report = verify(dump, None, progress=False)
    assert report.exit_status == 0
    assert report.pages == manifest(saved)["dump"]["pages"]
    drgn_reader(opened / "vmcore")
    drgn_reader(opened / "vmcore.flat")
    assert not by_hand(opened / "vmcore").incomplete
    with mapped(opened / "vmcore") as raw:
        assert raw.find(SECRET.encode()) > 0, "else it would prove nothing that it is not on the disk"
        assert raw.find(b"Linux version ") > 0


def test_there_was_memory_left(saved: Saved) -> None:
    machine = manifest(saved)["capture_machine"]
    assert machine["memory_total"] < int(saved.case.crashkernel.rstrip("M")) << 20
    assert machine["memory_available_least"] > 0
    assert re.search("Out of memory|invoked oom-killer", saved.console) is None
