"""Log records → why the kernel died, and on which CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.kernel.panic import Panic, PanicFinder, panicked_cpu
from capture.kernel.printk import CALLER_CPU, Record
from capture.notes.prstatus import CpuRegisters
from capture.report import find_panic, registers
from capture.vmcore import open_vmcore

TASK = 4711
"""The PID of the task that crashes in these logs."""


def record(text: str | bytes, caller: int | None = TASK) -> Record:
    return Record(0, 0, text.encode() if isinstance(text, str) else text, caller, 0, 0, False)


def panic_in(*records: Record) -> Panic:
    finder = PanicFinder()
    assert list(finder.watch(records)) == list(records)  # it only watches
    return finder.panic


def cpu(number: int, pid: int) -> CpuRegisters:
    return CpuRegisters(number, pid, {})


ON_CPU_2 = record("CPU: 2 PID: 4711 Comm: bash Kdump: loaded Not tainted 6.1.0-56-cloud-amd64 #1")
SYSRQ = record("Kernel panic - not syncing: sysrq triggered crash")

# --- The line -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "Kernel panic - not syncing: sysrq triggered crash",
        "Kernel panic - not syncing: Fatal exception in interrupt",
        "BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "BUG: unable to handle page fault for address: ffffc90000000000",
        "general protection fault, probably for non-canonical address 0xdead000000000108: 0000 [#1] PREEMPT SMP NOPTI",
        "Oops: general protection fault, maybe for address 0x0: 0000 [#1] PREEMPT SMP NOPTI",
        "Unable to handle kernel paging request at virtual address ffff800010000000",
    ],
)
def test_what_kernels_say_when_they_die_is_the_panic_line(line: str) -> None:
    assert panic_in(record("usb 1-1: new device"), record(line), ON_CPU_2).line == line


@pytest.mark.parametrize(
    ("lines", "announcement"),
    [
        pytest.param(
            ["------------[ cut here ]------------", "kernel BUG at mm/slub.c:435!",
             "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI"],
            "kernel BUG at|invalid opcode", id="BUG() of x86_64 before 6.11",
        ),
        pytest.param(["divide error: 0000 [#1] PREEMPT SMP NOPTI"], "divide error", id="a division by 0 before 6.11"),
        pytest.param(
            ["------------[ cut here ]------------", "kernel BUG at mm/slub.c:435!",
             "Internal error: Oops - BUG: 00000000f2000800 [#1] SMP"],
            "kernel BUG at|Internal error", id="BUG() of aarch64",
        ),
    ],
)  # fmt: skip
def test_an_oops_that_panic_on_oops_makes_fatal_is_announced_though_no_panic_line_follows(
    lines: list[str], announcement: str
) -> None:
    """With panic_on_oops, oops_end() (aarch64: die()) starts the capture kernel before panic() says a word."""
    panic = panic_in(*(record(line) for line in lines), ON_CPU_2)
    assert any(panic.line.startswith(start) for start in announcement.split("|")), panic
    assert panicked_cpu(panic, [cpu(0, 0), cpu(1, 0), cpu(2, TASK)]) == 2


def test_the_last_announcement_counts() -> None:
    panic = panic_in(
        record("BUG: soft lockup - CPU#3 stuck for 23s!", 17),
        record("CPU: 3 PID: 17 Comm: kworker/3:1", 17),
        record("the machine went on for a week"),
        SYSRQ,
        ON_CPU_2,
    )
    assert (panic.line, panic.cpu, panic.caller_id) == (SYSRQ.text.decode(), 2, TASK)


@pytest.mark.parametrize(
    "line",
    [
        "Command line: panic=1 oops=panic",
        "debug: no BUG: here",
        "a daemon wrote: Oops: try again",
        "DEBUG: x",
        "BUGS: many",
        "",
    ],
)
def test_a_line_that_merely_talks_about_it_is_no_announcement(line: str) -> None:
    assert panic_in(record(line), ON_CPU_2) == Panic()


def test_a_log_without_announcement_knows_nothing() -> None:
    assert panic_in() == Panic("", None, None)
    assert panicked_cpu(Panic(), [cpu(0, 1)]) is None


def test_only_the_first_line_of_a_record_is_the_panic_line() -> None:
    assert panic_in(record("BUG: two lines\nof one record")).line == "BUG: two lines"


@given(st.binary())
def test_a_panic_line_is_printable_whatever_the_kernel_left(garbage: bytes) -> None:
    assert panic_in(record(b"BUG: " + garbage)).line.isprintable()


# --- The CPU, as the log names it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("CPU: 0 PID: 1 Comm: init Not tainted 6.1.0 #1", 0),
        ("CPU: 511 UID: 0 PID: 1 Comm: init Kdump: loaded Not tainted 6.12.117 #1", 511),
        ("CPU: 4294967296123 PID: 1 Comm: damaged", None),
        ("CPU: -1 PID: 1 Comm: damaged", None),
        ("CPU: 3", None),
        ("x CPU: 3 PID: 1 Comm: init", None),
    ],
)
def test_the_line_that_dump_stack_prints_names_the_cpu(line: str, number: int | None) -> None:
    assert panic_in(SYSRQ, record(line)).cpu == number


def test_only_the_one_who_panicked_can_name_his_cpu() -> None:
    somebody_else = record("CPU: 1 PID: 99 Comm: other", 99)
    assert panic_in(SYSRQ, somebody_else).cpu is None
    assert panic_in(SYSRQ, somebody_else, ON_CPU_2, record("CPU: 5 PID: 4711 Comm: later")).cpu == 2
    assert panic_in(ON_CPU_2, SYSRQ).cpu is None


# --- Which entry of the registers that is ---------------------------------------------------------------------------


def test_the_cpu_that_ran_the_task_that_panicked_is_the_one() -> None:
    assert panicked_cpu(panic_in(SYSRQ), [cpu(0, 0), cpu(1, TASK), cpu(2, 12)]) == 1


def test_a_panic_in_interrupt_context_names_its_cpu() -> None:
    panic = panic_in(record("Kernel panic - not syncing: Fatal exception in interrupt", CALLER_CPU | 1))
    assert panicked_cpu(panic, [cpu(0, 0), cpu(1, 0)]) == 1
    assert panicked_cpu(panic, [cpu(0, 0)]) is None


def test_the_idle_task_runs_on_every_cpu_so_the_log_decides() -> None:
    idle = record("Kernel panic - not syncing: Attempted to kill the idle task!", 0)
    entries = [cpu(0, 0), cpu(1, 0), cpu(2, 99)]
    assert panicked_cpu(panic_in(idle), entries) is None
    assert panicked_cpu(panic_in(idle, record("CPU: 1 PID: 0 Comm: swapper/1", 0)), entries) == 1
    # CPU 2 was not idle: the log and the registers contradict each other.
    assert panicked_cpu(panic_in(idle, record("CPU: 2 PID: 0 Comm: swapper/2", 0)), entries) is None


def test_a_task_that_no_cpu_was_running_marks_no_cpu() -> None:
    """The second entry is called 2, but it ran another task than the one that panicked on the log's CPU 2."""
    assert panicked_cpu(panic_in(SYSRQ, ON_CPU_2), [cpu(0, 0), cpu(2, 99)]) is None
    assert panicked_cpu(panic_in(SYSRQ, ON_CPU_2), [cpu(0, 0), cpu(1, 99)]) is None
    assert panicked_cpu(panic_in(SYSRQ), [cpu(0, 0), cpu(1, 99)]) is None


