"""Makes ``/etc/vmcapture.conf`` of what other programs were told: Debian's kdump-tools, Fedora's kdump-utils.

Each setting becomes a directive, or is named with the reason why not. Nothing is run, and nothing is taken over that
``initramfs.config`` would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from capture.console import printable
from capture.errors import UsageError
from initramfs import directives, peer_settings, shell_settings
from initramfs.config import ConfigError, directive_lines, parse, read_text
from initramfs.directives import Draft
from initramfs.peer_settings import KDUMP_TOOLS, KDUMP_UTILS

DEBIAN = Path("/etc/default/kdump-tools")
SYSCONFIG = Path("/etc/sysconfig/kdump")
KDUMP_CONF = Path("/etc/kdump.conf")
_OF_SUSE = {"KDUMP_SAVEDIR", "KDUMP_DUMPLEVEL", "KDUMP_DUMPFORMAT"}
"""Variables of another file of SYSCONFIG's name: kdump(5) of SUSE."""
HOOKS = Path("/etc/kdump")
"""kdump-utils runs what is in its directories ``pre.d``, ``post.d`` and ``emergency.d``."""


@dataclass(slots=True)
class Imported:
    """What came of it. ``lost`` are lines on settings that mean something and could not be carried over."""

    sources: list[Path] = field(default_factory=list)
    directives: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    lost_target: bool = False

    def text(self) -> str:
        """Return the file, with what was not carried over as comments."""
        lines = [
            f"# Made by vmcapture config import from {printable(' and '.join(map(str, self.sources)))}.",
            *self.directives,
        ]
        for title, said in (("Not carried over", self.lost), ("To be known", self.notes)):
            lines += [f"# {title}:", *(f"#   {printable(line)}" for line in said)] if said else []
        return "".join(f"{line}\n" for line in lines)

    def add(self, where: str, directive: str, value: str) -> None:
        """Add a directive, when it is a good one; else it is lost."""
        problem = _refusal(directive, value)
        if problem is None:
            quoted = value[0] == value[-1] == '"'
            self.directives.append(f'{directive} "{value}"' if quoted else f"{directive} {value}")
        else:
            self.lost.append(f"{where}: {problem}")
            self.lost_target = self.lost_target or directive in directives.TARGETS


def usual_files() -> list[Path]:
    """Return the files of this machine that there are.

    Raises:
        UsageError: there are none, or those of two programs.
    """
    debian = [DEBIAN] if DEBIAN.exists() else []
    fedora = [path for path in (SYSCONFIG, KDUMP_CONF) if path.exists()]
    if debian and fedora:
        raise UsageError(f"there are both {DEBIAN} and {fedora[0]}: name the file that counts")
    if not debian and not fedora:
        raise UsageError(f"there is neither {DEBIAN} nor {SYSCONFIG} nor {KDUMP_CONF}: name the file")
    return debian or fedora


def import_files(files: Iterable[Path], hooks: Path = HOOKS) -> Imported:
    """Return the configuration that the files of another program come to; what a file is, its content tells.

    Raises:
        ConfigError: a file cannot be read, or no target could be carried over.
    """
    found = Imported()
    for file in files:
        text = read_text(file)
        found.sources.append(file)
        kind = _kind(text, file)
        if kind == "kdump.conf":
            _kdump_conf(text, file, hooks, found)
        else:
            table = KDUMP_TOOLS if kind == "debian" else KDUMP_UTILS
            peer_settings.carry_over(shell_settings.parse(text, file), file, table, found)
    if found.lost_target:
        raise ConfigError([*found.lost, "nothing was written: without that target dumps would go to another place"])
    parse(found.text(), Path("the new file"))  # two files may say different things
    return found


def _kind(text: str, file: Path) -> str:
    names = set(re.findall(r"^[ \t]*(?:export[ \t]+)?([A-Z_]+)=", text, re.MULTILINE))
    if foreign := names & _OF_SUSE:
        raise ConfigError(
            [f"{file}: {min(foreign)} is SUSE's, whose files are not read: write its target into /etc/vmcapture.conf"]
        )
    debian, fedora = names & KDUMP_TOOLS.keys(), names & KDUMP_UTILS.keys()
    if len(debian) != len(fedora):
        return "debian" if len(debian) > len(fedora) else "fedora"
    if any(name in directives.DIRECTIVES for _, name, _ in directive_lines(text)) or file.name == KDUMP_CONF.name:
        return "kdump.conf"
    if file.name == DEBIAN.name:
        return "debian"
    if file in (SYSCONFIG, KDUMP_CONF) or file.parent.name == "sysconfig":
        return "fedora"
    raise ConfigError(
        [f"{file}: neither a file of kdump-tools ({DEBIAN}) nor of kdump-utils ({SYSCONFIG}, {KDUMP_CONF})"]
    )


def _refusal(directive: str, value: str) -> str | None:
    """Return why a directive would be refused; None when it would not."""
    if "#" in value:
        return f"{directive} {value}: # begins a comment in vmcapture.conf; choose another name"
    try:
        directives.apply(Draft(), directive, value)
    except UsageError as error:
        return str(error)
    return None


# --- kdump.conf -----------------------------------------------------------------------------------------------------


def _kdump_conf(text: str, file: Path, hooks: Path, found: Imported) -> None:
    """Take over the lines of kdump.conf, which are ours already, and what kdump-utils finds in its directories."""
    after: list[str] = []
    failure = False
    for number, name, value in directive_lines(text):
        where = f"{file}:{number}"
        draft = Draft()
        draft.line = number
        name = "failure_action" if name == "default" else name
        failure = failure or name == "failure_action"
        try:
            directives.apply(draft, name, value)
        except UsageError as error:
            found.lost.append(f"{where}: {error}")
            found.lost_target = found.lost_target or name in directives.TARGETS
            continue
        found.notes += [f"{where}: {note}" for _, note in draft.notes]
        if name == "kdump_post":
            after.append(f"{name} {value}")
        elif draft.values:
            found.directives.append(f"{name} {value}")
    if not failure:
        found.directives.append("failure_action reboot")
    found.directives += [f"kdump_pre {path}" for path in _executables(hooks / "pre.d")]
    found.directives += [f"kdump_post {path}" for path in _executables(hooks / "post.d")] + after
    if _executables(hooks / "pre.d"):
        found.notes.append(f"{hooks}/pre.d: a program in it that ends with another status than 0 ends the save, too")
    for path in _executables(hooks / "emergency.d"):
        found.lost.append(f"{path}: there is no emergency mode; use kdump_post, which runs after a failure too")


def _executables(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
