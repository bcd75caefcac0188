"""Completions: every command and option, as the shells themselves have them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture.cli import make_parser
from initramfs.cli import add_commands

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "packaging/completions.py"


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command, and the words that can follow it: options, and commands of its own."""
    words: set[str] = set()
    for action in parser._actions:
        words.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            words.update(action.choices)
            for name, below in action.choices.items():
                yield from commands(below, (*path, name))
    yield path, words


COMMANDS = sorted(commands(make_parser(add_commands)))


def completions(shell: str, folder: Path) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (Debian package {shell})")
    file = folder / shell
    made = subprocess.run([sys.executable, SCRIPT, shell], capture_output=True, text=True, check=True, timeout=60)
    file.write_text(made.stdout)
    return file


def said_by(shell: str, script: str) -> list[str]:
    ran = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def bash_words(file: Path, *line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = " ".join(f"'{word}'" for word in ("vmcapture", *line))
    return said_by("bash", f"source {file}; COMP_WORDS=({words}); COMP_CWORD={len(line)}; _vmcapture;"
                           ' for word in "${COMPREPLY[@]}"; do echo "$word"; done')  # fmt: skip


def test_bash_offers_every_command_and_option(tmp_path: Path) -> None:
    file = completions("bash", tmp_path)
    for path, words in COMMANDS:
        assert set(bash_words(file, *path, "")) == words, path
    assert bash_words(file, "dum") == ["dump"]
    assert bash_words(file, "dump", "-q", "vmcore", "--res") == ["--resume"]
    assert bash_words(file, "dump", "--format", "e") == ["elf"]
    assert bash_words(file, "load", "--image", "") == []  # files


def test_fish_offers_every_command_and_option(tmp_path: Path) -> None:
    file = completions("fish", tmp_path)
    for path, words in COMMANDS:
        line = " ".join(("vmcapture", *path))
        script = f"source {file}; complete -C '{line} '; complete -C '{line} -'; complete -C '{line} --'"
        offered = {answer.split("\t")[0] for answer in said_by("fish", script)}
        short = {word for word in words if len(word) == 2}
        assert words - short <= offered, path
        assert len(short - offered) <= 1, path  # where both are one option, fish shows one of them at times
    answers = said_by("fish", f"source {file}; complete -C 'vmcapture dump --format '")
    assert {answer.split("\t")[0] for answer in answers} == {"elf", "kdump"}


def test_zsh_offers_every_command_and_option(tmp_path: Path) -> None:
    """Its completion needs a terminal: what its functions give to those of zsh is looked at."""
    file = completions("zsh", tmp_path)
    stand_ins = '_arguments() { print -rl -- "$@" }; _describe() { print -rl -- ${(P)2} }; _files() {};'
    for path, words in COMMANDS:
        name = "_".join(("_vmcapture", *path)).replace("-", "_")
        offered = said_by("zsh", f"{stand_ins} source {file} > /dev/null; {name}")
        found = {line.lstrip("*").split("[")[0] for line in offered if line.startswith("*-")}
        assert found == {word for word in words if word.startswith("-")}, path
    listed = said_by("zsh", f"{stand_ins} source {file} > /dev/null; print -rl -- $functions[_vmcapture]")
    assert all(any(f"'{word}:" in line for line in listed) for word in COMMANDS[0][1] if not word.startswith("-"))
