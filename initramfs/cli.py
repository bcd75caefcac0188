"""The set-up side's commands: arguments in, a line and an exit status out; no logic."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import capture.cli
from capture.boot.config import ACTIONS, MAX_KEEP, MAX_WATCHDOG, MIN_WATCHDOG, parse
from capture.boot.room import parse_floor
from capture.cli import Subparsers, command, positive
from capture.console import Console, printable
from capture.errors import CaptureError, UsageError
from capture.options import RECIPIENTS
from initramfs import (
    builders,
    collect,
    commands_arming,
    commands_config,
    commands_crashes,
    config_check,
    devices,
    directives,
    estimate,
    kexec,
    measure,
    modules,
    remote,
    settings,
    stamp,
    targets,
    watchdogs,
    wishes,
)
from initramfs.config import Config
from initramfs.devices import Needed
from initramfs.encryption import encryption
from initramfs.errors import ImageError, MeasureError
from initramfs.estimate import Estimate
from initramfs.image import OWN, ImageReport, ImageRequest
from initramfs.kexec import CrashKernel
from initramfs.measure import Measurement
from initramfs.parts import write_parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, the set-up side's included, and return its exit status."""
    return capture.cli.main(argv, extend=add_commands)


def add_commands(subparsers: Subparsers) -> None:
    """Add the commands of the set-up side."""
    _add_initramfs(subparsers)
    _add_load(subparsers)
    command(subparsers, "unload", run_unload, "disarm the machine")
    _add_estimate(subparsers)
    commands_arming.add_commands(subparsers)
    commands_crashes.add_commands(subparsers)
    commands_config.add_commands(subparsers)
    collect.add_command(subparsers)


