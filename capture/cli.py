"""Arguments in, one line and an exit status out; no logic."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from capture import __version__, interruption
from capture.console import PREFIX, Console, open_standard_streams, print_line, printable
from capture.errors import CaptureError, TargetError, UsageError
from capture.levels import parse_levels

# NumPy's BLAS starts a thread for each CPU as soon as it is loaded, which spin; nothing of ours calls it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

Subparsers = Any  # argparse's own type for add_subparsers() is private

DUMP_LEVELS = (1,)
"""What ``vmcapture dump`` leaves out when nobody says."""
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EPILOG = (
    "exit status: 0 done; 1 failed; 2 usage; 3 saved but not whole; 4 not a usable vmcore; 5 target cannot be written"
)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(EXIT_USAGE, printable(f"{self.prog}: {message}; see {self.prog} --help") + "\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As argparse does, when the help that it may have printed can be written."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
        except OSError as error:
            status, message = _failed(_said_of(error), EXIT_FAILED), None
        super().exit(status, message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # noqa: ANN401
        """As argparse does, which would leave it to the whole program to refuse what one command does not know."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None, extend: Callable[[Subparsers], None] | None = None) -> int:
    """Run one command and return its exit status; ``extend`` as for ``make_parser``."""
    parser = make_parser(extend)
    given = open_standard_streams()
    args = parser.parse_args(argv, argparse.Namespace(standard_output=given))
    signal.signal(signal.SIGTERM, _terminated)
    interruption.say_again()
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except CaptureError as error:
        return [_failed(line, error.exit_status) for line in error.lines][-1]
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough: `vmcapture dmesg | head`
        _drop_output()
        return 0
    except OSError as error:
        return _failed(_said_of(error), EXIT_FAILED)
    except MemoryError:
        return _failed("out of memory; try --threads 1", EXIT_FAILED)
    except Exception as error:
        if getattr(args, "verbose", False):
            raise
        return _failed(
            f"internal error: {type(error).__name__}: {error}; -v shows where, please report it", EXIT_FAILED
        )
    return status


