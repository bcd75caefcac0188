"""Runs the few programs that we lean on: one place that finds them and turns their failure into one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from initramfs.errors import ToolError

SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


def find(name: str) -> Path | None:
    """Return the program's path; the system's sbin directories count even when PATH lacks them.

    An empty or relative entry of PATH means the current directory, where root must not find a program.
    """
    directories = (*os.environ.get("PATH", "").split(os.pathsep), *SYSTEM_DIRECTORIES.split(os.pathsep))
    found = shutil.which(name, path=os.pathsep.join(entry for entry in directories if entry.startswith("/")))
    return Path(found) if found else None


def require(name: str, package: str) -> Path:
    """Return the program's path, or say which package has it."""
    found = find(name)
    if found is None:
        raise ToolError(f"{name} was not found: install {package}")
    return found


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
    good: Container[int] = (0,),
) -> str:
    """Run to the end and return what it wrote to standard output; a failure carries its last line of stderr.

    Raises:
        ToolError: it cannot be run, or its exit status is not one of ``good``.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
            check=False,
        )
    except OSError as error:
        raise ToolError(f"cannot run {words[0]}: {error.strerror}") from error
    if done.returncode not in good:
        raise ToolError(f"{words[0]} {describe_status(done.returncode)}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def describe_status(status: int) -> str:
    """Say how a process ended."""
    return f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
