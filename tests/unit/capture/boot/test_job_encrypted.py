"""A save that this machine cannot read back: what is in the clear, what the key opens, and what a failure costs."""

from __future__ import annotations

import io
import json
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture import selftest
from capture.boot import job, mounting
from capture.boot.config import parse
from capture.boot.room import make_room
from capture.console import Console
from capture.dumpfile import encrypted
from capture.dumpfile.assemble import assemble
from capture.errors import TargetError, UsageError
from capture.vmcore import open_vmcore
from tests.builders import PAGE, PANIC, crashed_core, numbered
from tests.encryption import Key
from tests.faults import raising, tmpfs, umask
from tests.outcome import WHEN, Run, check_manifest, dump_options, listing, manifest_of, the_directory
from tests.readers import ElfPages, by_hand

WriteFile = Callable[[bytes], str]

NAMES = (
    "vmcore-dmesg.txt.age", "registers.txt.age", "registers.json.age", "vmcore.flat.age", "capture-log.txt.age",
    "manifest-full.json.age", "manifest.json",
)  # fmt: skip
"""In the order in which they are made."""
SECRET = b"the combination of the safe is 90125"
PLAIN = (SECRET, PANIC, b"panic", b"Linux version", b"OSRELEASE=", b"KDUMP   ", b"makedumpfile", b'"rip"', b"#1 SMP")
"""What memory, log, registers and dump have in the clear."""


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "var/crash"


@pytest.fixture
def source(vmcore_file: WriteFile) -> str:
    return vmcore_file(crashed_core(pages=SECRET.ljust(PAGE, b"\1") + numbered(0, 20)))


def save(source: str, parent: Path, key: Key, console: Console | None = None, **options: Any) -> job.SaveReport:
    with open_vmcore(source) as vmcore:
        options = {"recipients": key.recipients, "compression": "none", **options}
        return job.save(vmcore, parent, dump_options(**options), console or Console(file=io.StringIO()))


def opened(key: Key, path: Path) -> bytes:
    status, data = key.open(path)
    assert status == 0
    return data


def in_the_clear(folder: Path) -> list[bytes]:
    """What of PLAIN is in some file of a folder."""
    raw = b"".join(path.read_bytes() for path in folder.iterdir())
    return [plain for plain in PLAIN if plain in raw]


