"""Every case: a real kernel crashed, saved by its capture kernel, and every page of it compared with its source."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.guest import disk, host
from tests.guest.cases import CASES
from tests.guest.crash import Crashed
from tests.guest.reference import different_pages, prstatus_instruction_pointers
from tests.readers import bitmaps

FILES = ["capture-log.txt", "manifest.json", "registers.json", "registers.txt", "vmcore", "vmcore-dmesg.txt"]


def test_all_files_are_saved_for_root_only(crashed: Crashed) -> None:
    assert disk.names(crashed.target, crashed.saved_in_target) == FILES
    assert disk.stat(crashed.target, crashed.saved_in_target).mode == 0o700
    for name in FILES:
        assert disk.stat(crashed.target, f"{crashed.saved_in_target}/{name}").mode == 0o600, name


def test_the_capture_kernel_finds_its_own_dump_equal_to_proc_vmcore(crashed: Crashed) -> None:
    dump = json.loads((crashed.saved / "manifest.json").read_text())["dump"]
    left_out = sum(dump["filter"]["classes"].values()) - dump["pages"]
    expected = f"{dump['pages']} pages equal the source" + f"; {left_out} left out by level 31" * bool(left_out)
    assert crashed.verified.endswith(f"{expected}; SHA-256 as in the manifest"), crashed.verified


# kexec -c puts its copy of the first 640 KiB right before memory that the capture kernel uses, and /dev/mem gives no
# page that both share: the last one of the copy, of which 0xc00 bytes are memory.
SHARED_PFN = 0x9F


@pytest.mark.parametrize("crashed", [case for case in CASES if case.old_memory == "same"], indirect=True, ids=str)
def test_old_memory_gives_the_same_dump_but_for_a_page_that_the_kernel_refuses(crashed: Crashed) -> None:
    (dumped, said), (verified, compared) = crashed.old_memory
    refused = dumped == 3
    if refused:
        assert crashed.case.syscall == "load"
        assert f"not whole: 1 pages unreadable, zeros in the dump (PFN {SHARED_PFN:#x})" in said
    else:
        assert dumped == 0, said
    summary, *named = compared.strip().splitlines()
    if not refused:
        assert summary.endswith("pages equal the source")
        assert (verified, named) == (0, [])
        return
    assert "1 could not be read when they were saved" in summary
    assert {line.partition(":")[0] for line in named} == {f"PFN {SHARED_PFN:#x}"}
    differs = "1 differ from the source" in summary  # unless it is zeros there, too
    assert (verified, len(named)) == ((1, 2) if differs else (3, 1))


@pytest.mark.parametrize("crashed", [case for case in CASES if case.old_memory == "refused"], indirect=True, ids=str)
def test_where_the_kernel_refuses_old_memory_a_line_says_what_to_do(crashed: Crashed) -> None:
    ((status, said),) = crashed.old_memory
    assert status == 4
    (line,) = said.strip().splitlines()
    assert line.startswith("vmcapture: /dev/mem: ")
    assert "Operation not permitted" in line
    assert "iomem=relaxed" in line
    assert line.endswith("use /proc/vmcore")


def test_every_page_equals_the_source_for_drgn(crashed: Crashed) -> None:
    pages, wrong = different_pages(crashed.saved / "vmcore", crashed.elf)
    dump = json.loads((crashed.saved / "manifest.json").read_text())["dump"]
    assert (pages, wrong) == (dump["pages"], 0)
    assert dump["level"] == int(crashed.case.level or 31)
    existing, kept = bitmaps(crashed.saved / "vmcore")
    assert bool((existing == kept).all()) == (dump["level"] < 2)


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
