"""What an image needs so that its saves are encrypted: the public keys and age, tried on the healthy machine first."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from capture.dumpfile.encrypted import PROGRAM, SIGNATURE, check_recipients, how_it_ended
from capture.options import RECIPIENTS
from initramfs import runtime, tools
from initramfs.errors import ImageError, ToolError

_TRIAL = b"what a dead kernel left"


class Encryption(NamedTuple):
    """What goes into an image: programs with their shared objects, and files by their path in it."""

    binaries: tuple[Path, ...] = ()
    files: tuple[tuple[str, Path], ...] = ()


def encryption(recipients: Path | None) -> Encryption:
    """Return what an image needs to encrypt to the keys in the file ``recipients``.

    Where nobody names one, RECIPIENTS is taken when it is there: an image that is built again after a kernel update
    must not forget it. Nothing when there is none.

    Raises:
        UsageError: the file cannot be used.
        ToolError: age is not installed.
        ImageError: age does not encrypt to these keys.
    """
    path = recipients
    if path is None:
        if not os.path.lexists(RECIPIENTS):
            return Encryption()
        path = RECIPIENTS
    check_recipients(path)
    age = tools.require(PROGRAM, "age")
    try:
        # Without the plugins that this machine may have: the image has age alone.
        made = subprocess.run([age, "-R", path], input=_TRIAL, capture_output=True, check=False, env={"PATH": "/none"})
    except OSError as error:
        raise ToolError(f"{age} cannot be run: {error.strerror}") from None
    if made.returncode:
        raise ImageError(f"{path}: {how_it_ended(made.returncode, made.stderr)}")
    if not made.stdout.startswith(SIGNATURE) or _TRIAL in made.stdout:
        raise ImageError(f"{path}: {age} did not encrypt what it was given to try; is that age?")
    files = [(str(RECIPIENTS), path)]
    if str(age.parent) not in runtime.SEARCH_PATH.split(os.pathsep):
        files.append((f"/usr/bin/{PROGRAM}", age))
    return Encryption((age,), tuple(files))