def _add_initramfs(subparsers: Subparsers) -> None:
    parser = command(subparsers, "initramfs", run_initramfs, "build the capture image")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "-o", "--output", type=Path, metavar="IMAGE", help="default: /var/lib/vmcapture/initramfs-RELEASE.img"
    )
    way.add_argument(
        "--into", type=Path, metavar="DIR",
        help="build no image: write our parts below DIR, the root of one that dracut or initramfs-tools is making",
    )  # fmt: skip
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="do nothing when the image is there and what it is made from is the same",
    )
    _add_image_options(parser)


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the image is to hold."""
    add = parser.add_argument
    add("--kernel", metavar="RELEASE", help="kernel release, default: that of --modules-dir, else the running one")
    add("--modules-dir", type=Path, metavar="DIR", help="its modules, default: /lib/modules/RELEASE")
    add(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="a kernel module that the target needs (repeatable); default: what the target uses now",
    )
    _add_target(parser)
    wishes.add_options(parser)
    settings.add_config(parser)
    add(
        "--builder", choices=directives.BUILDERS,
        help=f"who makes the image (default: {settings.BUILDER}); dracut and initramfs-tools put our parts into theirs",
    )  # fmt: skip
    add("--no-squashfs", action="store_true", help="a plain tree, for kernels without squashfs: needs more memory")
    add(
        "--bin",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="a further program, with its shared objects (repeatable)",
    )
    add(
        "--recipients",
        type=Path,
        metavar="FILE",
        help="saves are encrypted with age to the public keys in FILE; default: /etc/vmcapture/recipients, where that "
        "is there",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", action="append", default=[], metavar="TARGET",
        help=f"where the dump goes, {', '.join(targets.SAMPLES)}; default: what holds /var/crash; repeatable: the next "
        "ones are for when those before fail",
    )  # fmt: skip


def _add_load(subparsers: Subparsers) -> None:
    parser = command(subparsers, "load", run_load, "arm the machine: load the capture kernel")
    add = parser.add_argument
    release = os.uname().release
    add(
        "--kernel-image",
        type=Path,
        default=default_kernel(release),
        metavar="VMLINUZ",
        help="the kernel to load, default: /boot/vmlinuz-RELEASE, else /lib/modules/RELEASE/vmlinuz",
    )
    add(
        "--image",
        type=Path,
        default=default_image(release),
        metavar="IMG",
        help="the capture image, default: /var/lib/vmcapture/initramfs-RELEASE.img",
    )
    _add_target(parser)
    settings.add_config(parser)
    add("--path", metavar="DIR", help="directory on the target, default: /var/crash")
    add("--final", choices=ACTIONS, help=f"what follows a save (default: {settings.FINAL})")
    add("--failure", choices=ACTIONS, help=f"what follows a failure (default: {settings.FAILURE})")
    settings.add_save_options(parser)
    add(
        "--keep", type=positive(MAX_KEEP), metavar="N",
        help="how many crashes of this host stay after a whole save, the new one included (default: all)",
    )  # fmt: skip
    add(
        "--free", type=_floor, metavar="SIZE",
        help="room to be left after a whole save, 10G or 10%%: older crashes of this host go until it is",
    )  # fmt: skip
    add(
        "--watchdog", type=_watchdog, metavar="SECONDS",
        help="without progress in the capture kernel, after which a watchdog resets the machine; 0: never "
        f"(default: {watchdogs.DEFAULT_SECONDS} where a watchdog runs now, else 0)",
    )  # fmt: skip
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--syscall", choices=kexec.SYSCALLS, help="auto (the default): the first one that works")
    way.add_argument("-s", dest="syscall", action="store_const", const="file", help="kexec_file_load")
    way.add_argument("-c", dest="syscall", action="store_const", const="load", help="kexec_load")
    add(
        "--cpus", type=positive(), metavar="N",
        help="CPUs in the capture kernel (default: as many as the reserved memory is enough for)",
    )  # fmt: skip
    add("--if-needed", action="store_true", help="do nothing when just that is loaded already")
    add("--append", default="", metavar="STR", help="more for the capture kernel's command line")
    add("--command-line", metavar="STR", help="the capture kernel's whole command line")


def _floor(text: str) -> str:
    """Return the text, as it goes to the capture kernel, when that would understand it."""
    try:
        parse_floor(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _watchdog(text: str) -> int:
    seconds = int(text) if text.isascii() and text.isdigit() else -1
    if seconds and not MIN_WATCHDOG <= seconds <= MAX_WATCHDOG:
        raise argparse.ArgumentTypeError(f"{text}: 0, or seconds from {MIN_WATCHDOG} to {MAX_WATCHDOG}")
    return seconds


def _add_estimate(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "estimate", run_estimate, "how much memory to reserve: crashkernel=, and why", output=True
    )
    _add_image_options(parser)
    add = parser.add_argument
    add("--image", type=Path, metavar="IMG", help="an image that is built already; else one is built to be measured")
    add("--cpus", type=positive(), default=1, metavar="N", help="CPUs in the capture kernel (default: %(default)s)")
    add(
        "--kernel-image",
        type=Path,
        metavar="VMLINUZ",
        help="the kernel to measure with, default: /boot/vmlinuz-RELEASE, else /lib/modules/RELEASE/vmlinuz",
    )
    add("--no-measure", action="store_true", help="compute it, even where QEMU could crash a guest to measure it")
    add(
        "--timeout",
        type=positive(),
        default=measure.DEADLINE,
        metavar="SECONDS",
        help="time for the guests (default: %(default)s)",
    )


def default_kernel(release: str, root: Path = Path("/")) -> Path:
    """Return where a kernel is kept: below /boot, or beside its modules (Fedora)."""
    usual = root / "boot" / f"vmlinuz-{release}"
    beside = root / "lib/modules" / release / "vmlinuz"
    return beside if beside.exists() and not usual.exists() else usual


def default_image(release: str) -> Path:
    """Return where the image of a kernel is kept."""
    return Path(f"/var/lib/vmcapture/initramfs-{release}.img")


def image_request(args: argparse.Namespace, config: Config, output: Path | None) -> ImageRequest:
    """Return what the image is to hold: by default what this machine's target needs."""
    config_check.check_image(config, _modules_dir(args))
    wanted = wishes.of(args)
    for program in args.bin:
        if not (program.is_file() and os.access(program, os.X_OK)):
            raise ImageError(f"--bin {program}: {'it may not be executed' if program.is_file() else 'no such program'}")
    needed = sum((targets.needed_by(target, wanted) for target in args.target), Needed())
    if not args.target and not args.module:
        needed = targets.needed_by_mount(devices.mount_of(args.directory), wanted)
    release = _release(args)
    # With --module the image may be for another machine.
    watchdog = Needed() if args.module else watchdogs.modules()
    software = () if args.module or watchdog != Needed() else (watchdogs.SOFTWARE,)
    encrypted = encryption(args.recipients)
    return ImageRequest(
        output=output or default_image(release),
        kernel_release=release,
        modules_dir=_modules_dir(args),
        modules=(*needed.loaded, *args.module, *config.extra_modules),
        optional_modules=needed.built_in,
        welcome_modules=(*(() if args.module else devices.keyboard_modules()), *software),
        watchdog_modules=(*watchdog.loaded, *watchdog.built_in),
        module_options=modules.host_options(),
        binaries=(*args.bin, *config.extra_bins, *needed.binaries, *encrypted.binaries),
        before=config.pre,
        after=config.post,
        files=(*needed.files, *encrypted.files),
        squashfs=False if args.no_squashfs else None,
        builder=args.builder or settings.BUILDER,
    )


