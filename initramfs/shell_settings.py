"""Reads a file of shell variables (``/etc/default/…``, ``/etc/sysconfig/…``) without running it.

Such a file is a shell script that other programs source. What is understood is what one finds in them: assignments,
``export``, both kinds of quotes, backslashes, comments, and variables that were assigned before. Anything that would
run, or depend on where it runs, is refused with its line. The rules are those of POSIX's shell command language (2.2
Quoting, 2.6.2 Parameter Expansion, 2.9.1 Simple Commands).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from capture.errors import UsageError
from initramfs.config import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDS = "\n;"
_OPERATORS = "&|<>()"


class Setting(NamedTuple):
    """The value of a variable, and the line where it was last assigned."""

    value: str
    line: int


def parse(text: str, file: Path) -> dict[str, Setting]:
    """Return the variables that the file assigns.

    Raises:
        ConfigError: it does more than that; all lines that do.
    """
    reader = _Reader(text)
    problems = []
    while reader.skip_to_command():
        line = reader.line
        try:
            reader.command()
        except UsageError as error:
            problems.append(f"{file}:{line}: {error}")
            reader.skip_line()
    if problems:
        raise ConfigError(problems)
    return reader.settings


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.settings: dict[str, Setting] = {}

    @property
    def line(self) -> int:
        """The number of the line that is being read."""
        return self._text.count("\n", 0, self._at) + 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def skip_to_command(self) -> bool:
        """Skip what is between two commands; return whether there is one."""
        while self._at < len(self._text):
            if self._peek() == "#":
                self.skip_line()
            elif self._text.startswith("\\\n", self._at):
                self._at += 2
            elif self._peek() in " \t\n":
                self._at += 1
            else:
                return True
        return False

    def skip_line(self) -> None:
        """Go to the end of the line."""
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def command(self) -> None:
        """Read the assignments of one command.

        Raises:
            UsageError: it is more than assignments.
        """
        found: dict[str, Setting] = {}
        exported = False
        while True:
            while self._peek() in (" ", "\t") or self._text.startswith("\\\n", self._at):
                self._at += 2 if self._peek() == "\\" else 1
            if not self._peek() or self._peek() in _ENDS:
                if self._peek() == ";" and not found and not exported:
                    raise UsageError("; without a command before it: take it out")
                self._at += len(self._peek())
                break
            if self._peek() == "#":
                self.skip_line()
                break
            line = self.line
            name = _NAME.match(self._text, self._at)
            if name is not None and self._text.startswith("=", name.end()):
                self._at = name.end() + 1
                found[name[0]] = Setting(self._value(found), line)
            elif name is not None and (name[0] == "export" or exported):
                if name[0] != "export" and name[0] not in {**self.settings, **found}:
                    raise UsageError(f"export {name[0]}: it has no value in this file; write {name[0]}=VALUE")
                exported, self._at = True, name.end()
            else:
                word = re.compile(r"\S*").match(self._text, self._at)
                shown = word[0] if word else ""
                raise UsageError(
                    f"{shown}: only assignments are read, nothing is run; write what it comes to as NAME=VALUE"
                )
        self.settings |= found

    def _value(self, found: dict[str, Setting]) -> str:
        """Read a value up to an unquoted blank or end."""
        parts = []
        while (letter := self._peek()) and letter not in " \t\n;":
            self._at += 1
            if letter == "'":
                parts.append(self._until("'"))
            elif letter == '"':
                parts.append(self._double_quoted(found))
            elif letter == "\\":
                parts.append("" if self._peek() == "\n" else self._peek() or "\\")
                self._at += 1
            elif letter in "$`":
                parts.append(self._expansion(letter, found))
            elif letter in _OPERATORS or letter == "\0" or (letter == "~" and not parts):
                raise UsageError(f"{letter!r} in a value is the shell's own; put the value into single quotes")
            else:
                parts.append(letter)
        return "".join(parts)

    def _until(self, quote: str) -> str:
        end = self._text.find(quote, self._at)
        if end < 0:
            raise UsageError(f"a quote ({quote}) is missing its other half")
        content, self._at = self._text[self._at : end], end + 1
        return content

    def _double_quoted(self, found: dict[str, Setting]) -> str:
        parts = []
        while (letter := self._peek()) != '"':
            if not letter:
                raise UsageError('a quote (") is missing its other half')
            self._at += 1
            if letter == "\\" and self._peek() in ("$", "`", '"', "\\", "\n"):
                parts.append("" if self._peek() == "\n" else self._peek())
                self._at += 1
            elif letter in "$`":
                parts.append(self._expansion(letter, found))
            else:
                parts.append(letter)
        self._at += 1
        return "".join(parts)

    def _expansion(self, letter: str, found: dict[str, Setting]) -> str:
        """Return what stands for ``$NAME`` or ``${NAME}``, whose ``$`` has been read."""
        match = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*)").match(self._text, self._at)
        if letter == "`" or match is None:
            if letter == "$" and (not self._peek() or self._peek() in ' \t\n;"'):
                return "$"  # nothing to expand
            raise UsageError("the value is computed when the file is run, and nothing is run; write what it comes to")
        name = match[1] or match[2]
        known = {**self.settings, **found}
        if name not in known:
            raise UsageError(f"${name}: it has no value in this file; write what it comes to")
        self._at = match.end()
        return known[name].value
