"""``list``, ``show`` and ``report``: arguments in, lines and an exit status out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from capture.cli import EXIT_FAILED, Subparsers, command
from capture.console import Console, printable
from capture.errors import SourceError
from initramfs import crash_view, crashes, settings
from initramfs.config import read_config
from initramfs.crashes import SavedCrash
from initramfs.places import Place, places


def add_commands(subparsers: Subparsers) -> None:
    """Add them."""
    parser = command(subparsers, "list", run_list, "list the crashes that were saved on this host", output=True)
    settings.add_config(parser)
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIR",
        help="where to look (default: below the configured path on each local target)",
    )  # fmt: skip
    parser = command(subparsers, "show", run_show, "show one crash: panic, log, registers, how to open it", output=True)
    settings.add_config(parser)
    parser.add_argument(
        "crash", nargs="?", metavar="CRASH", help="its directory, or that one's name (default: the latest crash)"
    )
    parser = command(
        subparsers, "report", run_report,
        "after a reboot: verify new crashes, write them to the journal, tell who is to know", output=True,
    )  # fmt: skip
    settings.add_config(parser)
    parser.add_argument("--no-notify", action="store_true", help="tell nobody but the journal")


@contextmanager
def _places(args: argparse.Namespace, directories: Sequence[Path], console: Console) -> Iterator[list[Place]]:
    """Give the directories that were named, else those of the configured targets."""
    if directories:
        for directory in directories:
            if not directory.is_dir():
                raise SourceError(f"{directory}: no such directory")
        yield [Place(directory, str(directory)) for directory in directories]
        return
    with places(read_config(args.config)) as (found, lines):
        for line in lines:
            console.say(line)
        yield found


def run_list(args: argparse.Namespace) -> int:
    """List crashes, the newest first."""
    console = Console(quiet=args.quiet)
    with _places(args, args.directories, console) as where:
        found = crashes.find(where)
        if args.json:
            print(json.dumps([crash.values() for crash in found], indent=1))
        elif found:
            print("\n".join(crash_view.table(found)))
        else:
            console.say(f"no crash was saved in {', '.join(place.shown for place in where)}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Show one crash."""
    console = Console(quiet=args.quiet)
    named = None if args.crash is None else Path(args.crash)
    if named is not None and named.is_dir():
        _print_crash(args, crashes.describe(named))
        return 0
    with _places(args, [], console) as where:
        found = crashes.find(where)
        if named is not None:
            found = [crash for crash in found if named.name == crash.directory.name]
        if not found:
            what = "no crash was saved" if named is None else f"{args.crash}: no such crash is"
            raise SourceError(f"{what} in {', '.join(place.shown for place in where)}; vmcapture list shows all")
        _print_crash(args, found[0])
    return 0


def _print_crash(args: argparse.Namespace, crash: SavedCrash) -> None:
    if not args.json:
        print("\n".join(map(printable, crash_view.screen(crash))))
        return
    registers = crashes.panicked_registers(crash)
    values = {
        **crash.values(),
        "log": crashes.excerpt(crash),
        "registers": None if registers is None else registers[1],
        "open": crash_view.how_to_open(crash),
    }
    print(json.dumps(values, indent=1))


def run_report(args: argparse.Namespace) -> int:
    """Tell of the crashes that nobody was told of yet."""
    from initramfs import after_crash, notify  # with NumPy, and all that speaks HTTP

    console = Console(quiet=args.quiet)
    config = read_config(args.config)
    receivers = [] if args.no_notify else notify.receivers(config.notify)
    with _places(args, [], console) as where:
        done = after_crash.report(where, receivers, console, quiet=args.quiet)
    if args.json:
        test = None if done.test is None else asdict(done.test)
        print(json.dumps({"crashes": [news.values for news in done.news], "not_told": done.failures, "test": test}))
    elif not done.news and done.test is None:
        console.say("no crash that was not reported before")
    return EXIT_FAILED if done.failures else 0
