"""Programs that the capture kernel runs: nobody is there to answer them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from capture.boot.programs import run
from capture.errors import TargetError


def test_a_program_that_asks_is_not_waited_for() -> None:
    """The console is its standard input, and nobody types there."""
    script = "from capture.boot.programs import run; print(run(['cat'], 'cat'), end='')"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_what_a_program_says_is_text_whatever_its_bytes_are() -> None:
    assert run(["printf", "\\377"], "printf") == "\ufffd"
    with pytest.raises(TargetError, match=r"^it failed: \ufffd two$"):
        run(["sh", "-c", "printf '\\377\\ntwo\\n' >&2; exit 4"], "it failed")
    with pytest.raises(TargetError, match=r"^it failed: false ended with 1$"):
        run(["false"], "it failed")
    with pytest.raises(TargetError, match=r"^it failed: /none cannot be run: No such file"):
        run(["/none"], "it failed")
