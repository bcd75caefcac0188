"""makedumpfile's options, each carried over, named, or refused."""

from __future__ import annotations

import subprocess

import pytest

from capture.errors import UsageError
from initramfs.collector import core_collector, makedumpfile
from initramfs.tools import find


@pytest.mark.parametrize(
    ("line", "levels", "compress"),
    [
        ("makedumpfile -l --message-level 7 -d 31", "31", "zstd:auto"),
        ("makedumpfile -F -l --message-level 7 -d 31", "31", "zstd:auto"),
        ("makedumpfile -c --message-level 7 -d 31", "31", "zlib"),
        ("/usr/sbin/makedumpfile -z -d 17,31 --num-threads=4", "17,31", "zstd:auto"),
        ("makedumpfile -p -d31", "31", "zstd:auto"),
        ("makedumpfile -cd 1", "1", "zlib"),
        ("makedumpfile", "0", "none"),
        ("makedumpfile -d 16 --cyclic-buffer 1024 --non-mmap -f -D --show-stats", "16", "none"),
    ],
)
def test_level_and_compression_are_carried_over(line: str, levels: str, compress: str) -> None:
    found = core_collector(line)
    assert (found.levels, found.compress) == (levels, compress)


def test_what_means_something_else_here_is_said() -> None:
    notes = "\n".join(core_collector("makedumpfile -l -F --num-threads 4 -d 31").notes)
    assert "-l: instead of LZO, zstd" in notes
    assert "-F is not needed" in notes
    assert "--num-threads 4 is not needed" in notes
    assert core_collector("makedumpfile -c -d 31").notes == ()
    assert [note.split(":")[0] for note in core_collector("makedumpfile").notes] == [
        "neither -c nor -z, -l, -p", "no -d",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("cp --sparse=always", "core_collector cp: there is no plain copy"),
        ("scp", "core_collector scp: there is no plain copy"),
        ("/usr/bin/dd", "core_collector dd: there is no plain copy"),
        ("my-dumper -x", "core_collector my-dumper: only makedumpfile's options are understood"),
        ("makedumpfile -E -d 31", "-E: a save is kdump-compressed"),
        ("makedumpfile -d 32", "-d 32: a dump level is a number from 0 to 31"),
        ("makedumpfile -d", "-d: its value is missing"),
        ("makedumpfile --message-level seven -d 31", "--message-level seven: a number is needed"),
        ("makedumpfile --config /etc/erase -d 31", "nothing is erased from a dump; encrypt it"),
        ("makedumpfile --frobnicate", "--frobnicate: no option that is known here"),
        ("makedumpfile -d 31 vmcore", "makedumpfile vmcore: no option"),
        ("makedumpfile '-d 31", "a quote is missing its other half"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(line: str, what: str) -> None:
    with pytest.raises(UsageError) as refused:
        core_collector(line)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_option_of_the_real_makedumpfile_has_an_answer() -> None:
    """Those that its own help names, one by one: carried over, named, or refused as what it is."""
    program = find("makedumpfile")
    if program is None:
        pytest.skip("makedumpfile is not installed")
    import re

    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
    options = set(re.findall(r"^  \[(-{1,2}[A-Za-z][A-Za-z_-]*)", shown, re.MULTILINE))
    assert {"-c", "-d", "-E", "-F", "--message-level"} <= options
    for option in options:
        try:
            makedumpfile([option, "1"])
        except UsageError as error:
            assert f"{option}: no option" not in str(error)  # noqa: PT017
