"""What is known of a dead kernel, as text for a person and as values for JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from capture import report
from capture.kernel.panic import Panic
from capture.kernel.printk import LogUnavailable, Record
from capture.selftest import elf_core, note
from capture.vmcore import Vmcore, open_vmcore
from tests.builders import (
    CPU,
    DIRECT_MAP,
    PAGE,
    PANIC,
    READABLE_BY_DRGN,
    PrintkRing,
    filled,
    prstatus_note,
    simple_core,
    vmcoreinfo_note,
)

WriteFile = Callable[[bytes], str]

CRASHED = b"CPU: 1 PID: 4711 Comm: bash Not tainted 6.1.0-test #1"


def crashed_ring() -> PrintkRing:
    """The log of a machine whose PID 4711 panicked on CPU 1."""
    ring = PrintkRing().add(b"Linux version 6.1.0-test", caller=0, timestamp=0)
    ring.add(b"up for a day", caller=1, timestamp=86_400_000_000_000)
    ring.add(PANIC, caller=4711, timestamp=86_401_000_000_000, level=0)
    return ring.add(CRASHED, caller=4711, timestamp=86_401_000_001_000)


CPUS = [prstatus_note(0, 0x1000), prstatus_note(4711, 0x2000)]


@contextmanager
def opened(data: bytes, write: WriteFile) -> Iterator[Vmcore]:
    with open_vmcore(write(data)) as vmcore:
        yield vmcore


# --- The log --------------------------------------------------------------------------------------------------------


def test_the_log_comes_as_lines_each_with_its_newline(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(), vmcore_file) as vmcore:
        assert b"".join(report.log_lines(report.open_log(vmcore).records())) == (
            b"[    0.000000] Linux version 6.1.0-test\n"
            b"[86400.000000] up for a day\n"
            b"[86401.000000] " + PANIC + b"\n"
            b"[86401.000001] " + CRASHED + b"\n"
        )
        with_callers = list(report.log_lines(report.open_log(vmcore).records(), caller=True))
    assert with_callers[2] == b"[86401.000000] [ T4711] " + PANIC + b"\n"


def test_a_record_for_json_says_all_and_is_json() -> None:
    values = report.record_json(Record(7, 12, b"caf\xc3\xa9 \xff\n\x1b", CPU | 2, 3, 4, True))
    assert values == {
        "sequence": 7,
        "timestamp": 12,
        "caller": "C2",
        "facility": 3,
        "level": 4,
        "continuation": True,
        "text": "café \\xff\n\x1b",
    }
    assert json.loads(json.dumps(values)) == values
    assert report.record_json(Record(0, 0, b"", None, None, None, False))["caller"] is None


def test_the_panic_is_found_in_the_log(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(), vmcore_file) as vmcore:
        assert report.find_panic(vmcore) == Panic(PANIC.decode(), 1, 4711, 4711)


def test_without_a_log_there_is_no_panic_and_no_complaint(vmcore_file: WriteFile) -> None:
    with opened(simple_core("a"), vmcore_file) as vmcore:
        with pytest.raises(LogUnavailable):
            report.open_log(vmcore)
        assert report.find_panic(vmcore) == Panic()


# --- Registers ------------------------------------------------------------------------------------------------------


def test_registers_for_a_person_name_each_cpu_and_mark_the_one_that_panicked(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(notes=CPUS), vmcore_file) as vmcore:
        text = report.registers_text(vmcore, report.find_panic(vmcore))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("CPU")] == [
        "CPU 0, running PID 0",
        "CPU 1, running PID 4711  <- this CPU panicked",
    ]
    # The builder counts up from 0x1000; rip is the 17th of user_regs_struct, 27 of them three in a line.
    assert "     rip 0000000000001010" in text
    assert "     rip 0000000000002010" in text
    assert len([line for line in lines if line and not line.startswith("CPU")]) == 2 * 9
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_registers_for_json_are_hexadecimal_text(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(notes=CPUS), vmcore_file) as vmcore:
        values = report.registers_json(vmcore, report.find_panic(vmcore))
    assert json.loads(json.dumps(values)) == values
    assert (values["machine"], values["panicked_cpu"], values["problems"]) == ("x86_64", 1, [])
    assert [(entry["cpu"], entry["pid"]) for entry in values["cpus"]] == [(0, 0), (1, 4711)]
    assert values["cpus"][1]["registers"]["r15"] == "0x0000000000002000"
    assert values["cpus"][1]["registers"]["gs"] == f"{0x2000 + 26:#018x}"


def test_registers_of_an_arm_vmcore_have_arm_names(vmcore_file: WriteFile) -> None:
    core = elf_core([prstatus_note(1, 1, registers=34)], [(0, 0x4000_0000, filled("a"))], machine=183)
    with opened(core, vmcore_file) as vmcore:
        values = report.registers_json(vmcore, Panic())
        text = report.registers_text(vmcore, Panic())
    assert values["machine"] == "aarch64"
    assert values["cpus"][0]["registers"]["pc"] == f"{33:#018x}"
    assert "pstate 0000000000000022" in text


def test_a_cpu_whose_note_is_too_short_is_named(vmcore_file: WriteFile) -> None:
    core = crashed_ring().core(notes=[CPUS[0], note(b"CORE", 1, bytes(100))])
    with opened(core, vmcore_file) as vmcore:
        text = report.registers_text(vmcore, Panic())
        values = report.registers_json(vmcore, Panic())
    assert "CPU 0, running PID 0" in text
    assert len(values["problems"]) == 1
    assert values["problems"][0] in text
    assert values["panicked_cpu"] is None


def test_without_any_register_a_line_says_so(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(), vmcore_file) as vmcore:
        text = report.registers_text(vmcore, report.find_panic(vmcore))
    assert "no NT_PRSTATUS" in text
    assert len(text.splitlines()) == 1


# --- The description ------------------------------------------------------------------------------------------------


def test_a_description_says_what_is_known(vmcore_file: WriteFile) -> None:
    ring = crashed_ring()
    name = vmcore_file(ring.core(notes=CPUS))
    memory = -(-len(ring.memory(0x20_0000)) // PAGE)
    with open_vmcore(name) as vmcore:
        values = report.describe(vmcore, report.find_panic(vmcore))
    assert values == {
        "source": name,
        "release": "6.1.0-test",
        "version": "unknown",
        "machine": "x86_64",
        "host": "",
        "crash_time": "2023-11-14T22:13:20+00:00",  # date -u -d @1700000000
        "panic": PANIC.decode(),
        "panicked_cpu": 1,
        "cpus": 2,
        "page_size": 4096,
        "pages": memory,
        "bytes": memory * PAGE,
        "segments": 1,
        "notes": 3,
        "problems": [],
    }
    assert json.loads(json.dumps(values)) == values


def test_a_description_for_a_person_has_a_line_for_each_thing(vmcore_file: WriteFile) -> None:
    with opened(crashed_ring().core(notes=CPUS), vmcore_file) as vmcore:
        lines = report.description_text(report.describe(vmcore, report.find_panic(vmcore))).splitlines()
    assert lines[:5] == [
        "kernel:  6.1.0-test x86_64, unknown",
        "host:    unknown",
        "crashed: 2023-11-14T22:13:20+00:00",
        "panic:   Kernel panic - not syncing: sysrq triggered crash",
        "CPUs:    2, CPU 1 panicked",
    ]
    assert lines[5].startswith("memory:  ")
    assert len(lines) == 6


def test_a_vmcore_that_tells_next_to_nothing_is_described_all_the_same(vmcore_file: WriteFile) -> None:
    with opened(elf_core([], [(0, 0x1000, filled("a", "b"))]), vmcore_file) as vmcore:
        values = report.describe(vmcore, report.find_panic(vmcore))
        text = report.description_text(values)
    assert (values["release"], values["crash_time"], values["panic"], values["panicked_cpu"]) == (
        "unknown",
        None,
        None,
        None,
    )
    assert (values["cpus"], values["pages"], values["notes"]) == (0, 2, 0)
    assert len(values["problems"]) == 1
    assert "no VMCOREINFO" in values["problems"][0]
    assert "crashed: unknown" in text
    assert "no announcement in the log" in text
    assert f"problem: {values['problems'][0]}" in text


def test_a_truncated_vmcore_says_how_much_is_missing(vmcore_file: WriteFile) -> None:
    with opened(simple_core("a", "b", "c")[: -PAGE - 10], vmcore_file) as vmcore:
        values = report.describe(vmcore, Panic())
    assert [line for line in values["problems"] if str(PAGE + 10) in line]
    assert values["pages"] == 2  # one whole, one in part


def test_names_from_a_dead_kernel_do_nothing_to_a_terminal(vmcore_file: WriteFile) -> None:
    structure = b"".join(
        name.ljust(65, b"\0") for name in (b"Linux", b"evil\x1b[2J\nhost", b"6.1\r", b"#1\x9b", b"", b"")
    )
    keys: dict[str, str | int] = {
        **READABLE_BY_DRGN,
        "SYMBOL(init_uts_ns)": f"{DIRECT_MAP + 0x1000:x}",
        "OFFSET(uts_namespace.name)": 0,
    }
    core = elf_core([vmcoreinfo_note(keys)], [(DIRECT_MAP + 0x1000, 0x1000, structure.ljust(PAGE, b"\0"))])
    with opened(core, vmcore_file) as vmcore:
        values = report.describe(vmcore, Panic())
        text = report.description_text(values)
    assert values["host"] == "evil\\x1b[2J\\x0ahost"
    assert len(text.splitlines()) == 6
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ("1", "1970-01-01T00:00:01+00:00"),
        ("253402300799", "9999-12-31T23:59:59+00:00"),
        ("0", None),
        ("253402300800", None),
        ("x", None),
    ],
)
def test_the_time_of_the_crash_is_utc_and_unknown_when_absurd(
    seconds: str, said: str | None, vmcore_file: WriteFile
) -> None:
    with opened(simple_core("a", keys={"CRASHTIME": seconds}), vmcore_file) as vmcore:
        assert report.crash_time_text(vmcore) == said


def test_a_real_vmcore_is_described(corpus_vmcore: Path) -> None:
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        values = report.describe(vmcore, report.find_panic(vmcore))
    cpus = {"linux-6.1-la57": 4, "linux-6.12": 2}[corpus_vmcore.stem]
    assert values["cpus"] == cpus
    assert values["notes"] == cpus + 1
    assert values["panic"] == "Kernel panic - not syncing: sysrq triggered crash"
    assert values["panicked_cpu"] == 1
    assert values["version"].startswith("#1 SMP")
    assert values["crash_time"].startswith("2026-11-23T17:4")  # the corpus was made then
    assert values["problems"] == []
    assert values["bytes"] <= corpus_vmcore.stat().st_size