def test_everything_is_encrypted_but_a_manifest_that_tells_little(
    source: str, key: Key, parent: Path, run: Run
) -> None:
    with umask(0):
        ran = run("save", "--recipients", key.recipients, "-c", "none", "--source", source, parent)
    assert (ran.status, ran.out) == (0, "")
    folder = the_directory(parent)
    assert listing(folder) == set(NAMES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert in_the_clear(folder) == []
    manifest = check_manifest(folder)
    assert set(manifest) == {
        "format", "written_by", "encrypted", "kernel", "complete", "failed", "hash_block", "files", "dump", "seconds",
        "capture_machine",
    }  # fmt: skip
    assert manifest["encrypted"] == {"format": "age-encryption.org/v1", "manifest": "manifest-full.json.age"}
    assert set(manifest["kernel"]) == {"release", "machine", "host", "crash_time", "cpus"}
    assert (manifest["complete"], manifest["failed"]) == (True, [])
    assert manifest["dump"]["pages_written"] == manifest["dump"]["pages"] > 20


def test_the_same_in_the_clear_has_all_of_it(source: str, parent: Path, run: Run) -> None:
    """Else the test above would prove nothing."""
    run("save", "-c", "none", "--source", source, parent)
    assert set(in_the_clear(the_directory(parent))) == set(PLAIN) - {b"makedumpfile"}


def test_the_key_opens_what_a_plain_save_has(source: str, key: Key, parent: Path, tmp_path: Path) -> None:
    with open_vmcore(source) as vmcore:
        plain = job.save(vmcore, tmp_path / "plain", dump_options(), Console(file=io.StringIO())).directory
    folder = save(source, parent, key).directory
    for name in ("vmcore-dmesg.txt", "registers.txt", "registers.json"):
        assert opened(key, folder / f"{name}.age") == (plain / name).read_bytes()
    (tmp_path / "flat").write_bytes(opened(key, folder / "vmcore.flat.age"))
    assemble(str(tmp_path / "flat"), tmp_path / "vmcore", progress=False)
    assert by_hand(tmp_path / "vmcore").pages == ElfPages(Path(source).read_bytes()).pages()
    full, expected = json.loads(opened(key, folder / "manifest-full.json.age")), manifest_of(plain)
    assert set(full) == set(expected)
    assert full["kernel"] == expected["kernel"]
    assert full["kernel"]["panic"] == PANIC.decode()
    assert full["files"].items() <= manifest_of(folder)["files"].items()
    assert f"encrypted to the keys in {key.recipients}".encode() in opened(key, folder / "capture-log.txt.age")


def test_recipients_of_the_image_need_not_be_named(
    source: str, key: Key, parent: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "RECIPIENTS", key.recipients)
    assert run("save", "--source", source, parent).status == 0
    assert listing(the_directory(parent)) == set(NAMES)


def test_the_self_test_runs_where_this_machine_has_recipients(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is built with it: it must not depend on what the machine that builds it has."""
    monkeypatch.setattr(job, "RECIPIENTS", key.recipients)
    monkeypatch.setattr(mounting, "MOUNT_POINT", mounting.MOUNT_POINT)  # (it takes a place of its own)
    selftest.run()
    assert not str(mounting.MOUNT_POINT).startswith("/run"), "another build at the same time would be in its way"


def test_recipients_that_cannot_be_read_are_no_reason_to_save_in_the_clear(
    source: str, parent: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipients").symlink_to("gone")
    monkeypatch.setattr(job, "RECIPIENTS", tmp_path / "recipients")
    ran = run("save", "--source", source, parent)
    assert ran.status == UsageError.exit_status
    assert "the recipients cannot be read" in ran.err
    assert not parent.exists()


@pytest.mark.parametrize("broken", ["missing", "refuses", "dies"])
def test_without_age_nothing_is_saved_in_the_clear(
    broken: str, source: str, key: Key, parent: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypted, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    if broken != "missing":
        script = {"refuses": "echo 'age: error: no way' >&2; exit 1", "dies": "kill -9 $$"}[broken]
        (tmp_path / "age").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "age").chmod(0o755)
    ran = run("save", "--recipients", key.recipients, "--source", source, parent)
    assert ran.status == 3, "the manifest alone was saved"
    folder = the_directory(parent)
    assert listing(folder) == {"manifest.json"}
    assert in_the_clear(folder) == []
    assert manifest_of(folder)["failed"] == list(NAMES[:-1])
    why = {"missing": "age was not found", "refuses": "age failed: no way", "dies": "age was killed by signal 9"}
    assert ran.err.count(why[broken]) == len(NAMES) - 1


def test_the_reason_of_a_failure_is_not_in_the_clear(
    source: str, key: Key, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may quote memory of the dead kernel."""
    monkeypatch.setattr(job._Job, "_save_log", raising(KeyError(SECRET.decode())))
    folder = save(source, parent, key).directory
    assert in_the_clear(folder) == []
    manifest = manifest_of(folder)
    assert (manifest["complete"], manifest["failed"]) == (False, ["vmcore-dmesg.txt.age"])
    (failure,) = json.loads(opened(key, folder / "manifest-full.json.age"))["failures"]
    assert SECRET.decode() in failure


def test_a_save_that_was_cut_short_is_not_gone_on_with(source: str, key: Key, parent: Path) -> None:
    first = save(source, parent, key, deadline=time.monotonic()).directory
    assert (first / "vmcore.flat.age.incomplete").exists()
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    console = Console(file=io.StringIO())
    second = save(source, parent, key, console).directory
    assert second.name == f"db7-{WHEN}-1"
    assert listing(second) == set(NAMES)
    assert console.lines[0] == (
        f"{first}: was cut short, and is encrypted: this machine cannot go on with it; saving anew"
    )
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_an_encrypted_save_does_not_go_on_with_a_plain_one_nor_the_other_way_round(
    source: str, key: Key, parent: Path
) -> None:
    with open_vmcore(source) as vmcore:
        late = dump_options(deadline=time.monotonic())
        plain = job.save(vmcore, parent, late, Console(file=io.StringIO())).directory
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    secret = save(source, parent, key, deadline=time.monotonic()).directory
    assert secret != plain
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before
    with open_vmcore(source) as vmcore:
        again = job.save(vmcore, parent, dump_options(), Console(file=io.StringIO())).directory
    assert again == plain


def test_on_a_full_disk_all_that_is_there_can_be_opened(key: Key, vmcore_file: WriteFile, tmp_path: Path) -> None:
    source = vmcore_file(crashed_core(pages=random.Random(3).randbytes(1500 * PAGE)))
    with tmpfs(tmp_path / "full", "size=6m") as full:
        saved = save(source, full / "crash", key)
        assert job.exit_status(saved) == 3
        assert listing(saved.directory) == {*NAMES, "vmcore.flat.age.incomplete"} - {"vmcore.flat.age"}
        assert check_manifest(saved.directory)["failed"] == ["vmcore.flat.age"]
        (tmp_path / "flat").write_bytes(opened(key, saved.directory / "vmcore.flat.age.incomplete"))
        dump = by_hand(assemble(str(tmp_path / "flat"), tmp_path / "vmcore", progress=False).path)
        assert dump.incomplete
        assert len(dump.pages) == manifest_of(saved.directory)["dump"]["pages_written"] > 200


def test_killed_at_any_time_nothing_is_in_the_clear(key: Key, vmcore_file: WriteFile, tmp_path: Path) -> None:
    source = vmcore_file(crashed_core(pages=SECRET.ljust(PAGE, b"\1") * 4000))
    for number in range(6):
        parent = tmp_path / f"crash{number}"
        command = ["save", "-q", "-c", "none", "-d", "0", "--recipients", key.recipients, "--source", source, parent]
        process = subprocess.Popen([sys.executable, "-m", "capture", *map(str, command)])
        while process.poll() is None and not parent.exists():
            time.sleep(0.001)
        time.sleep(0.05 * number)
        process.kill()
        process.wait()
        for folder in parent.iterdir():
            assert in_the_clear(folder) == []
            assert all(name.removesuffix(".incomplete") in NAMES for name in listing(folder))


def test_older_encrypted_crashes_make_room(source: str, key: Key, parent: Path) -> None:
    for _ in range(4):
        last = save(source, parent, key).directory
    late = save(source, parent, key, deadline=time.monotonic()).directory
    for name in NAMES:  # as a power cut leaves it
        (late / name).unlink(missing_ok=True)
    (parent / f"other-{WHEN}").mkdir()
    shutil.copy(late / "vmcore.flat.age.incomplete", parent / f"other-{WHEN}")
    (parent / f"db7-{WHEN}-9").mkdir()
    (parent / f"db7-{WHEN}-9" / "notes.age").write_text("mine")
    console = Console(file=io.StringIO())
    boot = parse("vmcapture.keep=1")
    make_room(last, boot.keep, boot.free, console)
    assert listing(parent) == {last.name, f"other-{WHEN}", f"db7-{WHEN}-9"}
    assert all(line.startswith("removed ") for line in console.lines)


def test_a_full_disk_from_the_start_leaves_nothing_behind(source: str, key: Key, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "size=4k") as full:
        (full / "filler").write_bytes(bytes(PAGE))
        saved = save(source, full / "crash", key)
        assert job.exit_status(saved) == TargetError.exit_status
        assert not list(full.rglob("*.age*"))
