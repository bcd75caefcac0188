"""Shell files are read and never run; what is read is what a shell would read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initramfs.config import ConfigError
from initramfs.shell_settings import parse

FILE = Path("/etc/default/kdump-tools")


def values(text: str) -> dict[str, str]:
    return {name: setting.value for name, setting in parse(text, FILE).items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A=1", "1"),
        ("A=", ""),
        ('A="a b"', "a b"),
        ("A='a \"b\" $c `d`'", 'a "b" $c `d`'),
        ('A="a \\"b\\" \\$c \\x"', 'a "b" $c \\x'),
        ("A=a\\ b\\;c", "a b;c"),
        ("A=a'b'\"c\"d", "abcd"),
        ("A=a#b # comment", "a#b"),
        ("A=1; A=2;A=3", "3"),
        ("export A=1", "1"),
        ("A=1\nexport A", "1"),
        ("  A=1", "1"),
        ("A='two\nlines'", "two\nlines"),
        ("A=one\\\ntwo", "onetwo"),
        ('A="one\\\ntwo"', "onetwo"),
        ("B=x\nA=$B-${B}y", "x-xy"),
        ('B=x A="$B"', "x"),
        ("A=5$", "5$"),
        (
            "A=\"echo 'makedumpfile FAILED.'; /bin/bash; reboot -f\"",
            "echo 'makedumpfile FAILED.'; /bin/bash; reboot -f",
        ),
    ],
)
def test_what_is_read(text: str, value: str) -> None:
    assert values(text)["A"] == value


def test_lines_are_those_of_the_last_assignment() -> None:
    found = parse("# x\nA=1\n\nB='x\ny' C=2\nA=3\n", FILE)
    assert {name: setting.line for name, setting in found.items()} == {"A": 6, "B": 4, "C": 5}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("A=$(reboot)", "nothing is run"),
        ("A=`reboot`", "nothing is run"),
        ('A="$(reboot)"', "nothing is run"),
        ("A=${B:-x}", "nothing is run"),
        ("A=$((1+1))", "nothing is run"),
        ("A=$B", "$B: it has no value in this file"),
        ("A=1 reboot", "reboot: only assignments are read, nothing is run"),
        ("reboot -f", "reboot: only assignments are read"),
        (". /etc/other", ".: only assignments are read"),
        ("if true; then A=1; fi", "if: only assignments are read"),
        ("A=1 & B=2", "&: only assignments are read"),
        ("A=1|B", "'|' in a value is the shell's own"),
        ("A=(1 2)", "'(' in a value is the shell's own"),
        ("A=~root", "'~' in a value is the shell's own"),
        ("A='x", "is missing its other half"),
        ('A="x', "is missing its other half"),
        ("export B", "export B: it has no value"),
        (";", "without a command"),
    ],
)
def test_what_would_run_is_refused_with_its_line(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(f"OK=1\n{text}\n", FILE)
    assert refused.value.lines[0].startswith(f"{FILE}:2: ")
    assert what in refused.value.lines[0]


def test_all_that_is_refused_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        parse("A=$(x)\nB=2\nreboot\n", FILE)
    assert [line.split(":")[1] for line in refused.value.lines] == ["1", "3"]


PIECE = st.one_of(
    st.sampled_from(
        ["A", "B", "=", "A=", "B=", " ", "\n", ";", "'", '"', "\\", "$A", "${B}", "$", "#", "x", "y z", "\t", "export ",
         "\\\n", "-", "/", ".", ":", "1", "~", "{", "}"]
    ),
    st.text("ab ", max_size=3),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECE, max_size=14).map("".join))
def test_a_real_shell_reads_the_same(text: str) -> None:
    """What is accepted here means the same to a POSIX shell, which sources it."""
    try:
        found = values(text)
    except ConfigError:
        return
    names = sorted(found)
    print_all = "".join(f'\nprintf "%s\\0" "${{{name}}}"' for name in names)
    done = subprocess.run(
        ["sh", "-c", f"{text}\n{print_all}"], capture_output=True, env={"PATH": os.environ["PATH"]}, check=False
    )
    assert done.stderr == b""
    assert dict(zip(names, done.stdout.decode().split("\0")[:-1], strict=True)) == found
