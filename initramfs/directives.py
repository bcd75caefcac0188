"""The directives of ``/etc/vmcapture.conf``: what each of them takes, and what it comes to.

A directive is a function that puts its value into the draft, or raises a UsageError whose line says what is wrong and
what to do. kdump.conf's directives without a counterpart are here as well, with an answer each: nothing is ignored that
was not said.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capture.boot import nfs, ssh
from capture.boot.config import ACTIONS, MAX_DEADLINE, MAX_KEEP, MAX_WAIT, MAX_WATCHDOG, MIN_WATCHDOG
from capture.boot.room import parse_floor
from capture.errors import UsageError
from capture.levels import parse_levels
from initramfs import collector
from initramfs.kexec import SYSCALLS

DUMP_TO_ROOT = "dump_to_rootfs"
BUILDERS = ("vmcapture", "initramfs-tools", "dracut")
"""Who may make the image: our own, and those of initramfs.builders."""
FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "minix")
NOTIFY = ("mail", "webhook", "command")
MAX_CPUS = 8192
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\$?")


class Draft:
    """What the lines up to here came to. ``line`` is the number of the present one."""

    def __init__(self) -> None:
        self.line = 0
        self.values: dict[str, Any] = {}
        self.notes: list[tuple[int, str]] = []
        self.filesystems: dict[str, str] = {}
        self.places: dict[tuple[str, str], int] = {}

    def note(self, text: str) -> None:
        """Keep a line on the present directive."""
        self.notes.append((self.line, text))

    def add(self, field: str, directive: str, *values: Any) -> None:  # noqa: ANN401
        """Add to a field that may have several values."""
        for value in values:
            there: tuple[Any, ...] = self.values.get(field, ())
            if value in there:
                shown = " ".join(value) if isinstance(value, tuple) else value
                self.note(f"{directive} {shown}: there already")
            else:
                self.values[field] = (*there, value)
                self.places[directive, str(value)] = self.line

    def first_line_of(self, *directives: str) -> int:
        """Return the first line of these directives; 0 where there is none."""
        return min((line for (name, _), line in self.places.items() if name in directives), default=0)


Directive = Callable[[Draft, str, str], None]
"""(draft, name of the directive, its value)."""


def apply(draft: Draft, name: str, value: str) -> None:
    """Put one line into the draft.

    Raises:
        UsageError: there is no such directive, it was there before, or its value is wrong.
    """
    if name not in DIRECTIVES:
        raise UsageError(_unknown(name))
    if not all(letter.isprintable() for letter in value):
        raise UsageError(f"{name}: a character in its value cannot be printed; write it anew")
    if not value:
        raise UsageError(f"{name}: its value is missing: {name} {DIRECTIVES[name][0]}")
    if name not in REPEATED and (before := draft.first_line_of(name)):
        raise UsageError(f"{name}: already on line {before}; leave one of them")
    draft.places.setdefault((name, value), draft.line)
    DIRECTIVES[name][1](draft, name, value)


def contradictions(draft: Draft) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) for what goes well alone, and not together."""
    for one, other, why in (
        ("failure_action", "default", "they are the same directive; leave failure_action"),
        ("level", "core_collector", "both name the dump level; leave one of them"),
        ("compress", "core_collector", "both name the compression; leave one of them"),
    ):
        lines = draft.first_line_of(one), draft.first_line_of(other)
        if all(lines):
            yield max(lines), f"{one} and {other}: {why}"
    if all((name, "1") in draft.places for name in ("force_rebuild", "force_no_rebuild")):
        line = max(draft.places[name, "1"] for name in ("force_rebuild", "force_no_rebuild"))
        yield line, "force_rebuild 1 and force_no_rebuild 1: they forbid one another; take one of them out"


def _unknown(name: str) -> str:
    word, equals, _ = name.partition("=")
    near = difflib.get_close_matches(word.lower().replace("-", "_"), DIRECTIVES, 1)
    if equals and word.isupper():
        return f"{name}: this is a line of a shell file; vmcapture config import FILE makes directives of it"
    if equals and near:
        return f"{name}: a blank stands between a directive and its value: {near[0]} {DIRECTIVES[near[0]][0]}"
    if near:
        return f"{name}: no such directive; is {near[0]} meant?"
    return f"{name}: no such directive; vmcapture.conf(5) names them all"


