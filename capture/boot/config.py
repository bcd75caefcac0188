"""What the capture kernel's command line asks of us: ``vmcapture.KEY=VALUE`` words.

| word | meaning | default |
| --- | --- | --- |
| ``vmcapture.target=`` | where to save (capture.boot.targets: ``LABEL=``, ``UUID=``, a device, ``KIND:…``); may be
repeated: the next ones are taken when nothing, or not all, could be saved on those before | none |
| ``vmcapture.path=`` | directory on that file system | /var/crash |
| ``vmcapture.final=`` | what to do once all is saved | reboot |
| ``vmcapture.failure=`` | what to do when something failed | shell |
| ``vmcapture.wait=`` | seconds to wait for a target to appear, from the job's start on; for a server from its turn
on | 30; for a server 60 |
| ``vmcapture.timeout=`` | seconds without a byte moved, after which a disk is given up. 0: never | 300 |
| ``vmcapture.level=`` | dump level 0 to 31; or several, ``1,17,31``: the first that fits | 31 |
| ``vmcapture.compress=`` | zstd:auto, zstd[:N], zlib[:N] or none | zstd:auto |
| ``vmcapture.deadline=`` | seconds from the job's start on; then it ends with what it has. 0: no limit | 0 |
| ``vmcapture.watchdog=`` | seconds until a watchdog resets the machine when it hangs, 10 to 3600. 0: never | 0 |
| ``vmcapture.keep=`` | crashes of this host that stay, the new one included | all |
| ``vmcapture.free=`` | room to be left, 10G or 10%: older crashes of this host go until it is | 0 |

Nothing is removed that nobody said may go: an old dump may be the only one of its kind.

A word that makes no sense is said on the console and replaced by its default: at this point nobody can mend it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from capture.errors import UsageError
from capture.levels import parse_levels
from capture.options import SAVE_COMPRESSION

if TYPE_CHECKING:
    from capture.boot.room import Floor

_Default = TypeVar("_Default", int, int | None)

ACTIONS = ("reboot", "poweroff", "halt", "shell")
_PREFIX = "vmcapture."
MAX_WAIT = 3600
MAX_DEADLINE = 7 * 24 * 3600
MAX_KEEP = 9999
MIN_WATCHDOG, MAX_WATCHDOG = 10, 3600  # less than a disk's slow moment; more than what a person would wait


class BootConfig(NamedTuple):
    """``keep`` and ``free`` None: nothing is removed. ``problems`` are words that were not understood.

    ``wait`` None: as long as is usual for a target of its kind, ``capture.boot.targets.patience``.
    """

    targets: tuple[str, ...] = ()
    path: str = "/var/crash"
    final: str = "reboot"
    failure: str = "shell"
    wait: int | None = None
    timeout: int = 300
    levels: tuple[int, ...] = (31,)
    compression: str = SAVE_COMPRESSION
    deadline: int = 0
    watchdog: int = 0
    keep: int | None = None
    free: Floor | None = None
    problems: tuple[str, ...] = ()


def parse(command_line: str) -> BootConfig:
    """Parse a kernel command line. Never raises; the last of two equal words counts, but every target does."""
    words: dict[str, str] = {}
    targets: list[str] = []
    problems: list[str] = []
    for word in command_line.split():
        key, separator, value = word.partition("=")
        if key.startswith(_PREFIX):
            if separator and key == f"{_PREFIX}target":
                targets += [value] if value and value not in targets else []
            elif separator:
                words[key.removeprefix(_PREFIX)] = value
            else:
                problems.append(f"{word}: has no value, ignored")
    default = BootConfig()

    def action(key: str, fallback: str) -> str:
        value = words.pop(key, fallback)
        if value in ACTIONS:
            return value
        problems.append(f"vmcapture.{key}={value}: not one of {', '.join(ACTIONS)}; taking {fallback}")
        return fallback

    def number(key: str, fallback: _Default, allowed: Container[int]) -> int | _Default:
        value = words.pop(key, None)
        if value is None:
            return fallback
        if re.fullmatch("[0-9]{1,9}", value) and int(value) in allowed:
            return int(value)
        taken = "the default" if fallback is None else fallback
        problems.append(f"vmcapture.{key}={value}: not possible; taking {taken}")
        return fallback

    def compression() -> str:
        value = words.pop("compress", None)
        if value is None:
            return default.compression
        from capture.dumpfile.codec import codec  # takes time to import: not before the log is saved

        try:
            codec(value)
        except UsageError as error:
            problems.append(f"vmcapture.compress={value}: {error}; taking {default.compression}")
            return default.compression
        return value

    def levels() -> tuple[int, ...]:
        value = words.pop("level", None)
        try:
            return default.levels if value is None else parse_levels(value)
        except UsageError:
            fallback = ",".join(map(str, default.levels))
            problems.append(f"vmcapture.level={value}: not possible; taking {fallback}")
            return default.levels

    def keep() -> int | None:
        value = words.pop("keep", None)
        if value is None or (re.fullmatch("[0-9]{1,9}", value) and 1 <= int(value) <= MAX_KEEP):
            return default.keep if value is None else int(value)
        problems.append(f"vmcapture.keep={value}: not a number from 1 to {MAX_KEEP}; keeping all")
        return default.keep

    def free() -> Floor | None:
        value = words.pop("free", None)
        if value is None:
            return default.free
        from capture.boot.room import parse_floor  # not needed before the end of the save, where anybody asks for it

        try:
            return parse_floor(value)
        except UsageError as error:
            problems.append(f"vmcapture.free={error}; removing nothing for it")
            return default.free

    path = words.pop("path", default.path)
    if not path.startswith("/") or ".." in path.split("/"):
        problems.append(f"vmcapture.path={path}: not an absolute path; taking {default.path}")
        path = default.path
    config = BootConfig(
        targets=tuple(targets),
        path=path,
        final=action("final", default.final),
        failure=action("failure", default.failure),
        wait=number("wait", default.wait, range(MAX_WAIT + 1)),
        timeout=number("timeout", default.timeout, range(MAX_WAIT + 1)),
        levels=levels(),
        compression=compression(),
        deadline=number("deadline", default.deadline, range(MAX_DEADLINE + 1)),
        watchdog=number("watchdog", default.watchdog, (0, *range(MIN_WATCHDOG, MAX_WATCHDOG + 1))),
        keep=keep(),
        free=free(),
    )
    problems += [f"vmcapture.{key}=: no such option, ignored" for key in words]
    return config._replace(problems=tuple(problems))