def make_parser(extend: Callable[[Subparsers], None] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    ``extend`` adds further commands (the set-up side's, which this package does not know). A command is a sub-parser
    whose defaults carry ``run``: a function from the parsed arguments to an exit status.
    """
    parser = OneLineParser(prog="vmcapture", description="Save what is left of a crashed Linux kernel.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"vmcapture {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(subparsers)
    if extend is not None:
        extend(subparsers)
    return parser


def add_commands(subparsers: Subparsers) -> None:
    """Add the commands of the capture side."""
    dump = command(subparsers, "dump", _dump, "write one dump, kdump-compressed")
    _add_dump_options(dump, levels=DUMP_LEVELS)
    dump.add_argument(
        "--format", choices=("kdump", "elf"), default="kdump",
        help="kdump: compressed, for crash and drgn; elf: an ELF core, not compressed, for gdb too (default: kdump)",
    )  # fmt: skip
    there = dump.add_mutually_exclusive_group()
    there.add_argument("--force", action="store_true", help="replace OUT if it exists")
    there.add_argument(
        "--resume", action="store_true", help="go on with OUT.incomplete, if it is there and of the same crash"
    )
    _add_source(
        dump, required=True, more="; a flattened dump (a file, a pipe, - for standard input) is put together as it is"
    )
    dump.add_argument(
        "out", metavar="OUT", type=Path, help="the dump to write; - for standard output, in the flattened format"
    )

    dmesg = command(subparsers, "dmesg", _dmesg, "print the dead kernel's log", output=True)
    dmesg.add_argument("--caller", action="store_true", help="show who printed each record: T<pid> or C<cpu>")
    _add_source(dmesg)

    _add_source(command(subparsers, "registers", _registers, "print every CPU's registers", output=True))
    _add_source(command(subparsers, "info", _info, "describe a vmcore: kernel, panic, CPUs, memory", output=True))

    verify = command(subparsers, "verify", _verify, "read every page of a dump back", output=True)
    verify.add_argument("dump", metavar="DUMP", type=Path)
    verify.add_argument("--against", metavar="SOURCE", help="compare every page with this vmcore, byte for byte")

    save = command(subparsers, "save", _save, "the whole job, as on a crash boot: log, registers, dump, manifest")
    _add_dump_options(save, levels=None)
    save.add_argument("--source", metavar="SOURCE", help="the vmcore to save (default: /proc/vmcore)")
    save.add_argument(
        "directory", metavar="DIR", nargs="?", type=Path,
        help="save below this directory (default: what vmcapture.target= on the kernel command line names)",
    )  # fmt: skip


def command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], what: str, *, output: bool = False
) -> argparse.ArgumentParser:
    """Add one command with the options that all commands share; ``output`` where it prints data (``--json``)."""
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=what, description=what, epilog=EPILOG)
    parser.set_defaults(run=run)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an internal error came from")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar or lines")
    if output:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def progress_wanted(args: argparse.Namespace) -> bool:
    """Return whether the shared options leave the progress display on."""
    return not (args.quiet or args.no_progress)


def _add_source(parser: argparse.ArgumentParser, *, required: bool = False, more: str = "") -> None:
    parser.add_argument(
        "source", metavar="SOURCE", nargs=None if required else "?", default="/proc/vmcore",
        help="/proc/vmcore, an ELF core file, a kdump-compressed dump, or oldmem: for old memory through elfcorehdr="
        + more,
    )  # fmt: skip


def _add_dump_options(parser: argparse.ArgumentParser, *, levels: tuple[int, ...] | None) -> None:
    default = "the kernel command line's, else 31" if levels is None else ",".join(map(str, levels))
    parser.add_argument(
        "-d", "--level", type=_levels, default=levels, metavar="LEVEL[,LEVEL...]",
        help="dump level, the sum of what to leave out: 1 zero pages, 2 page cache, 4 page cache with private data, "
        f"8 user pages, 16 free pages; of several, the first that fits on the target (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--trust-filter", action="store_true",
        help="make that level even when the page filter fails its checks",
    )  # fmt: skip
    parser.add_argument(
        "--exclude-vmemmap", action="store_true",
        help="leave out what of mem_map describes only pages that are left out",
    )  # fmt: skip
    parser.add_argument(
        "-c",
        "--compress",
        metavar="CODEC",
        help="zstd:auto (the level that disk and CPUs keep up with; default of save), zstd[:LEVEL] (default of dump), "
        "zlib[:LEVEL] or none",
    )
    parser.add_argument(
        "--threads",
        type=positive(1024),
        metavar="N",
        help="compressing threads (default: one a CPU, less where memory is short)",
    )
    parser.add_argument(
        "--deadline",
        type=positive(),
        metavar="SECONDS",
        help="end after that time with what is saved by then, marked incomplete (default: no limit)",
    )
    parser.add_argument(
        "--recipients",
        type=Path,
        metavar="FILE",
        help="encrypt to the public keys in FILE with age, so that this machine cannot read it back; a dump is "
        "flattened then",
    )


def _levels(text: str) -> tuple[int, ...]:
    try:
        return parse_levels(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option that takes a number from 1 on, up to ``most``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < 1 or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{text}: a number from 1 {f'to {most}' if most else 'on'} is needed")
        return int(text)

    return number


def _failed(reason: str, status: int) -> int:
    print_line(PREFIX + printable(reason))
    return status


def _said_of(error: OSError) -> str:
    """Return the line on an error of the system that nobody below has said anything of."""
    remedy = "; check its permissions" if error.errno == errno.EACCES and error.filename else ""
    return f"{error.filename or _unnamed()}: {error.strerror or error}{remedy}"


def _unnamed() -> str:
    """Return what an error that names no file is about: our output, when that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        return "standard output"
    return "system"


def _drop_output() -> None:
    """Let go what could not be written: Python would try once more at its end, and exit with a status of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


# What a command needs is imported when it runs: `vmcapture status` should not wait for NumPy.


def _dump_options(args: argparse.Namespace, levels: tuple[int, ...], compression: str, **more: bool) -> Any:  # noqa: ANN401
    from capture.options import DumpOptions

    options = DumpOptions(
        levels=levels if args.level is None else args.level,
        compression=args.compress or compression,
        threads=args.threads,
        progress=progress_wanted(args),
        trust_filter=args.trust_filter,
        exclude_vmemmap=args.exclude_vmemmap,
        deadline=None if args.deadline is None else time.monotonic() + args.deadline,
        recipients=args.recipients,
        **more,
    )
    options.check()
    return options


def _dump(args: argparse.Namespace) -> int:
    from capture.dumpfile.flattened import is_stream

    return _put_together(args) if is_stream(args.source) else _write_dump(args)


def _put_together(args: argparse.Namespace) -> int:
    from capture.dumpfile.assemble import assemble
    from capture.dumpfile.flattened import STANDARD_INPUT

    filtering = (args.compress, args.threads, args.deadline, args.recipients)
    if (
        args.level != DUMP_LEVELS
        or any(option is not None for option in filtering)
        or args.trust_filter or args.exclude_vmemmap or args.resume or str(args.out) == "-" or args.format != "kdump"
    ):  # fmt: skip
        raise UsageError("a flattened dump is put together in a file, as it is; other options are for a dump of that")
    if args.source == STANDARD_INPUT and sys.stdin.isatty():
        raise UsageError("SOURCE -: standard input is a terminal; pipe a flattened dump in")
    made = assemble(args.source, args.out, replace=args.force, progress=progress_wanted(args))
    summary = f"{made.path}: put together from {made.records} records, {made.size} bytes"
    if made.failure is not None:
        return _failed(f"{summary}; not whole: {made.failure}; it is readable and marked incomplete", 3)
    if made.incomplete:
        return _failed(f"{summary}; all of the stream is there, of a dump that is marked incomplete", 3)
    Console(quiet=args.quiet).say(summary)
    return 0


def _write_dump(args: argparse.Namespace) -> int:
    from capture.dump import STANDARD_OUTPUT, write_dump
    from capture.options import DUMP_COMPRESSION
    from capture.vmcore import open_vmcore

    if args.out == STANDARD_OUTPUT and sys.stdout.isatty():
        raise UsageError("OUT -: standard output is a terminal; send it to a file or a program")
    if args.out == STANDARD_OUTPUT and not args.standard_output:
        raise UsageError("OUT -: standard output is closed; send it to a file or a program")
    console = Console(quiet=args.quiet)
    elf = args.format == "elf"
    if elf and args.compress not in (None, "none"):
        raise UsageError(f"an ELF file is not compressed: leave -c {args.compress} out, or --format elf")
    options = _dump_options(
        args, args.level, DUMP_COMPRESSION, hashed=False, replace=args.force, resume=args.resume, elf=elf
    )
    with open_vmcore(args.source) as vmcore:
        for line in vmcore.problems:
            console.say(line)
        report = write_dump(vmcore, args.out, options, console.say)
    if report.failure is None and report.name_failure is not None:
        raise TargetError(report.name_failure)
    shortfall = report.shortfall()
    name = "standard output" if args.out == STANDARD_OUTPUT else report.path
    summary = f"{name}: level {report.level}, {report.pages_written} of {report.pages} pages, {report.size} bytes"
    if shortfall is None:
        console.say(summary)
        return 0
    return _failed(f"{summary}; not whole: {shortfall}; it is readable and marked incomplete", 3)


def _dmesg(args: argparse.Namespace) -> int:
    from capture import report
    from capture.vmcore import open_vmcore

    with open_vmcore(args.source) as vmcore:
        log = report.open_log(vmcore)
        if args.json:
            for record in log.records():
                print(json.dumps(report.record_json(record)))
        else:
            for line in report.log_lines(log.records(), caller=args.caller):
                sys.stdout.buffer.write(line)
        sys.stdout.flush()
    if log.statistics.undecodable:
        Console(quiet=args.quiet).say(f"{log.statistics.undecodable} records could not be decoded and were left out")
    return 0


def _registers(args: argparse.Namespace) -> int:
    from capture import report
    from capture.vmcore import open_vmcore

    with open_vmcore(args.source) as vmcore:
        panic = report.find_panic(vmcore)
        if args.json:
            print(json.dumps(report.registers_json(vmcore, panic), indent=1))
        else:
            print(report.registers_text(vmcore, panic), end="")
    return 0


def _info(args: argparse.Namespace) -> int:
    from capture import report
    from capture.dumpfile.codec import codec
    from capture.options import DUMP_COMPRESSION
    from capture.pagefilter import PageFilter
    from capture.survey import take_survey
    from capture.vmcore import open_vmcore

    with open_vmcore(args.source) as vmcore:
        values = report.describe(vmcore, report.find_panic(vmcore))
        page_filter = PageFilter(vmcore)
        survey = take_survey(vmcore.image, page_filter, codec(DUMP_COMPRESSION), len(vmcore.notes.blob))
        found = report.survey_values(survey, page_filter, codec(DUMP_COMPRESSION).name)
    if args.json:
        print(json.dumps(values | found, indent=1))
    else:
        print(report.description_text(values) + report.survey_text(found), end="")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from capture.verify import open_dump, verify
    from capture.vmcore import open_vmcore

    with open_dump(args.dump) as dump:
        if args.against is None:
            report = verify(dump, None, progress=progress_wanted(args))
        else:
            with open_vmcore(args.against) as vmcore:
                report = verify(dump, vmcore.image, progress=progress_wanted(args))
    if args.json:
        print(json.dumps(report.values(), indent=1))
    elif not (args.quiet and report.good):
        print(f"{printable(str(args.dump))}: {report.text()}")
    return report.exit_status


def _save(args: argparse.Namespace) -> int:
    from capture.boot import config
    from capture.boot.supervisor import save_to_targets
    from capture.memory.source import COMMAND_LINE

    console = Console(quiet=args.quiet)
    boot = config.parse(COMMAND_LINE.read_text(errors="replace"))
    options = _dump_options(args, boot.levels, boot.compression)
    if args.directory is None:
        outcome = save_to_targets(boot, console, options, args.source)
        if outcome.status:
            return _failed(outcome.line, outcome.status)
        console.say(outcome.line)
        return 0
    from capture.boot import job
    from capture.vmcore import open_vmcore

    with open_vmcore(args.source or job.default_source()) as vmcore:
        saved = job.save(vmcore, args.directory, options, console)
    console.say(f"{saved.outcome}: {saved.directory}")
    return job.exit_status(saved)
