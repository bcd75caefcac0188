"""``vmcapture config``: what a configuration file comes to, and how to get one from another program's."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from capture.cli import EXIT_FAILED, Subparsers, command
from capture.console import Console, printable
from capture.errors import UsageError
from initramfs import config_check, settings, state
from initramfs.config import CONFIG, Config, ConfigError, directive_lines, read_config
from initramfs.directives import DIRECTIVES
from initramfs.errors import StateError

STANDARD_OUTPUT = Path("-")


def add_commands(subparsers: Subparsers) -> None:
    """Add ``config`` with its own commands, ``check`` and ``import``."""
    what = "check the configuration file, or make one from another program's"
    parser: argparse.ArgumentParser = subparsers.add_parser("config", help=what, description=what)
    below = parser.add_subparsers(dest="config_command", required=True, metavar="COMMAND", help="check or import")
    check = command(below, "check", run_check, "say what a configuration file comes to, or what is wrong", output=True)
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"default: {CONFIG}")
    check.add_argument("--modules-dir", type=Path, metavar="DIR", help="default: /lib/modules/ of the running kernel")
    made = command(below, "import", run_import, "make a configuration file from kdump-tools' or kdump-utils'")
    made.add_argument(
        "files", nargs="*", type=Path, metavar="FILE",
        help="default: /etc/default/kdump-tools, or /etc/sysconfig/kdump and /etc/kdump.conf",
    )  # fmt: skip
    made.add_argument("-o", "--output", type=Path, metavar="OUT", help=f"default: {CONFIG}; - for standard output")
    made.add_argument("--force", action="store_true", help="replace OUT if it has directives already")


def run_check(args: argparse.Namespace) -> int:
    """Say what the file comes to."""
    file = args.file or CONFIG
    config = read_config(file)
    config_check.check(config, args.modules_dir or Path("/lib/modules") / os.uname().release)
    if args.json:
        print(json.dumps(_values(config), indent=2))
        return 0
    print(f"{printable(str(file))}: all of it can be followed")
    for name, value in _summary(config):
        print(f"  {name:<18} {value}")
    if not args.quiet:
        for note in config.notes:
            print(printable(note))
    return 0


def _values(config: Config) -> dict[str, object]:
    def plain(value: object) -> object:
        if isinstance(value, Path):
            return str(value)
        return [plain(part) for part in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in asdict(config).items() if name != "places"}


def _summary(config: Config) -> Iterator[tuple[str, object]]:
    """Yield what would be done, a name and a value each."""
    targets = [*config.targets, *(["the root file system"] if config.root_is_last_target else [])]
    directory = config.path or str(settings.CRASH_DIRECTORY)
    if not config.targets:
        targets.insert(0, f"the file system of {directory}")
    for number, target in enumerate(targets, 1):
        yield f"target {number}" if len(targets) > 1 else "target", target
    yield "directory", directory
    yield "level", config.levels or "31"
    yield "compression", config.compress or "zstd:auto"
    yield "after a save", config.final or settings.FINAL
    yield "after a failure", config.failure or settings.FAILURE
    for name, value in (
        ("before the save", " ".join(map(str, config.pre))),
        ("after it, too", " ".join(map(str, config.post))),
        ("crashes kept", config.keep),
        ("room left", config.free),
        ("encrypted to", config.recipients),
        ("SSH key", config.sshkey),
        ("wait", _seconds(config.wait)),
        ("timeout", _seconds(config.timeout)),
        ("deadline", _seconds(config.deadline)),
        ("watchdog", _seconds(config.watchdog)),
        ("CPUs", config.cpus),
        ("system call", config.syscall),
        ("image made by", config.image_builder),
        ("more programs", " ".join(map(str, config.extra_bins))),
        ("more modules", " ".join(config.extra_modules)),
        ("command line of", config.base_line),
        ("without", " ".join(config.remove)),
        ("command line and", config.append),
        ("told at next boot", ", ".join(" ".join(whom) for whom in config.notify)),
    ):
        if value not in (None, ""):
            yield name, value


def _seconds(number: int | None) -> str | None:
    return None if number is None else f"{number} s"


def run_import(args: argparse.Namespace) -> int:
    """Make the file, and name what could not be carried over."""
    from initramfs.config_import import import_files, usual_files

    console = Console(quiet=args.quiet)
    output = args.output or CONFIG
    if output != STANDARD_OUTPUT and not args.force and _has_directives(output):
        raise UsageError(f"{output} is there and says something: --force replaces it, -o - shows the new one")
    found = import_files(args.files or usual_files())
    if output == STANDARD_OUTPUT:
        print(found.text(), end="")
    else:
        _write(output, found.text())
    for line in found.notes:
        console.say(line)
    for line in found.lost:
        Console().say(f"not carried over: {line}")
    if output != STANDARD_OUTPUT:
        console.say(f"{output}: written; next: vmcapture config check, vmcapture initramfs, vmcapture load")
    return EXIT_FAILED if found.lost else 0


def _has_directives(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        return any(name in DIRECTIVES for _, name, _ in directive_lines(file.read_text(errors="surrogateescape")))
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from None


def _write(file: Path, text: str) -> None:
    """Write the file; root may write it, everybody read it."""
    try:
        state.write_text(file, text, 0o644)
    except StateError as error:
        raise UsageError(f"{error}; name another place with -o") from None
