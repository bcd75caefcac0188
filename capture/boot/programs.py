"""Runs programs that may wait for a disk, a card or a server."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from capture import pulse
from capture.errors import TargetError

if TYPE_CHECKING:
    from subprocess import CompletedProcess


def ended(command: Sequence[str]) -> CompletedProcess[str]:
    """Run a program to its end, with nobody to answer it; whatever it prints is text.

    Raises:
        OSError: it cannot be run.
    """
    import subprocess  # the process that watches over the job has no need of it

    with pulse.at_target():
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )


def run(command: Sequence[str], failure: str, good: Container[int] = (0,)) -> str:
    """Run a program; return what it printed.

    Raises:
        TargetError: its exit status is not one of ``good``: the text ``failure``, and what it said.
    """
    try:
        answer = ended(command)
    except OSError as error:
        raise TargetError(f"{failure}: {command[0]} cannot be run: {error.strerror}") from None
    if answer.returncode not in good:
        said = " ".join((answer.stderr or answer.stdout).split()) or f"{command[0]} ended with {answer.returncode}"
        raise TargetError(f"{failure}: {said}")
    return answer.stdout
