"""With debug symbols: what crash and drgn say of our dump, beside what they say of the untouched ELF vmcore."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_printk_records
from drgn.helpers.linux.sched import cpu_curr

from capture.vmcore import open_vmcore
from tests.guest import host
from tests.guest.cache import Kernel
from tests.guest.cases import DEBUGINFO_CASES
from tests.guest.conftest import unavailable
from tests.guest.crash import Crashed
from tests.readers import bitmaps
from tests.readers import drgn_program as program

pytestmark = [pytest.mark.debuginfo, pytest.mark.parametrize("crashed", DEBUGINFO_CASES, indirect=True, ids=str)]

# What each command shows of this crash, whatever else. crash 8.0.2 finds no task by its PID since struct pid ends in a
# flexible array (numbers[], in 6.1 since a stable update), on the ELF vmcore as on ours: ps has the CPUs' tasks alone.
SHOWN = {
    "sys": ["PANIC: ", "sysrq triggered crash", "CPUS: "],
    "bt": ["sysrq_handle_crash", "panic", "COMMAND: "],
    "bt -a": ["sysrq_handle_crash", "COMMAND: ", "CPU: "],
    "kmem -i": ["TOTAL MEM", "FREE", "CACHED", "SLAB"],
    "mod": ["virtio_blk", "squashfs", "MODULE"],
    "ps": ["[swapper/0]", "PPID", "COMM"],
    "log": ["Kernel panic - not syncing: sysrq triggered crash", "Linux version "],
}
CRASH_COMMANDS = tuple(SHOWN)
OF_LITTLE = ("sys", "bt -a", "ps", "log", "mod")
"""What crash shows without having to look at pages of every kind."""
GDB_HAS_NOT = ("rflags", "orig_rax", "fs_base", "gs_base")


@pytest.fixture
def vmlinux(crashed: Crashed, debug_vmlinux: Callable[[Kernel], Path]) -> Path:
    return debug_vmlinux(crashed.kernel)


@pytest.mark.parametrize("command", CRASH_COMMANDS)
def test_crash_says_the_same_of_the_dump_as_of_the_elf_vmcore(crashed: Crashed, vmlinux: Path, command: str) -> None:
    if not crashed.kernel.release.startswith("6.1."):
        pytest.skip("Debian 12's crash 8.0.2 does not know this kernel")
    ours, theirs = (crash_outputs(vmlinux, core)[command] for core in (crashed.saved / "vmcore", crashed.elf))
    assert ours == theirs
    for expected in SHOWN[command]:
        assert expected in ours
    assert len(ours.splitlines()) > {"bt": 5, "bt -a": 5, "ps": crashed.case.cpus + 1, "log": 200}.get(command, 9), ours


def test_crash_reads_a_zlib_dump_alike(crashed: Crashed, vmlinux: Path, tmp_path: Path) -> None:
    if not crashed.kernel.release.startswith("6.1."):
        pytest.skip("Debian 12's crash 8.0.2 does not know this kernel")
    from capture.cli import main

    dump = tmp_path / "zlib.kdump"
    assert main(["dump", "-q", "-c", "zlib", str(crashed.elf), str(dump)]) == 0
    assert crash_outputs(vmlinux, dump) == crash_outputs(vmlinux, crashed.elf)


@pytest.fixture
def without_vmemmap(crashed: Crashed, tmp_path: Path) -> Path:
    """A dump of level 31 without what of mem_map describes only pages that are left out."""
    from capture.cli import main

    dump = tmp_path / "without-vmemmap.kdump"
    assert main(["dump", "-q", "-d", "31", "--exclude-vmemmap", str(crashed.elf), str(dump)]) == 0
    fewer = int(bitmaps(crashed.saved / "vmcore")[1].sum()) - int(bitmaps(dump)[1].sum())
    assert fewer > 100
    return dump


def test_drgn_and_crash_open_a_dump_without_vmemmap(crashed: Crashed, vmlinux: Path, without_vmemmap: Path) -> None:
    both_say_the_same(crashed, vmlinux, without_vmemmap)


@pytest.fixture
def elf_core(crashed: Crashed, tmp_path: Path) -> Path:
    """The saved dump as an ELF core."""
    from capture.cli import main

    core = tmp_path / "core.elf"
    assert main(["dump", "-q", "--format", "elf", "-d", "31", str(crashed.saved / "vmcore"), str(core)]) == 0
    return core


def test_gdb_shows_the_registers_of_each_cpu(crashed: Crashed, vmlinux: Path, elf_core: Path) -> None:
    said = gdb_output("thread apply all -s info registers", vmlinux, elf_core)
    found = {
        int(number) - 1: dict(re.findall(r"^(\w+) +(0x[0-9a-f]+)", text, re.MULTILINE))
        for number, text in re.findall(r"^Thread (\d+) .*\n((?:.+\n)+)", said, re.MULTILINE)
    }
    saved = json.loads((crashed.saved / "registers.json").read_text())
    assert sorted(found) == list(range(crashed.case.cpus))
    for cpu in saved["cpus"]:
        # gdb calls rflags by another name, and has no name for orig_rax, nor, with some programs, for the bases.
        ours = {name: int(value, 16) for name, value in cpu["registers"].items() if name not in GDB_HAS_NOT}
        theirs = {name: int(value, 16) for name, value in found[cpu["cpu"]].items()}
        assert len(ours) == 23
        assert ours == {name: theirs.get(name) for name in ours}


def test_gdb_reads_the_kernel_at_its_virtual_addresses(crashed: Crashed, vmlinux: Path, elf_core: Path) -> None:
    with open_vmcore(str(crashed.elf)) as vmcore:
        (offset,) = re.findall(rb"KERNELOFFSET=([0-9a-f]+)", vmcore.notes.blob)
    with_symbols = f"add-symbol-file {vmlinux} -o 0x{offset.decode()}"
    said = gdb_output(with_symbols, None, elf_core, more=("print init_uts_ns.name.release", "thread apply all -s bt"))
    assert f'"{crashed.kernel.release}"' in said
    assert re.search(r"^#\d+ .* in sysrq_handle_crash ", said, re.MULTILINE)
    assert re.search(r"^#\d+ .* in ksys_write ", said, re.MULTILINE)


def test_crash_and_drgn_read_the_elf_core(crashed: Crashed, vmlinux: Path, elf_core: Path) -> None:
    both_say_the_same(crashed, vmlinux, elf_core)


def test_drgn_lists_the_same_modules_and_stacks(crashed: Crashed, vmlinux: Path) -> None:
    """Level 31 beside all of memory: what a filter may not touch."""
    ours, theirs = (
        (
            [module.name.string_() for module in list_for_each_entry(
                "struct module", opened["modules"].address_of_(), "list")],
            [[frame.pc for frame in opened.stack_trace(task)] for task in for_each_task(opened)],
        )
        for opened in (program(core, vmlinux) for core in (crashed.saved / "vmcore", crashed.elf))
    )  # fmt: skip
    assert ours == theirs
    assert b"virtio_blk" in ours[0]
    assert len(ours[1]) > 30


def test_drgn_shows_the_stack_of_the_crashed_thread(crashed: Crashed, vmlinux: Path) -> None:
    ours, theirs = (
        [frame.name for frame in program(core, vmlinux).crashed_thread().stack_trace()]
        for core in (crashed.saved / "vmcore", crashed.elf)
    )
    assert ours == theirs
    assert "sysrq_handle_crash" in ours


def test_drgn_walks_all_tasks(crashed: Crashed, vmlinux: Path) -> None:
    ours, theirs = (
        [(task.pid.value_(), task.comm.string_()) for task in for_each_task(program(core, vmlinux))]
        for core in (crashed.saved / "vmcore", crashed.elf)
    )
    assert ours == theirs
    assert (1, b"init") in ours
    assert any(name.startswith(b"kworker/") for _, name in ours)


def test_registers_are_those_that_drgn_reports_for_every_cpu(crashed: Crashed, vmlinux: Path) -> None:
    saved = json.loads((crashed.saved / "registers.json").read_text())
    opened = program(crashed.elf, vmlinux)
    assert saved["panicked_cpu"] == int(opened["panic_cpu"].counter)
    assert len(saved["cpus"]) == crashed.case.cpus
    for cpu in saved["cpus"]:
        # The trace of what a CPU was running starts from the registers in that CPU's NT_PRSTATUS.
        theirs = opened.stack_trace(cpu_curr(opened, cpu["cpu"]))[0].registers()
        ours = {name.replace("_", "."): int(value, 16) for name, value in cpu["registers"].items()}
        ours.pop("orig.rax")  # no register of the CPU; drgn has no name for it
        assert ours == theirs


def test_the_log_is_drgns_line_for_line(crashed: Crashed, vmlinux: Path) -> None:
    lines = []
    for record in get_printk_records(program(crashed.elf, vmlinux)):
        prefix = b"[% 5d.%06d] " % (record.timestamp // 10**9, record.timestamp % 10**9 // 1000)
        # drgn leaves the further lines of a record at the margin; ours stand under the first, as makedumpfile's do.
        lines.append(prefix + record.text.replace(b"\n", b"\n" + b" " * len(prefix)) + b"\n")
    assert (crashed.saved / "vmcore-dmesg.txt").read_bytes() == b"".join(lines)


def both_say_the_same(crashed: Crashed, vmlinux: Path, core: Path) -> None:
    """Hold what drgn and crash say of a dump against what they say of the ELF vmcore."""
    ours, theirs = (
        [(task.pid.value_(), task.comm.string_()) for task in for_each_task(program(source, vmlinux))]
        for source in (core, crashed.elf)
    )
    assert ours == theirs
    if crashed.kernel.release.startswith("6.1."):
        of_dump, of_all = crash_outputs(vmlinux, core), crash_outputs(vmlinux, crashed.elf)
        assert {name: of_dump[name] for name in OF_LITTLE} == {name: of_all[name] for name in OF_LITTLE}


def gdb_output(command: str, vmlinux: Path | None, core: Path, more: tuple[str, ...] = ()) -> str:
    """What gdb prints for commands."""
    if (line := host.missing(["gdb"])) is not None:
        unavailable(line)
    words = [word for each in ("set pagination off", command, *more) for word in ("-ex", each)]
    files = [str(vmlinux)] if vmlinux is not None else []
    answer = subprocess.run(
        [str(host.find("gdb")), "-q", "-nx", "-batch", *files, "-core", str(core), *words],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return answer.stdout


@functools.cache
def crash_outputs(vmlinux: Path, core: Path) -> dict[str, str]:
    """What crash prints for each command, less the lines that name the file (of vmemmap it warns, whatever it does).

    All in one session: to look at the debug symbols takes it ten seconds.
    """
    if (line := host.missing(["crash"])) is not None:
        unavailable(line)
    with tempfile.TemporaryDirectory() as name:
        files = {command: Path(name) / str(number) for number, command in enumerate(CRASH_COMMANDS)}
        asked = "".join(f"{command} > {file}\n" for command, file in files.items())
        subprocess.run(
            [str(host.find("crash")), "-s", str(vmlinux), str(core)],
            input=f"{asked}quit\n", capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        said = {command: file.read_text() for command, file in files.items()}
    without = re.compile(r"^ +DUMPFILE: .*\n|\A\nWARNING: \S+:\n(?: {9}.*\n)+\n?", re.MULTILINE)
    return {command: without.sub("", text) for command, text in said.items()}