def test_a_kernel_that_stores_no_callers_leaves_the_word_of_the_log() -> None:
    without = [record(found.text, None) for found in (SYSRQ, ON_CPU_2)]
    assert panicked_cpu(panic_in(*without), [cpu(0, 0), cpu(2, TASK)]) == 2
    assert panicked_cpu(panic_in(*without), [cpu(0, TASK), cpu(2, 0)]) == 0
    assert panicked_cpu(panic_in(without[0]), [cpu(0, TASK)]) is None


def test_without_registers_no_cpu_is_marked() -> None:
    assert panicked_cpu(panic_in(SYSRQ, ON_CPU_2), []) is None


def test_where_a_cpu_was_offline_no_other_cpu_is_marked_for_it() -> None:
    """CPU 1 was offline and left no note, so the third note is CPU 3's; CPU 2 panicked, which ran PID 77."""
    entries = [cpu(0, 0), cpu(1, 77), cpu(2, 88)]
    in_interrupt = CALLER_CPU | 2
    panic = panic_in(
        record("Kernel panic - not syncing: Fatal exception in interrupt", in_interrupt),
        record("CPU: 2 PID: 77 Comm: victim Not tainted 6.1.0 #1", in_interrupt),
    )
    assert panicked_cpu(panic, entries) in (1, None)


@pytest.mark.parametrize("name", ["linux-6.1-la57", "linux-6.12"])
def test_a_real_panic_is_found_and_its_cpu_is_the_one_in_the_log(name: str, corpus_file: Callable[[str], Path]) -> None:
    # Both vmcores: `echo c > /proc/sysrq-trigger` by the init process, PID 1; the log says "CPU: 1 PID: 1".
    with open_vmcore(str(corpus_file(name))) as vmcore:
        panic = find_panic(vmcore)
        cpus, _ = registers(vmcore)
    assert panic == Panic("Kernel panic - not syncing: sysrq triggered crash", 1, 1, 1)
    assert panicked_cpu(panic, cpus) == 1
    assert cpus[1].pid == 1
