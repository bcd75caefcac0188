"""What this machine can know of a configuration: whether what it names is there, while somebody can still mend it.

Each finding is a line with the file, the line in it, and the remedy, as the parser's are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from capture.dumpfile.encrypted import check_recipients
from capture.errors import CaptureError
from initramfs import builders, devices, scripts, settings, targets
from initramfs.config import Config, ConfigError
from initramfs.modules import ModuleTree, read_tree

_OF_ONE_FAMILY = frozenset({"ext2", "ext3", "ext4"})
"""File systems that one driver mounts."""


def check(config: Config, modules_dir: Path) -> None:
    """Refuse a configuration that this machine cannot follow.

    Raises:
        ConfigError: with all that is wrong.
    """
    _refuse([*_target_problems(config), *_image_problems(config, modules_dir), *_builder_problems(config)])


def check_image(config: Config, modules_dir: Path) -> None:
    """As ``check``, and of what goes into an image only: its targets are asked when their modules are looked for.

    Raises:
        ConfigError: with all that is wrong.
    """
    _refuse(list(_image_problems(config, modules_dir)))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _target_problems(config: Config) -> Iterator[str]:
    for target in config.targets:
        where = config.where("target", target)
        try:
            targets.needed_by(target)
        except CaptureError as error:
            yield f"{where}: {error}"
            continue
        problem = _other_filesystem(target, config.filesystems.get(target))
        if problem is not None:
            yield f"{where}: {problem}"
    directory = Path(config.path or settings.CRASH_DIRECTORY)
    if not config.targets:
        try:
            targets.needed_by_mount(devices.mount_of(directory))
        except CaptureError as error:
            yield f"{config.where('path')}: no target is named, and {directory} is no place for a dump: {error}"
            return
    if config.root_is_last_target:
        try:
            settings.with_root(list(config.targets), directory, config)
        except CaptureError as error:
            named = f"{config.where('failure_action', 'dump_to_rootfs')}: "
            yield named + str(error).removeprefix(named)


def _other_filesystem(target: str, named: str | None) -> str | None:
    """Return a line when the file system of a target is not of the type that the file names."""
    node = devices.find_device(target) if named is not None else None
    found = devices.filesystem_of(str(node)) if node is not None else None
    if found in (None, named) or {found, named} <= _OF_ONE_FAMILY:
        return None
    return f"{named} {target}: there is {found} on it; write {found} {target}"


def _image_problems(config: Config, modules_dir: Path) -> Iterator[str]:
    """Yield a line for each thing that the image cannot hold."""
    for directive, programs in (
        ("kdump_pre", config.pre),
        ("kdump_post", config.post),
        ("extra_bins", config.extra_bins),
    ):
        for program in programs:
            refusal = scripts.refusal(program)
            if refusal is not None:
                yield f"{config.where(directive, program)}: {directive} {program}: {refusal}"
    if config.extra_modules:
        yield from _module_problems(config, modules_dir)
    if config.recipients is not None:
        try:
            check_recipients(config.recipients)
        except CaptureError as error:
            yield f"{config.where('recipients')}: {error}"
    if config.sshkey is not None and any(target.startswith("ssh:") for target in config.targets):
        yield from _key_problems(config, config.sshkey)
    for kind, whom in config.notify:
        refusal = scripts.refusal(Path(whom)) if kind == "command" else None
        if refusal is not None:
            yield f"{config.where('notify', whom)}: notify command {whom}: {refusal}"


def _builder_problems(config: Config) -> Iterator[str]:
    if config.image_builder in builders.DISTRIBUTIONS:
        try:
            builders.distribution(config.image_builder)
        except CaptureError as error:
            yield f"{config.where('image_builder')}: image_builder {config.image_builder}: {error}"


def _module_problems(config: Config, modules_dir: Path) -> Iterator[str]:
    try:
        tree = read_tree(modules_dir)
    except CaptureError as error:
        yield f"{config.where('extra_modules')}: extra_modules: {error}"
        return
    for name in config.extra_modules:
        if not tree.lookup(name):
            yield f"{config.where('extra_modules', name)}: extra_modules {name}: {_no_module(name, tree)}"


def _no_module(name: str, tree: ModuleTree) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), tree.files, 1)
    return f"{tree.directory} has no such module" + (f"; is {near[0]} meant?" if near else "; lsmod names those in use")


def _key_problems(config: Config, key: Path) -> Iterator[str]:
    """OpenSSH uses no private key that others may read (ssh(1), FILES)."""
    target = next(target for target in config.targets if target.startswith("ssh:"))
    where = config.where("sshkey")
    if not key.is_file():
        yield (
            f"{where}: sshkey {key}: no such file; make one, ssh-keygen -t ed25519 -N '' -f {key}, and send it there, "
            f"ssh-copy-id -i {key} {target.removeprefix('ssh:')}"
        )
    elif key.stat().st_mode & 0o077:
        yield f"{where}: sshkey {key}: others may read it: chmod 600 {key}"
