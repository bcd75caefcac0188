"""Crashes for a person: one line each, or all that is worth knowing of one on a screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from initramfs.crashes import SavedCrash, excerpt, panicked_registers
from initramfs.units import size_text

_COLUMNS = 3
_PANIC_WIDTH = 60
DEBUG_KERNELS = ("/usr/lib/debug/boot/vmlinux-{}", "/usr/lib/debug/lib/modules/{}/vmlinux")
"""Where debug symbols of a kernel are kept: Debian, Fedora."""


def table(crashes: Sequence[SavedCrash]) -> list[str]:
    """Return a line for each crash below a heading, and a line for each directory that they are in."""
    lines: list[str] = []
    for parent in dict.fromkeys(_parent(crash) for crash in crashes):
        rows = [_row(crash) for crash in crashes if _parent(crash) == parent]
        heading = (parent + ":", "STATE", "SIZE", "KERNEL", "PANIC")
        widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(4)]
        lines += [
            f"{name:<{widths[0]}}  {state:<{widths[1]}}  {size:>{widths[2]}}  {kernel:<{widths[3]}}  {panic}".rstrip()
            for name, state, size, kernel, panic in (heading, *rows)
        ]
    return lines


def _parent(crash: SavedCrash) -> str:
    return crash.shown.rpartition("/")[0] or "."


def _row(crash: SavedCrash) -> tuple[str, str, str, str, str]:
    panic = crash.panic or ("?" if crash.encrypted else "no announcement in the log")
    if len(panic) > _PANIC_WIDTH:
        panic = panic[: _PANIC_WIDTH - 1] + "…"
    return crash.directory.name, state(crash), size_text(crash.size), crash.release or "?", panic


def state(crash: SavedCrash) -> str:
    """Return in a few words whether all is there, and can be read here."""
    return crash.state + (", encrypted" if crash.encrypted else "")


def screen(crash: SavedCrash) -> list[str]:
    """Return all that is worth knowing of one crash."""
    version = f" ({crash.version})" if crash.version else ""
    level = "" if crash.level is None else f", dump level {crash.level}"
    lines = [
        f"crash of {crash.host}, {crash.when:%Y-%m-%d %H:%M:%S} UTC",
        f"directory  {crash.shown}",
        f"kernel     {crash.release or 'unknown'} {crash.machine or ''}{version}".rstrip(),
        f"panic      {crash.panic or ('in vmcore-dmesg.txt.age' if crash.encrypted else 'no announcement in the log')}",
        f"saved      {state(crash)}; {crash.size:,} bytes ({size_text(crash.size)}){level}",
        *(f"problem    {problem}" for problem in crash.problems),
    ]
    if log := excerpt(crash):
        lines += ["", "log around the crash (all of it: vmcore-dmesg.txt)", *(f"  {line}" for line in log)]
    if found := panicked_registers(crash):
        cpu, registers = found
        lines += [
            "",
            f"registers of CPU {cpu}, which panicked (the others: registers.txt)",
            *_register_lines(registers),
        ]
    return [*lines, "", "open it", *(f"  {line}" for line in how_to_open(crash))]


def _register_lines(registers: Mapping[str, str]) -> list[str]:
    cells = [f"{name:>8} {value.removeprefix('0x')}" for name, value in registers.items()]
    return ["  ".join(cells[at : at + _COLUMNS]) for at in range(0, len(cells), _COLUMNS)]


def how_to_open(crash: SavedCrash, root: Path = Path("/")) -> list[str]:
    """Return the commands that open the dump, and what has to be there for them."""
    if crash.dump is None:
        return ["there is no dump; vmcore-dmesg.txt and registers.txt are what was saved"]
    release = crash.release or "RELEASE"
    places = [root / place.format(release).lstrip("/") for place in DEBUG_KERNELS]
    symbols = next((place for place in places if place.exists()), None)
    vmlinux, dump = shlex.quote(str(symbols or places[0])), shlex.quote(f"{crash.shown}/{crash.dump.name}")
    lines = []
    if not crash.shown.startswith(("/", ".")) and not Path(crash.shown).exists():
        lines.append(f"mount {crash.shown.partition(':')[0]}, on which it is, and take its path there:")
    if crash.encrypted:
        lines.append("where the key is, with a copy of the directory:")
        lines.append(f"age -d -i KEY {shlex.quote(crash.dump.name)} | vmcapture dump - vmcore")
        dump = "vmcore"
    lines += [f"crash {vmlinux} {dump}", f"drgn -c {dump} -s {vmlinux}"]
    if symbols is None:
        lines.append(
            f"debug symbols of {release} are not here: Debian's package is linux-image-{release}-dbg, "
            f"Fedora's is kernel-debuginfo-{release}"
        )
    return lines
