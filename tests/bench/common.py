"""What the benchmarks share: their options, their vmcores, their failures in one line."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from capture.errors import CaptureError
from tests.bench.guest import make_vmcore
from tests.guest import host
from tests.guest.host import HostError
from tests.guest.qemu import GuestError

ONLY_RATIOS = "Only the ratios say something: the times are this machine's, and of this moment."


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for gigabytes that is gone afterwards."""
    return tempfile.TemporaryDirectory(prefix="vmcapture-bench-", dir=host.SCRATCH)


def add_repeat(parser: argparse.ArgumentParser) -> None:
    """Add ``--repeat``."""
    parser.add_argument(
        "--repeat", type=_rounds, default=5, metavar="N", help="rounds, of which the median is shown (default: 5)"
    )


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def make(vmcore: Path, memory: str, say_to: TextIO = sys.stdout) -> Path:
    """Make a vmcore of a guest with ``memory``, and the folder that it is to be in.

    Raises:
        GuestError, HostError: it cannot be made.
    """
    vmcore.parent.mkdir(parents=True, exist_ok=True)
    make_vmcore(vmcore, memory, lambda line: print(line, file=say_to, flush=True))
    return vmcore


def run(benchmark: Callable[[], None]) -> int:
    """Run a benchmark and return its exit status: what it cannot do takes one line."""
    try:
        benchmark()
    except (HostError, GuestError, CaptureError) as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or 'system'}: {error.strerror or error}"
    else:
        return 0
    print(f"bench: {reason}", file=sys.stderr)
    return 1
