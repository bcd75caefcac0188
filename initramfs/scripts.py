"""Scripts for the image: what has to be there to run them.

A script's first line names its interpreter (execve(2)); the capture kernel's busybox is sh, and what else it is called
by. Other programs that the script calls nobody can find out: the administrator names them (``extra_bins``).
"""

from __future__ import annotations

import os
from pathlib import Path

from initramfs import tools
from initramfs.errors import ImageError

BUSYBOX = frozenset({"sh", "ash", "busybox"})
"""Interpreters that every image has."""
HIDDEN = ("/proc", "/sys", "/dev", "/run", "/tmp")
"""Directories of the image that stage one mounts something over (initramfs/functions)."""
_FIRST_LINE = 256  # BINPRM_BUF_SIZE, include/uapi/linux/binfmts.h


def interpreters(path: Path) -> tuple[Path, ...]:
    """Return the programs of this machine that a script needs to be started; nothing for any other file.

    Raises:
        ImageError: it cannot be read, or there is no such interpreter.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_FIRST_LINE)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    if not start.startswith(b"#!"):
        return ()
    words = start[2:].split(b"\n")[0].decode(errors="replace").split()
    if not words:
        raise ImageError(f"{path}: its first line names no interpreter: #!/bin/sh")
    program = Path(words[0])
    if program.name == "env" and len(words) > 1:
        found = tools.find(words[1])
        if words[1] in BUSYBOX:
            return ()
    else:
        found = program if program.is_file() else None
        if program.name in BUSYBOX and str(program) in (f"/bin/{program.name}", f"/usr/bin/{program.name}"):
            return ()
    if found is None:
        raise ImageError(f"{path}: its interpreter {words[-1] if program.name == 'env' else program} was not found")
    return (found,)


def refusal(path: Path) -> str | None:
    """Return why a program cannot go into the image and be run there; None when all is well."""
    if not path.is_file():
        return "no such file" if not path.exists() else "no file"
    for hidden in HIDDEN:
        if Path(os.path.normpath(path)).is_relative_to(hidden) or path.resolve().is_relative_to(hidden):
            return f"{hidden} is another one in the capture kernel; put it elsewhere, into /usr/local/sbin"
    if not path.stat().st_mode & 0o111:
        return f"it may not be executed: chmod +x {path}"
    try:
        interpreters(path)
    except ImageError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