# --- targets --------------------------------------------------------------------------------------------------------


def _add_target(draft: Draft, name: str, target: str) -> None:
    _refuse_blanks(name, target)
    draft.add("targets", "target", target)


def _refuse_blanks(name: str, target: str, what_to_do: str = "name it by its UUID") -> None:
    if re.search(r"[\s\"]", target):
        raise UsageError(f"{name} {target}: blanks and quotes do not survive a kernel command line; {what_to_do}")


def _local(name: str, value: str) -> str:
    tag, equals, rest = value.partition("=")
    if tag in ("UUID", "LABEL") and equals:
        rest = rest.strip('"')
        if not rest:
            raise UsageError(f"{name} {value}: {tag} of which file system? blkid shows them")
        return f"{tag}={rest}"
    if re.fullmatch(r"/dev/.*[^/]", value) and ".." not in value.split("/"):
        return value
    raise UsageError(f"{name} {value}: a file system is named UUID=…, LABEL=… or /dev/…; blkid shows them")


def _filesystem(draft: Draft, name: str, value: str) -> None:
    target = _local(name, value)
    _add_target(draft, name, target)
    draft.filesystems.setdefault(target, name)


def _raw(draft: Draft, name: str, value: str) -> None:
    tag, equals, rest = value.partition("=")
    if not (tag == "PARTUUID" and equals and rest) and not re.fullmatch(r"/dev/.*[^/]", value):
        raise UsageError(f"{name} {value}: a partition is named PARTUUID=… or /dev/…; lsblk -o +PARTUUID shows them")
    _add_target(draft, name, f"raw:{value}")


def _nfs(draft: Draft, name: str, value: str) -> None:
    _refuse_blanks(name, value, "write SERVER:/EXPORT and nothing behind it")
    try:
        export = nfs.parse(f"nfs:{value}")
    except UsageError:
        raise UsageError(f"{name} {value}: an export is named SERVER:/EXPORT, an IPv6 server in brackets") from None
    _check_host(name, export.server)
    _add_target(draft, name, f"nfs:{value}")


def _ssh(draft: Draft, name: str, value: str) -> None:
    _refuse_blanks(name, value, "write USER@HOST[:PORT] and nothing behind it")
    user, _, host = value.rpartition("@")
    if host.count(":") > 1 and not host.startswith("["):  # as kdump.conf has it
        host = f"[{host}]"
    try:
        login = ssh.parse(f"ssh:{user}@{host}")
    except UsageError:
        login = None
    if login is None or not _USER.fullmatch(login.user):
        raise UsageError(
            f"{name} {value}: an account is named USER@HOST[:PORT], a port is a number from 1 to 65535, an IPv6 "
            "address with a port stands in brackets"
        )
    _check_host(name, login.host)
    _add_target(draft, name, ssh.text_of(login))


def _virtiofs(draft: Draft, name: str, value: str) -> None:
    if not re.fullmatch(r"[^\s/,=]+", value):
        raise UsageError(f"{name} {value}: the tag of a virtiofs device has no blank, comma or slash in it")
    _add_target(draft, name, f"virtiofs:{value}")


_KINDS: dict[str, Directive] = {"raw": _raw, "nfs": _nfs, "ssh": _ssh, "virtiofs": _virtiofs}


def _target(draft: Draft, name: str, value: str) -> None:
    kind, colon, rest = value.partition(":")
    if colon and "=" not in kind and not kind.startswith("/"):
        if kind not in _KINDS:
            near = difflib.get_close_matches(kind, _KINDS, 1)
            meant = f"; is {near[0]}: meant?" if near else f": {', '.join(f'{known}:' for known in _KINDS)} are known"
            raise UsageError(f"{name} {value}: no such kind of target{meant}")
        _KINDS[kind](draft, f"{name} {kind}:", rest)
    else:
        _add_target(draft, name, _local(name, value))


