"""Every case: a real kernel crashed, saved by its capture kernel, and every page of it compared with its source."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.guest import disk, host
from tests.guest.crash import Crashed
from tests.guest.reference import different_pages, prstatus_instruction_pointers

FILES = ["capture-log.txt", "manifest.json", "registers.json", "registers.txt", "vmcore", "vmcore-dmesg.txt"]


def test_all_files_are_saved_for_root_only(crashed: Crashed) -> None:
    assert disk.names(crashed.target, crashed.saved_in_target) == FILES
    assert disk.stat(crashed.target, crashed.saved_in_target).mode == 0o700
    for name in FILES:
        assert disk.stat(crashed.target, f"{crashed.saved_in_target}/{name}").mode == 0o600, name


def test_the_capture_kernel_finds_its_own_dump_equal_to_proc_vmcore(crashed: Crashed) -> None:
    assert crashed.verified.endswith("pages equal the source"), crashed.verified


def test_old_memory_gives_the_same_dump_or_says_why_not(crashed: Crashed) -> None:
    status, said = crashed.old_memory
    lines = [line for line in said.strip().splitlines() if not line.startswith("verifying")]
    if crashed.case.syscall == "load":
        assert status == 0, said
        assert lines[-1].endswith("pages equal the source")
    else:
        assert status == 4, said
        (line,) = lines
        assert line.startswith("vmcapture: /dev/mem: ")
        assert "vmcapture load -c" in line
        assert line.endswith("use /proc/vmcore")


def test_every_page_equals_the_source_for_drgn(crashed: Crashed) -> None:
    pages, wrong = different_pages(crashed.saved / "vmcore", crashed.elf)
    assert wrong == 0
    assert pages >= json.loads((crashed.saved / "manifest.json").read_text())["dump"]["pages"]


def test_the_manifest_says_that_all_is_there(crashed: Crashed) -> None:
    manifest = json.loads((crashed.saved / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["failures"] == []
    assert manifest["problems"] == []
    assert manifest["kernel"]["release"] == crashed.kernel.release
    assert manifest["kernel"]["panic"] == "Kernel panic - not syncing: sysrq triggered crash"
    assert manifest["kernel"]["cpus"] == crashed.case.cpus
    assert manifest["dump"]["unreadable_pages"] == 0


def test_the_manifest_has_the_sha256_of_every_file(crashed: Crashed) -> None:
    manifest = json.loads((crashed.saved / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"manifest.json"})
    for name, entry in manifest["files"].items():
        digests = entry.get("sha256_blocks") or [entry["sha256"]]
        assert digests == _digests(crashed.saved / name, manifest["hash_block"]), name
        assert entry["size"] == (crashed.saved / name).stat().st_size


def test_registers_are_those_of_the_notes_and_one_cpu_panicked(crashed: Crashed) -> None:
    registers = json.loads((crashed.saved / "registers.json").read_text())
    found = [int(cpu["registers"]["rip"], 16) for cpu in registers["cpus"]]
    assert found == prstatus_instruction_pointers(crashed.elf)
    assert len(found) == crashed.case.cpus
    panicked = registers["panicked_cpu"]
    assert panicked is not None
    # The shell that wrote to sysrq-trigger was running there; the others had nothing to do but the workload.
    assert registers["cpus"][panicked]["pid"] != 0


def test_the_log_is_what_makedumpfile_extracts(crashed: Crashed, tmp_path: Path) -> None:
    if (line := host.missing(["makedumpfile"])) is not None:
        pytest.skip(line)
    theirs = tmp_path / "dmesg"
    command = [str(host.find("makedumpfile")), "--dump-dmesg", str(crashed.elf), str(theirs)]
    subprocess.run(command, check=True, capture_output=True)
    assert (crashed.saved / "vmcore-dmesg.txt").read_bytes() == theirs.read_bytes()


def test_the_capture_log_holds_our_lines_and_the_capture_kernels(crashed: Crashed) -> None:
    log = (crashed.saved / "capture-log.txt").read_text()
    assert "saving to" in log
    assert "Linux version " + crashed.kernel.release in log
    assert "elfcorehdr=" in log


def _digests(path: Path, block: int) -> list[str]:
    data = path.read_bytes()
    return [hashlib.sha256(data[at : at + block]).hexdigest() for at in range(0, len(data), block)]
