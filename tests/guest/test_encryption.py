"""A real crash saved encrypted: nothing of the dead kernel can be read on the disk, everything with the key."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture.dumpfile.assemble import Assembled, assemble
from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from tests.encryption import Key, make_key
from tests.guest import disk, host
from tests.guest.cases import ENCRYPTED_CASES, RESCUE, Case, parameters
from tests.guest.conftest import unavailable
from tests.guest.crash import (
    SAVE_TIMEOUT,
    ImageStore,
    Saved,
    crash,
    demand,
    only_crash,
    panicked,
    rescue_shell,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT
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


@pytest.fixture(scope="session", params=parameters(ENCRYPTED_CASES), ids=str)
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


# --- cut short


def decrypted(saved: Path, key: Key, folder: Path) -> Assembled:
    """What the key gives of a dump that was cut short, put together."""
    ran = subprocess.run(
        ["age", "-d", "-i", key.secret, saved / "vmcore.flat.age.incomplete"], capture_output=True, check=False
    )
    (folder / "flat").write_bytes(ran.stdout)
    return assemble(str(folder / "flat"), folder / "vmcore", progress=False)


def log_of(saved: Path, key: Key) -> str:
    return key.open(saved / "vmcore-dmesg.txt.age")[1].decode()


@pytest.mark.long
def test_a_power_cut_leaves_a_dump_whose_written_pages_are_all_right(
    encrypting_store: ImageStore, kernels: Callable[[str], Any], key: Key, tmp_path: Path
) -> None:
    case = replace(RESCUE, level="1")  # more than one step of 16 MiB, or of 16,384 pages
    kernels(case.kernel)
    with panicked(case, encrypting_store, tmp_path, before=TOLD) as machine:
        machine.expect(r"saving memory: +[6-8]\d%", BOOT_TIMEOUT + 2 * SAVE_TIMEOUT)
        machine.kill()
    image = target_image(tmp_path)
    disk.replay(image)
    saved = only_crash(image, tmp_path / "saved")
    assert SECRET in log_of(saved, key)
    found = decrypted(saved, key, tmp_path)
    assert found.failure is not None
    with KdumpFile(found.path) as dump:
        report = verify(dump, None, progress=False)
    assert (report.incomplete, report.exit_status, report.damaged) == (True, 3, 0)
    assert 0 < report.unwritten < report.pages
    drgn_reader(found.path)


def test_a_target_that_is_too_small_keeps_what_fits(
    encrypting_store: ImageStore, kernels: Callable[[str], Any], key: Key, tmp_path: Path
) -> None:
    """All pages that are counted are there; the files that follow the dump have room; the shell has the way out."""
    case = replace(RESCUE, target_size="64M", append="vmcapture.compress=none")
    kernels(case.kernel)
    with rescue_shell(case, encrypting_store, tmp_path) as machine:
        (line,) = [line for line in machine.console.splitlines() if line.startswith("vmcapture: saved in part")]
        assert "no room left" in line
        status, said = machine.run("vmcapture save --recipients /etc/passwd /tmp")
        assert (status, "the recipients cannot be read" in said) == (2, True)
        demand(machine, "vmcapture dmesg | grep 'Kernel panic'")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    assert {path.name for path in saved.iterdir()} == {*NAMES, "vmcore.flat.age.incomplete"} - {"vmcore.flat.age"}
    said_of_it = json.loads((saved / "manifest.json").read_text())
    assert (said_of_it["complete"], said_of_it["failed"]) == (False, ["vmcore.flat.age"])
    found = decrypted(saved, key, tmp_path)
    assert (found.failure, found.incomplete) == (None, True)
    with KdumpFile(found.path) as dump:
        report = verify(dump, None, progress=False)
    assert (report.exit_status, report.damaged) == (3, 0)
    assert report.pages - report.unwritten == said_of_it["dump"]["pages_written"] > 0