def _check_host(name: str, host: str) -> None:
    """Refuse what nobody would call a host, though the capture kernel would look it up."""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        if ":" in host or not _HOST.fullmatch(host):
            raise UsageError(f"{name} {host}: no name or address of a host") from None


# --- values ---------------------------------------------------------------------------------------------------------


def _number(field: str, low: int, high: int, *, also: Sequence[int] = ()) -> Directive:
    def take(draft: Draft, name: str, value: str) -> None:
        if re.fullmatch("[0-9]{1,9}", value) and (low <= int(value) <= high or int(value) in also):
            draft.values[field] = int(value)
            return
        zero = "".join(f"{number}, or " for number in also)
        raise UsageError(f"{name} {value}: {zero}a number from {low} to {high} is needed")

    return take


def _choice(field: str, allowed: Sequence[str]) -> Directive:
    def take(draft: Draft, name: str, value: str) -> None:
        if value not in allowed:
            raise UsageError(_not_one_of(name, value, allowed))
        draft.values[field] = value

    return take


def _not_one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(value.lower(), allowed, 1)
    meant = f"; is {near[0]} meant?" if near else ""
    return f"{name} {value}: not one of {', '.join(allowed)}{meant}"


def _failure(draft: Draft, name: str, value: str) -> None:
    if value not in (*ACTIONS, DUMP_TO_ROOT):
        raise UsageError(_not_one_of(name, value, (*ACTIONS, DUMP_TO_ROOT)))
    if name == "default":
        draft.note("default is an old name: write failure_action")
    if value == DUMP_TO_ROOT:
        draft.values["root_is_last_target"] = True
    else:
        draft.values["failure"] = value


def _path(draft: Draft, name: str, value: str) -> None:
    value = re.sub("/+", "/", value)
    if not value.startswith("/") or ".." in value.split("/"):
        raise UsageError(f"{name} {value}: a directory is named from / on, without ..")
    if re.search(r"[\s\"]", value):
        raise UsageError(f"{name} {value}: blanks and quotes do not survive a kernel command line; name another one")
    draft.values["path"] = value.rstrip("/") or "/"


def _level(draft: Draft, name: str, value: str) -> None:
    try:
        draft.values["levels"] = ",".join(map(str, parse_levels(value)))
    except UsageError as error:
        raise UsageError(f"{name} {error}") from None


def _compress(draft: Draft, name: str, value: str) -> None:
    from capture.dumpfile.codec import codec  # NumPy with it, for which `vmcapture status` does not wait

    try:
        codec(value)
    except UsageError as error:
        raise UsageError(f"{name} {str(error).removeprefix('-c ')}") from None
    draft.values["compress"] = value


def _free(draft: Draft, name: str, value: str) -> None:
    try:
        parse_floor(value)
    except UsageError as error:
        raise UsageError(f"{name} {error}") from None
    draft.values["free"] = value


def _absolute(name: str, value: str) -> Path:
    if not value.startswith("/") or value.endswith("/") or ".." in value.split("/"):
        raise UsageError(f"{name} {value}: a file is named from / on, without ..")
    return Path(value)


def _file(field: str) -> Directive:
    def take(draft: Draft, name: str, value: str) -> None:
        draft.values[field] = _absolute(name, value)

    return take


def _program(field: str) -> Directive:
    def take(draft: Draft, name: str, value: str) -> None:
        if re.search(r"\s", value):
            raise UsageError(f"{name} {value}: one program without arguments; write a script for more")
        draft.add(field, name, _absolute(name, value))

    return take


def _bins(draft: Draft, name: str, value: str) -> None:
    draft.add("extra_bins", name, *(_absolute(name, word) for word in value.split()))


def _modules(draft: Draft, name: str, value: str) -> None:
    for word in value.split():
        if not _MODULE.fullmatch(word):
            raise UsageError(f"{name} {word}: no name of a kernel module (no path, no ending)")
    draft.add("extra_modules", name, *value.split())


def _append(draft: Draft, _name: str, value: str) -> None:
    draft.values["append"] = f"{draft.values.get('append', '')} {value}".strip()


def _base_line(draft: Draft, _name: str, value: str) -> None:
    draft.values["base_line"] = value


