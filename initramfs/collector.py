"""``core_collector``, and kdump-tools' MAKEDUMP_ARGS: what makedumpfile's options ask for, in our own words.

An option is carried over, named as not needed here, or refused with what to do: a dump that holds less, or more, than
somebody asked for must be known while the machine is healthy. The facts are makedumpfile(8)'s.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from capture.errors import UsageError
from capture.levels import parse_levels

ZLIB, FAST, NONE = "zlib", "zstd:auto", "none"
_COMPRESSION = {"-c": ZLIB, "-z": FAST, "-l": FAST, "-p": FAST}
_NAMES = {"-l": "LZO", "-p": "snappy"}

_NOT_NEEDED = {
    "-F": "every target gets an ordinary dump, which nobody has to put together",
    "-f": "a dump never takes the name of another one",
    "-D": "console and capture-log.txt say what is done",
    "-n": "the kernel's own notes are enough",
    "--non-mmap": "reading takes the place of mapping where that fails",
    "--show-stats": "manifest.json has the numbers",
}
"""Options without a value."""
_NOT_NEEDED_VALUES = {
    "--message-level": "console and capture-log.txt say what is done",
    "--num-threads": "there are as many threads as the capture kernel has CPUs and memory for (`cpus` sets the former)",
    "--cyclic-buffer": "the memory that a save takes is fixed",
    "--splitblock-size": "a dump is not split",
    "--work-dir": "a save needs no file to work in",
    "-b": "the memory that a save takes is fixed",
    "-x": "the kernel's own notes are enough",
    "-i": "the kernel's own notes are enough",
}
_REFUSED = {
    "-E": "a save is kdump-compressed, which crash and drgn open; take -E out",
    "-e": "leaving out mem_map is for `vmcapture dump --exclude-vmemmap`, after the reboot; take -e out",
    "-L": "a dump has no largest size; name several levels, `-d 1,17,31`, of which the first that fits is taken",
    "-R": "it puts a flattened dump together; take it out",
    "-g": "it writes no dump; take it out",
    "-X": "Xen's own memory cannot be saved; take it out",
    "-h": "it writes no dump; take it out",
    "-v": "it writes no dump; take it out",
    "--config": "nothing is erased from a dump; encrypt it instead: `recipients FILE`",
    "--eppic": "nothing is erased from a dump; encrypt it instead: `recipients FILE`",
    "--extension": "there are no extensions; take it out",
    "--split": "one dump is one file; take it out",
    "--reassemble": "it puts a split dump together; take it out",
    "--dump-dmesg": "the log is saved anyway, and the dump too; take core_collector out",
    "--partial-dmesg": "the whole log is saved; take it out",
    "--mem-usage": "`vmcapture info /proc/kcore` tells that; take it out",
    "--dry-run": "it writes no dump; take it out",
    "--diskset": "sadump is not supported; take it out",
    "--xen-syms": "Xen's own memory cannot be saved; take it out",
    "--xen-vmcoreinfo": "Xen's own memory cannot be saved; take it out",
    "--xen_phys_start": "Xen's own memory cannot be saved; take it out",
    "--vtop": "it is for makedumpfile's own makers; take it out",
    "--check-params": "`vmcapture config check` does that; take it out",
}
_COPIERS = ("cp", "scp", "cat", "dd", "rsync")


class Collected(NamedTuple):
    """What the options come to. ``notes`` are lines on those that need nothing or mean something else here."""

    levels: str
    compress: str
    notes: tuple[str, ...]


def core_collector(value: str) -> Collected:
    """Return what a ``core_collector`` line asks for.

    Raises:
        UsageError: its program or an option cannot be followed.
    """
    try:
        program, *options = shlex.split(value)
    except ValueError:
        raise UsageError("core_collector: a quote is missing its other half") from None
    name = program.rpartition("/")[2]
    if name in _COPIERS:
        raise UsageError(
            f"core_collector {name}: there is no plain copy; take the line out for a dump of level 31, or write "
            "`level 0` and `compress none` for all of memory"
        )
    if name != "makedumpfile":
        raise UsageError(
            f"core_collector {program}: only makedumpfile's options are understood, the dump is made without it; take "
            "the line out for a dump of level 31"
        )
    return makedumpfile(options)


def makedumpfile(options: Sequence[str]) -> Collected:
    """Return what makedumpfile's options ask for.

    Raises:
        UsageError: an option that cannot be followed.
    """
    level, compress, notes = "0", NONE, []
    left = _single_letters(options)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option in _COMPRESSION:
            compress = _COMPRESSION[option]
            if option in _NAMES:
                notes.append(
                    f"{option}: instead of {_NAMES[option]}, zstd at the level that disk and CPUs keep up with"
                )
        elif option == "-d":
            level = _level(_value(option, equals, value, left))
        elif option in _NOT_NEEDED_VALUES:
            value = _value(option, equals, value, left)
            if option in ("--message-level", "--num-threads") and not value.isdecimal():
                raise UsageError(f"core_collector: {option} {value}: a number is needed")
            notes.append(f"{option} {value} is not needed: {_NOT_NEEDED_VALUES[option]}")
        elif option in _NOT_NEEDED:
            notes.append(f"{option} is not needed: {_NOT_NEEDED[option]}")
        elif option in _REFUSED:
            raise UsageError(f"core_collector: makedumpfile {option}: {_REFUSED[option]}")
        else:
            raise UsageError(f"core_collector: makedumpfile {option}: no option that is known here; take it out")
    if compress == NONE:
        notes.append("neither -c nor -z, -l, -p: the dump is not compressed")
    if level == "0":
        notes.append("no -d: level 0, all of memory")
    return Collected(level, compress, tuple(notes))


def _single_letters(options: Sequence[str]) -> list[str]:
    """Return the options with joined ones apart, as getopt(3) reads them: ``-cd31`` is ``-c -d 31``."""
    apart: list[str] = []
    for option in options:
        if option.startswith("--") or not option.startswith("-") or len(option) <= 2:
            apart.append(option)
            continue
        rest = option[1:]
        while rest:
            letter, rest = f"-{rest[0]}", rest[1:]
            apart.append(letter)
            if letter == "-d" or letter in _NOT_NEEDED_VALUES or letter == "-L":
                apart += [rest] if rest else []
                break
    return apart


def _value(option: str, equals: str, value: str, left: list[str]) -> str:
    if equals:
        return value
    if not left:
        raise UsageError(f"core_collector: makedumpfile {option}: its value is missing")
    return left.pop(0)


def _level(text: str) -> str:
    try:
        return ",".join(map(str, parse_levels(text)))
    except UsageError as error:
        raise UsageError(f"core_collector: makedumpfile -d {error}") from None
