"""``/etc/vmcapture.conf``: what the machine's administrator wants of a save, in one place.

The syntax is kdump.conf's (kdump.conf(5) of kdump-utils): a directive and its value a line, ``#`` begins a comment,
also behind a value; a value may stand in double quotes. kdump.conf's directives keep their names and their meaning, its
defaults included (``failure_action reboot``); ours are added, and several targets may be named.

Nobody else reads that file: it is parsed here into one ``Config``, or refused with one line for each thing that is
wrong in it. What this machine can know of the values (a file that is not there) is ``initramfs.config_check``'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from capture.errors import UsageError
from initramfs import directives
from initramfs.directives import Draft

CONFIG = Path("/etc/vmcapture.conf")
MAX_SIZE = 1 << 20
_BLANKS = " \t"


class ConfigError(UsageError):
    """What is wrong with a configuration file: a line for each thing."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self._lines = tuple(lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines, in the order of the file."""
        return self._lines


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says. None and empty: it says nothing, and the command's own default holds."""

    file: Path | None = None
    """Where this was read; None: there is no file."""
    targets: tuple[str, ...] = ()
    """In order, in the words of ``vmcapture.target=``: ``UUID=…``, ``/dev/…``, ``nfs:SERVER:/EXPORT`` …"""
    root_is_last_target: bool = False
    """``failure_action dump_to_rootfs``: the root file system comes after all of them."""
    path: str | None = None
    """Directory on the target; without targets, of the running system."""
    final: str | None = None
    failure: str | None = None
    levels: str | None = None
    """Dump levels as in ``vmcapture.level=``: ``31``, or ``1,17,31``."""
    compress: str | None = None
    keep: int | None = None
    free: str | None = None
    watchdog: int | None = None
    """This and the next three in seconds."""
    timeout: int | None = None
    deadline: int | None = None
    wait: int | None = None
    cpus: int | None = None
    syscall: str | None = None
    recipients: Path | None = None
    sshkey: Path | None = None
    """The private key for ``ssh`` targets."""
    pre: tuple[Path, ...] = ()
    """Programs to run before the save (``kdump_pre``), in order; ``post``: after it."""
    post: tuple[Path, ...] = ()
    image_builder: str | None = None
    """Who makes the image: this program, or the distribution's builder with our parts (initramfs.builders)."""
    extra_bins: tuple[Path, ...] = ()
    extra_modules: tuple[str, ...] = ()
    append: str = ""
    """More for the capture kernel's command line."""
    base_line: str | None = None
    """What that command line is made from, instead of the running kernel's."""
    remove: tuple[str, ...] = ()
    """Names of kernel parameters that are not taken over from it."""
    notify: tuple[tuple[str, str], ...] = ()
    """Whom to tell of a crash after the reboot: (``mail``, ADDRESS), (``webhook``, URL) or (``command``, PATH)."""
    notes: tuple[str, ...] = ()
    """Lines on what was understood and needs nothing, or means something else here."""
    filesystems: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Target → the type of its file system, where the file names one."""
    places: Mapping[tuple[str, str], int] = field(default_factory=dict, compare=False, repr=False)
    """(directive, value) → line number; targets under ``target``."""

    def where(self, directive: str, value: object = None) -> str:
        """Return ``FILE:LINE`` of a directive (of its first line, when no value is given), for a message."""
        for (name, text), line in self.places.items():
            if name == directive and value in (None, text, Path(text)):
                return f"{self.file}:{line}"
        return str(self.file)


def read_config(file: Path | None = None) -> Config:
    """Return what ``file`` says; by default what CONFIG says, or a Config that says nothing where there is none.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    if file is None:
        if not CONFIG.exists():
            return Config()
        file = CONFIG
    return parse(read_text(file), file)


def read_text(file: Path) -> str:
    """Return the text of a configuration file, ours or another program's.

    Raises:
        ConfigError: it cannot be read, or is nothing that anybody has written.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_SIZE + 1)
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}; name another file"]) from None
    if len(content) > MAX_SIZE:
        raise ConfigError([f"{file}: more than {MAX_SIZE >> 20} MiB: this is no configuration file"])
    if b"\0" in content:
        raise ConfigError([f"{file}: not a text: this is no configuration file"])
    return content.decode("utf-8", errors="surrogateescape")


def parse(text: str, file: Path) -> Config:
    """Return what the text of ``file`` says.

    Raises:
        ConfigError: something in it is wrong; all that is, each with its line.
    """
    draft = Draft()
    problems: list[tuple[int, str]] = []
    for number, name, value in directive_lines(text):
        draft.line = number
        try:
            directives.apply(draft, name, value)
        except UsageError as error:
            problems.append((number, str(error)))
    problems += directives.contradictions(draft)
    if problems:
        raise ConfigError([f"{file}:{number}: {problem}" for number, problem in sorted(problems, key=lambda it: it[0])])
    values = draft.values
    values.setdefault("final", "reboot")
    values.setdefault("failure", values["final"] if values.get("root_is_last_target") else "reboot")
    return Config(
        file=file,
        notes=tuple(f"{file}:{number}: {note}" for number, note in draft.notes),
        filesystems=draft.filesystems,
        places=draft.places,
        **values,
    )


def directive_lines(text: str) -> list[tuple[int, str, str]]:
    """Return (line number, directive, value) for each line that has one."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(_BLANKS + "\r")
        if not line or line.startswith("#"):
            continue
        name, value = re.fullmatch(r"([^ \t]+)[ \t]*(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        value = value.partition("#")[0].strip(_BLANKS)
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1].strip(_BLANKS)
        found.append((number, name, value))
    return found
