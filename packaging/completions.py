"""Prints the completions of a shell for every command and option that the program has.

usage: python3 packaging/completions.py bash|zsh|fish, from the root of the sources. Made when the package is built, so
that there is no second list to be kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capture.cli import make_parser
from initramfs.cli import add_commands


class Option(NamedTuple):
    """An option: how it is spelt, whether an argument follows, the words that this may be (a file where there are
    none)."""

    spellings: tuple[str, ...]
    takes_argument: bool
    words: tuple[str, ...]
    help: str


class Command(NamedTuple):
    """A command (with those before it, where it has commands of its own): its options, its own commands with what
    each does, and whether files may follow."""

    path: tuple[str, ...]
    options: tuple[Option, ...]
    commands: tuple[tuple[str, str], ...]
    files: bool


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Command]:
    """Yield what a parser takes, then what each of its commands does."""
    options, below, files = [], [], False
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            below = [(name, one_line(helps.get(name, "")), sub) for name, sub in action.choices.items()]
        elif action.option_strings:
            words = tuple(map(str, action.choices or ()))
            text = one_line((action.help or "") % {**vars(action), "prog": parser.prog})
            options.append(Option(tuple(action.option_strings), action.nargs != 0, words, text))
        else:
            files = True
    yield Command(path, tuple(options), tuple((name, text) for name, text, _ in below), files)
    for name, _, sub in below:
        yield from commands(sub, (*path, name))


def one_line(text: str) -> str:
    """Return the first sentence or so of a help text."""
    return re.split(r"; | \(", " ".join(text.split()))[0]


def bash(all_commands: list[Command]) -> str:
    """Return a function for bash: options of the command, words of an option, else files."""
    lines = [
        "# bash completion for vmcapture; made by packaging/completions.py",
        "_vmcapture() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} path= word words",
        "    for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do",
        '        case "$path $word" in',
        *(f'            "{"".join(f" {part}" for part in command.path)}") path="$path $word" ;;'
          for command in all_commands if command.path),
        "        esac",
        "    done",
        "    compopt +o default 2> /dev/null",
        '    case "$path $previous" in',
    ]  # fmt: skip
    for command in all_commands:
        prefix = "".join(f" {part}" for part in command.path)
        for option in command.options:
            if option.takes_argument:
                pattern = "|".join(f'"{prefix} {spelling}"' for spelling in option.spellings)
                reply = f'$(compgen -W "{" ".join(option.words)}" -- "$current")' if option.words else ""
                rest = "" if option.words else " compopt -o default 2> /dev/null;"
                lines.append(f"        {pattern}) COMPREPLY=({reply});{rest} return ;;")
    lines += ["    esac", '    case "$path" in']
    for command in all_commands:
        spellings = [spelling for option in command.options for spelling in option.spellings]
        names = [name for name, _ in command.commands]
        files = " [[ $current == -* ]] || compopt -o default 2> /dev/null;" if command.files else ""
        prefix = "".join(f" {part}" for part in command.path)
        lines.append(f'        "{prefix}") words="{" ".join([*names, *spellings])}";{files} ;;')
    return "\n".join(
        [
            *lines,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -F _vmcapture vmcapture",
            "",
        ]
    )


def zsh(all_commands: list[Command]) -> str:
    """Return a function for zsh, one for each command."""
    lines = ["#compdef vmcapture", "# zsh completion for vmcapture; made by packaging/completions.py", ""]
    for command in all_commands:
        lines.append(f"{zsh_name(command.path)}() {{")
        if command.commands:
            lines += ["    local state line", "    local -a commands=("]
            lines += [f"        {quoted(name + ':' + text)}" for name, text in command.commands]
            lines.append("    )")
        lines.append("    _arguments -s \\")
        for option in command.options:
            argument = ""
            if option.takes_argument:
                argument = f":value:({' '.join(option.words)})" if option.words else ":value:_files"
            text = re.sub(r"([\[\]:])", r"\\\1", option.help)
            lines += [f"        {quoted(f'*{spelling}[{text}]{argument}')} \\" for spelling in option.spellings]
        if command.commands:
            lines += ["        '1: :->command' '*:: :->rest'", "    case $state in"]
            lines += ["        command) _describe command commands ;;", "        rest)", "            case $line[1] in"]
            lines += [f"                {name}) {zsh_name((*command.path, name))} ;;" for name, _ in command.commands]
            lines += ["            esac ;;", "    esac"]
        else:
            lines.append("        '*: :_files'" if command.files else "        ''")
        lines += ["}", ""]
    return "\n".join([*lines, '_vmcapture "$@"', ""])


def zsh_name(path: tuple[str, ...]) -> str:
    """Return the name of a command's function."""
    return "_".join(("_vmcapture", *(part.replace("-", "_") for part in path)))


def fish(all_commands: list[Command]) -> str:
    """Return lines for fish."""
    lines = ["# fish completion for vmcapture; made by packaging/completions.py", "complete -c vmcapture -f"]
    for command in all_commands:
        seen = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in command.path)
        names = " ".join(name for name, _ in command.commands)
        none_below = f"not __fish_seen_subcommand_from {names}" if names else ""
        condition = "; and ".join(filter(None, (seen, none_below)))
        lines += [
            f"complete -c vmcapture -n {quoted(condition)} -a {name} -d {quoted(text)}"
            for name, text in command.commands
        ]
        where = f"complete -c vmcapture -n {quoted(condition)}"
        if command.files:
            lines.append(f"{where} -F")
        for option in command.options:
            spelt = " ".join(
                f"-l {spelling[2:]}" if spelling.startswith("--") else f"-s {spelling[1:]}"
                for spelling in option.spellings
            )
            argument = ""
            if option.takes_argument:
                argument = f" -x -a {quoted(' '.join(option.words))}" if option.words else " -r -F"
            lines.append(f"{where} {spelt}{argument} -d {quoted(option.help)}")
    return "\n".join([*lines, ""])


def quoted(text: str) -> str:
    """Return text for a shell, in single quotes."""
    return "'" + text.replace("'", r"'\''") + "'"


SHELLS: dict[str, Callable[[list[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main() -> int:
    """Print the completions of the shell that is named."""
    if len(sys.argv) != 2 or sys.argv[1] not in SHELLS:
        print(f"usage: {sys.argv[0]} {'|'.join(SHELLS)}", file=sys.stderr)
        return 2
    print(SHELLS[sys.argv[1]](list(commands(make_parser(add_commands)))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