def _release(args: argparse.Namespace) -> str:
    """Return the kernel release that an image is for."""
    return args.kernel or (args.modules_dir.absolute().name if args.modules_dir else os.uname().release)


def _modules_dir(args: argparse.Namespace) -> Path:
    return args.modules_dir or Path("/lib/modules") / _release(args)


def run_initramfs(args: argparse.Namespace) -> int:
    """Build the image."""
    console = Console(quiet=args.quiet)
    config = settings.configure(args)
    request = image_request(args, config, args.output)
    if args.into is not None:
        report = write_parts(request, args.into)
        _say_what_was_built(request, report, console)
        return 0
    if args.if_needed:
        why = stamp.stale(request)
        if why is None:
            console.say(f"{request.output}: current")
            return 0
        console.say(f"{request.output}: is built: {why}")
    for note in config.notes:
        console.say(note)
    report = builders.build(request)
    stamp.write(request, report)
    _say_what_was_built(request, report, console)
    return 0


def _say_what_was_built(request: ImageRequest, report: ImageReport, console: Console) -> None:
    kind = "squashfs" if report.squashfs else "plain"
    if request.builder != OWN:
        kind = f"made by {request.builder}, {kind} in it"
    console.say(
        f"{report.path}: {report.size / (1 << 20):.1f} MiB ({kind}), for {report.kernel_release}; "
        f"modules: {' '.join(report.modules) or 'none'}"
    )
    for place, path in request.files:
        if place == str(RECIPIENTS) and isinstance(path, Path):
            console.say(f"what it saves is encrypted to the keys in {path}: only their secret halves open it")
    for route in remote.routes_in(request.files):
        console.say(f"network: {route.line}")
    if report.missing_modules:
        console.say(
            f"{report.kernel_release} has no {' and no '.join(report.missing_modules)}, which the running kernel has "
            "for this target or its watchdog: test a crash before you rely on it"
        )


def run_load(args: argparse.Namespace) -> int:
    """Arm the machine."""
    console = Console(quiet=args.quiet)
    kexec.ready(args.kernel_image, args.image)
    request = crash_kernel(args, console)
    if args.if_needed and kexec.is_loaded(request):
        console.say("armed already, with the same kernel, image and command line")
        return 0
    loaded = kexec.load(request)
    console.say(
        f"armed: {loaded.kernel} with {loaded.image}, loaded by kexec -{'s' if loaded.syscall == 'file' else 'c'}"
    )
    names = parse(request.command_line).targets
    for doubt in (
        kexec.small_reservation(args.image, targets.memory_of(names)),
        watchdogs.lacking_driver(args.image),
        targets.lacking_modules(names, args.image),
    ):
        if doubt is not None:
            console.say(doubt)
    return 0


