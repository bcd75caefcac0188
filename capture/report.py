"""Registers and a vmcore's own description, as text and as JSON-ready values."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from capture.console import printable
from capture.errors import SourceError
from capture.kernel.address import KernelMemory
from capture.kernel.panic import Panic, PanicFinder, panicked_cpu
from capture.kernel.printk import PrintkLog, Record, format_record
from capture.kernel.utsname import read_utsname
from capture.notes import prstatus
from capture.notes.prstatus import CpuRegisters
from capture.vmcore import Vmcore

if TYPE_CHECKING:
    from capture.pagefilter import PageFilter
    from capture.survey import Survey

_COLUMNS = 3
USUAL_LEVELS = (0, 1, 16, 17, 31)
"""Dump levels whose size is predicted."""
LEFT_OUT_BY = {
    "free": "16",
    "cache": "2, 4",
    "cache_private": "4",
    "user": "8",
    "hwpoison": "every level",
    "offline": "every level",
}
"""Level bits, by class."""


def open_log(vmcore: Vmcore) -> PrintkLog:
    """Return the dead kernel's log.

    Raises:
        LogUnavailable: VMCOREINFO or memory does not give it.
    """
    return PrintkLog(KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine), vmcore.info)


def log_lines(records: Iterator[Record], *, caller: bool = False) -> Iterator[bytes]:
    """Yield the log as lines, each with its newline."""
    for record in records:
        yield format_record(record, caller=caller) + b"\n"


def record_json(record: Record) -> dict[str, Any]:
    """Return one record of the log as values for JSON; ``timestamp`` in nanoseconds."""
    return {
        "sequence": record.sequence,
        "timestamp": record.timestamp,
        "caller": record.caller,
        "facility": record.facility,
        "level": record.level,
        "continuation": record.continuation,
        "text": record.text.decode("utf-8", "backslashreplace"),
    }


def find_panic(vmcore: Vmcore) -> Panic:
    """Return what the log says of the crash; an empty Panic when there is no log."""
    finder = PanicFinder()
    try:
        for _ in finder.watch(open_log(vmcore).records()):
            pass
    except SourceError:
        pass
    return finder.panic


def registers(vmcore: Vmcore) -> tuple[list[CpuRegisters], list[str]]:
    """Return the registers of every CPU that has them, and a line for each note that does not."""
    return prstatus.parse(vmcore.notes.prstatus(), vmcore.core.machine)


def registers_json(vmcore: Vmcore, panic: Panic) -> dict[str, Any]:
    """Return the registers as values for JSON; 64-bit numbers are hexadecimal text."""
    cpus, problems = registers(vmcore)
    return {
        "machine": vmcore.core.machine,
        "panicked_cpu": panicked_cpu(panic, cpus),
        "cpus": [
            {
                "cpu": entry.cpu,
                "pid": entry.pid,
                "registers": {name: f"{value:#018x}" for name, value in entry.registers.items()},
            }
            for entry in cpus
        ],
        "problems": problems,
    }


def registers_text(vmcore: Vmcore, panic: Panic) -> str:
    """Return the registers for a person."""
    cpus, problems = registers(vmcore)
    panicked = panicked_cpu(panic, cpus)
    lines: list[str] = []
    for entry in cpus:
        mark = "  <- this CPU panicked" if entry.cpu == panicked else ""
        lines.append(f"CPU {entry.cpu}, running PID {entry.pid}{mark}")
        cells = [f"{name:>8} {value:016x}" for name, value in entry.registers.items()]
        lines += ["  ".join(cells[at : at + _COLUMNS]) for at in range(0, len(cells), _COLUMNS)]
        lines.append("")
    lines += problems
    if not cpus:
        lines.append("no CPU left its registers (no NT_PRSTATUS note)")
    return "\n".join(lines).rstrip("\n") + "\n"


def describe(vmcore: Vmcore, panic: Panic) -> dict[str, Any]:
    """Return what is known of the dead kernel and its memory, as values for JSON."""
    memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
    names = read_utsname(memory, vmcore.info, vmcore.core.machine)
    cpus, _ = registers(vmcore)
    return {
        "source": vmcore.source.name,
        "release": printable(names.text("release")),
        "version": printable(names.text("version")),
        "machine": vmcore.core.machine,
        "host": printable(names.text("nodename")),
        "crash_time": crash_time_text(vmcore),
        "panic": panic.line or None,
        "panicked_cpu": panicked_cpu(panic, cpus),
        "cpus": len(cpus),
        "page_size": vmcore.image.page_size,
        "pages": vmcore.image.page_count,
        "bytes": vmcore.image.page_count * vmcore.image.page_size,
        "segments": len(vmcore.core.loads),
        "notes": len(vmcore.notes.notes),
        "problems": vmcore.problems,
    }


def survey_values(survey: Survey, page_filter: PageFilter, compression: str) -> dict[str, Any]:
    """Return pages by class, and the predicted size of dumps at the usual levels, as values for JSON.

    ``level`` of a prediction is the one that would be made of ``asked``, ``reasons`` say why it is lower.
    """
    total = max(1, int(survey.census.classes.sum()))
    predictions = []
    for asked in USUAL_LEVELS:
        verdict = page_filter.verdict(asked)
        predictions.append(
            {
                "asked": asked,
                "level": verdict.level,
                "pages": survey.pages(verdict.level),
                "bytes": survey.size(verdict.level),
                "reasons": list(verdict.reasons),
            }
        )
    return {
        "classes": survey.census.by_name(),
        "class_bytes": {name: pages * survey.page_size for name, pages in survey.census.by_name().items()},
        "class_shares": {name: round(pages / total, 6) for name, pages in survey.census.by_name().items()},
        "filter_unusable": page_filter.unusable,
        "free_pages_counted_by_the_kernel": survey.census.free_counted,
        "protected": list(page_filter.protects),
        "compression": compression,
        "predicted": predictions,
    }


def survey_text(values: dict[str, Any]) -> str:
    """Return what ``survey_values`` found for a person."""
    lines = ["", f"{'class':<15}{'pages':>13}{'MiB':>12}{'share':>9}  left out by"]
    for name, pages in values["classes"].items():
        if pages or name in LEFT_OUT_BY:
            mebibytes = values["class_bytes"][name] / (1 << 20)
            by = LEFT_OUT_BY.get(name, "nothing")
            lines.append(f"{name:<15}{pages:>13,}{mebibytes:>12,.1f}{values['class_shares'][name]:>9.1%}  {by}")
    if values["filter_unusable"]:
        lines.append(f"pages cannot be told apart: {values['filter_unusable']}")
    lines += ["", f"{'level':<15}{'pages':>13}{'MiB':>12}  predicted size with {values['compression']}"]
    for prediction in values["predicted"]:
        mebibytes = prediction["bytes"] / (1 << 20)
        made = "" if prediction["level"] == prediction["asked"] else f"  made as level {prediction['level']}"
        lines.append(f"{prediction['asked']:<15}{prediction['pages']:>13,}{mebibytes:>12,.1f}{made}")
    lines += sorted({f"filter check failed: {reason}" for entry in values["predicted"] for reason in entry["reasons"]})
    return "\n".join(lines) + "\n"


def crash_time_text(vmcore: Vmcore) -> str | None:
    """Return CRASHTIME as ISO 8601 in UTC, None where it is not known."""
    seconds = vmcore.info.crash_time
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def description_text(values: dict[str, Any]) -> str:
    """Return what ``describe`` found for a person: one ``name: value`` a line."""
    shown = {
        "kernel": f"{values['release']} {values['machine']}, {values['version']}".rstrip(", "),
        "host": values["host"] or "unknown",
        "crashed": values["crash_time"] or "unknown",
        "panic": values["panic"] or "no announcement in the log",
        "CPUs": f"{values['cpus']}"
        + ("" if values["panicked_cpu"] is None else f", CPU {values['panicked_cpu']} panicked"),
        "memory": f"{values['pages']} pages of {values['page_size']} bytes, {values['bytes'] / (1 << 20):.0f} MiB, "
        f"{values['segments']} segments",
    }
    lines = [f"{name + ':':<9}{value}" for name, value in shown.items()]
    lines += [f"problem: {problem}" for problem in values["problems"]]
    return "\n".join(lines) + "\n"