def _remove(draft: Draft, name: str, value: str) -> None:
    draft.add("remove", name, *value.split())


def _notify(draft: Draft, name: str, value: str) -> None:
    kind, _, whom = value.partition(" ")
    whom = whom.strip()
    if kind not in NOTIFY:
        raise UsageError(_not_one_of(name, kind, NOTIFY))
    if kind == "mail" and not re.fullmatch(r"[^\s@,;<>-][^\s@,;<>]*(@[^\s@,;<>]+)?", whom):
        raise UsageError(f"{name} mail {whom}: an address is needed, root or admin@example.org")
    if kind == "webhook" and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", whom):
        raise UsageError(f"{name} webhook {whom}: an address is needed, https://HOST/PATH")
    if kind == "command":
        _absolute(f"{name} command", whom)
    draft.add("notify", name, (kind, whom))
    draft.places[name, whom] = draft.line


def _core_collector(draft: Draft, _name: str, value: str) -> None:
    found = collector.core_collector(value)
    draft.values |= {"levels": found.levels, "compress": found.compress}
    for note in found.notes:
        draft.note(f"core_collector: {note}")


# --- what has no counterpart ----------------------------------------------------------------------------------------


def _switch(allowed: Sequence[str], why: str) -> Directive:
    """Return a directive that needs nothing: its value is checked, and what it would do is said."""

    def take(draft: Draft, name: str, value: str) -> None:
        if value not in allowed:
            raise UsageError(_not_one_of(name, value, allowed))
        draft.note(f"{name} {value}: {why}")

    return take


def _refused(what_to_do: str) -> Directive:
    def take(_draft: Draft, name: str, _value: str) -> None:
        raise UsageError(f"{name}: {what_to_do}")

    return take


def _fence_arguments(draft: Draft, name: str, _value: str) -> None:
    draft.note(f"{name}: nothing without fence_kdump_nodes")


def _dracut(draft: Draft, name: str, value: str) -> None:
    """Follow what dracut's options ask for where it can be had here: a target, modules, programs."""
    try:
        words = shlex.split(value)
    except ValueError:
        raise UsageError(f"{name}: a quote is missing its other half") from None
    while words:
        option, equals, given = words.pop(0).partition("=")
        if option in ("--mount", "--add-drivers", "--force-drivers", "--install", "--omit-drivers", "--omit"):
            if not equals and not words:
                raise UsageError(f"{name}: {option}: its value is missing")
            given = given if equals else words.pop(0)
        if option == "--mount":
            fields = given.split()
            kind = fields[2] if len(fields) > 2 else ""
            taken = DIRECTIVES["nfs" if kind.startswith("nfs") else kind][1] if _mountable(kind) else None
            if taken is None:
                raise UsageError(f"{name}: --mount {given}: name the target by its own directive, `ext4 UUID=…`")
            taken(draft, "nfs" if kind.startswith("nfs") else kind, fields[0])
        elif option in ("--add-drivers", "--force-drivers"):
            _modules(draft, "extra_modules", given)
        elif option == "--install":
            _bins(draft, "extra_bins", given)
        elif option in ("--omit-drivers", "--omit"):
            draft.note(f"{name}: {option} {given} is not needed: the image has only what the target needs")
        else:
            raise UsageError(
                f"{name}: {option}: dracut's options are not taken over; for modules and programs there are "
                "extra_modules and extra_bins"
            )


def _mountable(kind: str) -> bool:
    return kind in (*FILESYSTEMS, "nfs", "nfs4", "virtiofs")


