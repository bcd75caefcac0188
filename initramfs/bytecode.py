"""Compiles modules for the image, in a process of its own: same sources, same bytes, whatever the builder did before.

The bytes of a marshalled code object depend on which of its strings others refer to, so only a fresh interpreter that
does nothing else gives the same file twice. Debug ranges (column numbers), docstrings and assertions are left out, as
``python -OO`` does: the image has no sources, and little memory.
"""

from __future__ import annotations

import json
import py_compile
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from initramfs.errors import ImageError
from initramfs.tools import last_line

ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONNODEBUGRANGES": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True, slots=True)
class Compilation:
    """One module: its source, the name it carries in tracebacks, the file to write."""

    source: str
    name: str
    output: str


def compile_all(compilations: Sequence[Compilation]) -> None:
    """Write a ``.pyc`` for each source that is never checked against its source again."""
    request = json.dumps([asdict(compilation) for compilation in compilations])
    parent = str(Path(__file__).resolve().parent.parent)
    program = f"import sys; sys.path.append({parent!r}); from initramfs.bytecode import serve; serve()"
    done = subprocess.run(
        [sys.executable, "-P", "-s", "-S", "-W", "ignore", "-c", program],  # -P: no module from the current directory
        input=request,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    if done.returncode != 0:
        raise ImageError(f"compiling the Python modules failed: {last_line(done.stderr)}")


def serve() -> None:
    """Compile what stdin asks for."""
    for row in json.load(sys.stdin):
        compilation = Compilation(**row)
        py_compile.compile(
            compilation.source,
            cfile=compilation.output,
            dfile=compilation.name,
            doraise=True,
            optimize=2,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
