"""``arm``, ``status`` and ``test``: arguments in, lines and an exit status out."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from capture.cli import OneLineParser, Subparsers, command, positive
from capture.console import Console
from capture.errors import UsageError
from initramfs import arm, crash_test, crashes, prometheus, rehearsal, settings, status
from initramfs.config import Config, ConfigError, read_config
from initramfs.image import ImageRequest
from initramfs.kexec import CrashKernel
from initramfs.places import places
from initramfs.wishes import Wishes


def add_commands(subparsers: Subparsers) -> None:
    """Add them."""
    release = os.uname().release
    parser = command(subparsers, "arm", run_arm, "build the capture image and load it, what of it is needed now")
    add = parser.add_argument
    settings.add_config(parser)
    add("--kernel", default=release, metavar="RELEASE", help="the kernel to arm with (default: the running one)")
    add("--build-only", action="store_true", help="build the image, load nothing: for a kernel that is not booted yet")
    add("--force", action="store_true", help="build and load whether or not anything has changed")

    parser = command(
        subparsers, "status", run_status,
        "would a crash now be saved? exit status 0: yes, 1: no, 3: yes, but for a doubt", output=True,
    )  # fmt: skip
    add = parser.add_argument
    settings.add_config(parser)
    add(
        "--prometheus", nargs="?", type=Path, const=prometheus.FILE, metavar="FILE",
        help="write it for node_exporter's textfile collector, - for standard output; exit status 0 when it is written "
        "(default: %(const)s)",
    )  # fmt: skip

    parser = command(
        subparsers, "test", run_test, "rehearse a crash in QEMU, and try the targets; or crash this machine"
    )
    add = parser.add_argument
    settings.add_config(parser)
    add("--no-guest", action="store_true", help="try the targets only, crash no guest")
    add(
        "--timeout", type=positive(), default=rehearsal.DEADLINE, metavar="SECONDS",
        help="time for the guest (default: %(default)s)",
    )  # fmt: skip
    add("--crash", action="store_true", help="CRASH THIS MACHINE; the next boot reports what was saved (asks twice)")
    add(
        f"--{CRASH_WORD}", action="store_true", dest="confirmed",
        help="with --crash: do not ask",
    )  # fmt: skip


CRASH_WORD = "yes-crash-this-machine"
NO_TRIAL = "--no-check"
"""Of ``initramfs``: nothing is mounted, nor written to another machine; what the image needs is the same."""


def _words(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the options that the commands below get as well."""
    return (*(("--config", str(args.config)) if args.config is not None else ()), *(("--quiet",) if args.quiet else ()))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Return what ``vmcapture`` makes of these words."""
    from initramfs import cli  # which has our commands, too

    parser = OneLineParser(prog="vmcapture")
    cli.add_commands(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(words)


def _run(words: Sequence[str]) -> int:
    args = parsed(words)
    result: int = args.run(args)
    return result


def run_arm(args: argparse.Namespace) -> int:
    """Build what is not current, load what is not loaded."""
    from initramfs.cli import default_image, default_kernel

    wanted = arm.Wanted(
        release=args.kernel,
        kernel=default_kernel(args.kernel),
        image=default_image(args.kernel),
        words=_words(args),
        load=not args.build_only,
        force=args.force,
    )
    return arm.arm(wanted, _run, Console(quiet=args.quiet))


def _wanted(args: argparse.Namespace) -> status.Wanted:
    """Return how to learn what ``arm`` would do for the running kernel, without a trial of targets."""
    from initramfs.cli import crash_kernel, default_image, image_request

    release = os.uname().release
    config = () if args.config is None else ("--config", str(args.config))

    def image(path: Path) -> ImageRequest:
        words = ("initramfs", "--kernel", release, "-o", str(path), NO_TRIAL, *config)
        args = parsed(words)
        return image_request(args, settings.configure(args), path)

    def kernel() -> CrashKernel:
        words = ("load", "--image", str(default_image(release)), *config)
        return crash_kernel(parsed(words), Console(quiet=True))

    return status.Wanted(image, kernel)


def run_status(args: argparse.Namespace) -> int:
    """Tell whether a crash now would be saved."""
    state = status.status(_wanted(args))
    if args.prometheus is not None:
        return _export(args, state)
    if args.json:
        print(json.dumps(state.values(), indent=2))
    elif not args.quiet:
        print("\n".join(state.lines()))
    return state.exit_status


def _export(args: argparse.Namespace, state: status.Status) -> int:
    with places(_config(args)) as (found, _):
        prometheus.write(args.prometheus, prometheus.metrics(state, crashes.find(found)))
    return 0


def _config(args: argparse.Namespace) -> Config:
    """Return what the configuration file says; nothing where that is wrong, which the check of the image tells."""
    try:
        return read_config(args.config)
    except ConfigError:
        return Config()


def run_test(args: argparse.Namespace) -> int:
    """Try what can be tried without a crash; or crash."""
    console = Console(quiet=args.quiet)
    if args.confirmed and not args.crash:
        raise UsageError(f"--{CRASH_WORD} is for --crash")
    wanted = _wanted(args)
    state = status.status(wanted)
    if args.crash:
        return _crash(args, state, console)
    wishes = Wishes(ssh_key=_config(args).sshkey)
    request = rehearsal.Request(state, wanted, args.timeout, guest=not args.no_guest, wishes=wishes)
    result = rehearsal.rehearse(request, console.say)
    print("\n".join(result.lines()))
    return result.exit_status


def _crash(args: argparse.Namespace, state: status.Status, console: Console) -> int:
    """Crash the machine, when it is armed and somebody has said twice that it may."""
    if not args.quiet:
        print("\n".join(state.lines()), flush=True)
    if state.verdict == status.BAD:
        raise UsageError("a crash now would not be saved: the machine is not crashed")
    host = socket.gethostname()
    if not args.confirmed:
        if not sys.stdin.isatty():
            raise UsageError(f"nobody is at the terminal to be asked: vmcapture test --crash --{CRASH_WORD}")
        crash_test.confirm(host, input)
    before = crash_test.last()
    made = crash_test.begin(host, [target.target for target in state.targets])
    console.say(f"crash test {made.id}: after the reboot 'vmcapture report', or the journal, says what was saved")
    crash_test.crash(before)
    return 1