def crash_kernel(args: argparse.Namespace, console: Console) -> CrashKernel:
    """Return what ``load`` is to load."""
    config = settings.configure(args)
    line = args.command_line
    if line is None:
        mounted, path = settings.mounted_target(args.directory) if not args.target else ("", args.directory)
        names = [targets.named(target, console.say) for target in args.target] or [mounted]
        line = kexec.capture_command_line(
            config.base_line or kexec.RUNNING_COMMAND_LINE.read_text(encoding="utf-8"),
            names,
            args.path or str(path),
            args.final or settings.FINAL,
            args.failure or settings.FAILURE,
            f"{config.append} {args.append}",
            cpus=args.cpus or _cpus(args.image, names),
            boot_cpu=kexec.boot_cpu_apic_id(),
            keep=args.keep,
            free=args.free,
            watchdog=_watchdog_seconds(args),
            more=settings.save_words(args),
            dropped=config.remove,
        )
    return CrashKernel(args.kernel_image, args.image, line, args.syscall or settings.SYSCALL)


def _watchdog_seconds(args: argparse.Namespace) -> int:
    """Return what the capture kernel is told: nobody asks for resets where no watchdog runs."""
    if args.watchdog is not None:
        return int(args.watchdog)
    return watchdogs.DEFAULT_SECONDS if watchdogs.running() else 0


def _cpus(image: Path, names: Sequence[str]) -> int:
    """Return how many CPUs the reservation is enough for."""
    online, target = os.cpu_count() or 1, targets.memory_of(names)
    return estimate.cpus_for(kexec.reservation(), estimate.memory_of(image), online, target)


def run_estimate(args: argparse.Namespace) -> int:
    """Tell how much memory to reserve: measured in QEMU where that is possible, else computed."""
    if args.kernel_image is not None and not args.kernel_image.is_file():
        raise MeasureError(f"{args.kernel_image}: no such kernel; name another one with --kernel-image")
    config = settings.configure(args)
    with tempfile.TemporaryDirectory(prefix="vmcapture-") as scratch:
        image = args.image or builders.build(_to_measure(image_request(args, config, Path(scratch) / "image"))).path
        try:
            problem = None if estimate.is_image(image) else "no image that a kernel unpacks"
            size = estimate.memory_of(image)
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is not None:
            raise ImageError(f"{image}: {problem}; leave --image out, and one is built to be measured")
        # Another image, or one with modules that are named, need not save to where this machine does.
        here = not (args.target or args.image or args.module)
        names = [settings.mounted_target(args.directory)[0]] if here else args.target
        computed = estimate.estimate(size, args.cpus, targets.memory_of(names))
        measured, why_not = _measured(args, image, computed, Path(scratch))
    if args.json:
        found = computed.values()
        if measured is not None:
            found |= {"reservation": measured.run.reservation, "parameter": measured.parameter}
        values = measured.values() if measured is not None else None
        print(json.dumps({**found, "measured": values, "not_measured": why_not}, indent=2))
    else:
        print("\n".join(computed.lines() if measured is None else measured.lines()))
        if why_not is not None:
            print(f"  computed, not measured: {why_not}")
    return 0


def _to_measure(request: ImageRequest) -> ImageRequest:
    """Return the request without the administrator's own programs: a guest has not what they are for."""
    return replace(request, before=(), after=())


def _measured(
    args: argparse.Namespace, image: Path, computed: Estimate, scratch: Path
) -> tuple[Measurement | None, str | None]:
    """Return what was measured, or None and why nothing was."""
    if args.no_measure:
        return None, "--no-measure"
    release, modules_dir = _release(args), _modules_dir(args)
    request = measure.Request(
        kernel=args.kernel_image or default_kernel(release),
        modules_dir=modules_dir,
        image=image,
        image_memory=computed.image,
        target_memory=computed.target,
        first=computed.reservation,
        cpus=args.cpus,
        deadline=args.timeout,
    )
    try:
        return measure.measure(request, scratch / "measure", Console(quiet=args.quiet or args.no_progress).say), None
    except CaptureError as error:
        return None, printable(str(error))
    except OSError as error:
        return None, printable(f"{error.filename or 'system'}: {error.strerror or error}")


def run_unload(args: argparse.Namespace) -> int:
    """Disarm the machine."""
    kexec.unload()
    Console(quiet=args.quiet).say("not armed any more")
    return 0
