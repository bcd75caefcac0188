"""Lines on the console: one line each, harmless, kept."""

from __future__ import annotations

import errno
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.console import MAX_KEPT, PREFIX, Console, printable


@given(st.text())
def test_whatever_is_said_is_one_line_without_control_characters(text: str) -> None:
    file = io.StringIO()
    Console(file=file).say(text)
    written = file.getvalue()
    assert written.startswith("vmcapture: ")
    assert written.endswith("\n")
    line = written.removesuffix("\n")
    assert len(line.splitlines()) == 1
    assert not [letter for letter in line if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@given(st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" ")))
def test_letters_of_any_script_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\x0ab"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\r", r"\x0d"),
        ("\x9b31m", r"\x9b31m"),
        ("\x7f\x00", r"\x7f\x00"),
        ("\u202egnp.exe", r"\x202egnp.exe"),
        ("\udcff", r"\xff"), ("\ud800", r"\xd800"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_a_terminal_would_act_on_is_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_standard_error_is_where_lines_go(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("hello")
    assert capsys.readouterr() == ("", "vmcapture: hello\n")


def test_quiet_prints_nothing_and_keeps_everything(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("hello")
    assert capsys.readouterr() == ("", "")
    assert console.lines == ["hello"]


def test_the_last_lines_are_kept_and_no_more() -> None:
    console = Console(file=io.StringIO())
    for number in range(MAX_KEPT + 10):
        console.say(str(number))
    assert console.lines == [str(number) for number in range(10, MAX_KEPT + 10)]


def test_a_line_is_on_its_way_as_soon_as_it_is_said() -> None:
    raw = io.BytesIO()
    buffered = io.TextIOWrapper(raw, encoding="utf-8")
    Console(file=buffered).say("now")
    assert raw.getvalue() == PREFIX.encode() + b"now\n"


class _Unplugged(io.StringIO):
    """A console whose other end is gone."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    def write(self, text: str) -> int:  # noqa: ARG002
        raise OSError(self._code, "gone")


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE, errno.ENOSPC], ids=["hung up", "pipe closed", "full"])
def test_a_console_that_cannot_be_written_to_does_not_stop_the_save(code: int) -> None:
    """The lines are kept for capture-log.txt all the same; a dead serial line must not cost the dump."""
    console = Console(file=_Unplugged(code))
    console.say("hello")
    assert console.lines == ["hello"]
