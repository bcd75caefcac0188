"""What holds for ``vmcapture initramfs`` and ``load``: their options, where those say nothing the configuration file.

The parser of the options leaves out what was not given (None, an empty list); here it is filled in, once, so that a
command looks at its arguments alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from capture.errors import UsageError
from initramfs import devices, directives, targets
from initramfs.config import Config, read_config
from initramfs.directives import Draft
from initramfs.errors import ImageError
from initramfs.image import OWN

CRASH_DIRECTORY = Path("/var/crash")
FINAL, FAILURE, SYSCALL, BUILDER = "reboot", "shell", "auto", OWN
"""What holds where neither an option nor a file says anything."""
_FIELDS = {"level": "levels", "builder": "image_builder"}
"""Options whose field is called otherwise."""
_SAVE_WORDS = ("level", "compress", "wait", "timeout", "deadline")
"""Options that go to the capture kernel as ``vmcapture.…=`` as they are."""
_ONE_VALUE = (
    "final", "failure", *_SAVE_WORDS, "keep", "free", "watchdog", "cpus", "syscall", "recipients", "sshkey", "builder",
)  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the file."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="take defaults from FILE, in the syntax of vmcapture.conf(5); default: /etc/vmcapture.conf, where that is "
        "there",
    )  # fmt: skip


def add_save_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``load`` that say how to save: what the directives of the same names take."""
    for name, metavar, what in (
        ("level", "LEVEL[,LEVEL...]", "dump level, or several (default: 31)"),
        ("compress", "CODEC", "zstd:auto (the default), zstd[:LEVEL], zlib[:LEVEL] or none"),
        ("wait", "SECONDS", "how long to wait for a target to appear (default: 30; a server: 60)"),
        ("timeout", "SECONDS", "without a byte moved, after which a target is given up; 0: never (default: 300)"),
        ("deadline", "SECONDS", "that the save may take, then it ends with what it has; 0: no limit (default: 0)"),
    ):
        parser.add_argument(f"--{name}", type=_directive(name), metavar=metavar, help=what)


def save_words(args: argparse.Namespace) -> dict[str, str]:
    """Return what those options say, by their words on the capture kernel's command line."""
    return {name: str(getattr(args, name)) for name in _SAVE_WORDS if getattr(args, name) is not None}


def _directive(name: str) -> Callable[[str], int | str]:
    """Return the type of an option that takes what the directive of its name takes."""

    def convert(text: str) -> int | str:
        draft = Draft()
        try:
            directives.apply(draft, name, text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name} ")) from None
        value: int | str
        (value,) = draft.values.values()
        return value

    return convert


def configure(args: argparse.Namespace) -> Config:
    """Fill in what the options leave open, and return the file's content.

    Options that the command does not have are left out. ``directory`` becomes where to save: on the target, and where
    none is named, on this machine, whose file system there is the target.

    Raises:
        ConfigError: something in the file is wrong.
        CaptureError: the root file system is to be a target, and cannot be one.
    """
    config = read_config(args.config)
    root_too = config.root_is_last_target and getattr(args, "failure", None) is None
    for name in _ONE_VALUE:
        if getattr(args, name, False) is None:
            setattr(args, name, getattr(config, _FIELDS.get(name, name)))
    args.target = args.target or list(config.targets)
    args.directory = Path(config.path or CRASH_DIRECTORY)
    if args.target and getattr(args, "path", "") is None:
        args.path = config.path
    if root_too:
        args.target = with_root(args.target, args.directory, config)
    return config


def with_root(named: list[str], directory: Path, config: Config) -> list[str]:
    """Return the targets that are named and the root file system as the last one.

    Raises:
        CaptureError: the capture kernel could not save to it, or not below the same path.
    """
    root = _root_target(config)
    if named:
        return [*named, root]
    if mounted_target(directory)[0] == root:
        return []  # the first one, and the last
    raise ImageError(
        f"{config.where('failure_action', 'dump_to_rootfs')}: failure_action dump_to_rootfs: {directory} is on another "
        "file system than /; name that one as the target, `ext4 UUID=…`, and a path for both"
    )


def _root_target(config: Config) -> str:
    """Return the root file system as a target."""
    where = config.where("failure_action", "dump_to_rootfs")
    mount = devices.mount_of(Path("/"))
    if not mount.device.startswith("/dev/") or mount.root != "/":
        raise ImageError(
            f"{where}: failure_action dump_to_rootfs: the root file system ({mount.device}, {mount.kind}) is no whole "
            "file system on a disk; write failure_action reboot, and name a second target instead"
        )
    return mounted_target(Path("/"))[0]


def mounted_target(directory: Path) -> tuple[str, str]:
    """Return what holds a directory of this machine, as the capture kernel finds it, and where on it that is.

    Raises:
        CaptureError: the capture kernel could not save there.
    """
    mount = devices.mount_of(directory)
    return targets.named_mount(mount), devices.path_on_device(directory, mount)