_WHEN_BUILT = "vmcapture arm builds the image when what it is made from has changed, with --force in any case"
_FILE_SYSTEM_HINT = "UUID=…|LABEL=…|/dev/…"
DIRECTIVES: dict[str, tuple[str, Directive]] = {
    **dict.fromkeys(FILESYSTEMS, (_FILE_SYSTEM_HINT, _filesystem)),
    "target": ("UUID=…|LABEL=…|/dev/…|KIND:…", _target),
    "raw": ("PARTUUID=…|/dev/…", _raw),
    "nfs": ("SERVER:/EXPORT", _nfs),
    "ssh": ("USER@HOST[:PORT]", _ssh),
    "sshkey": ("FILE", _file("sshkey")),
    "virtiofs": ("TAG", _virtiofs),
    "path": ("DIRECTORY", _path),
    "core_collector": ("makedumpfile OPTIONS", _core_collector),
    "level": ("LEVEL[,LEVEL…]", _level),
    "compress": ("zstd:auto|zstd[:LEVEL]|zlib[:LEVEL]|none", _compress),
    "failure_action": ("|".join((*ACTIONS, DUMP_TO_ROOT)), _failure),
    "default": ("|".join((*ACTIONS, DUMP_TO_ROOT)), _failure),
    "final_action": ("|".join(ACTIONS), _choice("final", ACTIONS)),
    "kdump_pre": ("PROGRAM", _program("pre")),
    "kdump_post": ("PROGRAM", _program("post")),
    "extra_bins": ("PROGRAM…", _bins),
    "extra_modules": ("MODULE…", _modules),
    "keep": ("N", _number("keep", 1, MAX_KEEP)),
    "free": ("10G|10%", _free),
    "wait": ("SECONDS", _number("wait", 0, MAX_WAIT)),
    "timeout": ("SECONDS", _number("timeout", 0, MAX_WAIT)),
    "deadline": ("SECONDS", _number("deadline", 0, MAX_DEADLINE)),
    "watchdog": ("SECONDS", _number("watchdog", MIN_WATCHDOG, MAX_WATCHDOG, also=(0,))),
    "cpus": ("N", _number("cpus", 1, MAX_CPUS)),
    "syscall": ("|".join(SYSCALLS), _choice("syscall", SYSCALLS)),
    "image_builder": ("|".join(BUILDERS), _choice("image_builder", BUILDERS)),
    "recipients": ("FILE", _file("recipients")),
    "append": ("WORDS", _append),
    "command_line_base": ("WORDS", _base_line),
    "command_line_remove": ("NAMES", _remove),
    "notify": ("mail ADDRESS|webhook URL|command PROGRAM", _notify),
    # kdump.conf's own that need nothing here, or cannot be had.
    "auto_reset_crashkernel": (
        "yes|no",
        _switch(("yes", "no"), "crashkernel= is never changed here; vmcapture estimate says what it should be"),
    ),
    "force_rebuild": ("0|1", _switch(("0", "1"), _WHEN_BUILT)),
    "force_no_rebuild": ("0|1", _switch(("0", "1"), _WHEN_BUILT)),
    "dracut_args": ("OPTIONS", _dracut),
    "fence_kdump_args": ("OPTIONS", _fence_arguments),
    "fence_kdump_nodes": (
        "NODES",
        _refused(
            "the capture kernel tells no cluster by itself; call fence_kdump_send from a script: kdump_pre SCRIPT, and "
            "extra_bins with its path"
        ),
    ),
    "kdump_emergency": (
        "PROGRAM",
        _refused("there is no emergency mode; use kdump_post, which runs after a failure too, with the status as $1"),
    ),
    "net": ("SERVER:/EXPORT|USER@HOST", _refused("write nfs SERVER:/EXPORT, or ssh USER@HOST")),
    "options": (
        "MODULE OPTIONS",
        _refused("the image takes over modprobe.d(5); or write append MODULE.OPTION=VALUE"),
    ),
    "link_delay": ("SECONDS", _refused("write wait SECONDS, how long to wait for a target")),
    "disk_timeout": ("SECONDS", _refused("write wait SECONDS, how long to wait for a target")),
    "debug_mem_level": ("0-3", _refused("take it out; manifest.json says how much memory was left")),
    "blacklist": ("MODULES", _refused("write append module_blacklist=NAME,NAME; only what the target needs is loaded")),
}  # fmt: skip
"""Name → (what its value looks like, what it does)."""

TARGETS = frozenset({*FILESYSTEMS, "target", "raw", "nfs", "ssh", "virtiofs"})
REPEATED = frozenset(
    {
        *TARGETS, "kdump_pre", "kdump_post", "extra_bins",
        "extra_modules", "append", "command_line_remove", "notify",
    }
)  # fmt: skip
"""Those that may be there several times."""
