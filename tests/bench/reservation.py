"""The smallest ``crashkernel=`` at which a whole save succeeds, by trying: ``python -m tests.bench.reservation``.

Crashes a guest again and again, with less memory reserved each time, until its capture kernel fails. Each save is at
level 31 and has to be complete. Times are of the capture kernel's own clock, which starts when it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capture.boot.job import MANIFEST
from tests.bench.common import run, scratch
from tests.guest.cases import LINUX_6_1, LINUX_6_12, Case
from tests.guest.crash import ImageStore, crash
from tests.guest.qemu import GuestError

LADDER = (256, 192, 160, 144, 128, 112, 96, 80)
"""MiB."""
KERNELS = {"6.1": LINUX_6_1, "6.12": LINUX_6_12}
NO_ONE_THERE = "vmcapture.failure=poweroff panic=-1"


@dataclass(frozen=True, slots=True)
class Rung:
    """What came of one try. ``manifest`` is None where nothing was saved, ``reason`` says why."""

    kernel: str
    memory: str
    reserved: int
    manifest: Any
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether all was saved."""
        return bool(self.manifest and self.manifest["complete"])


def main(argv: Sequence[str] | None = None) -> int:
    """Go down the ladder for each machine, print a row for each try."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reservation", description=__doc__)
    add = parser.add_argument
    add("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--memory", nargs="+", default=["1G", "4G"], metavar="SIZE")
    add("--cpus", type=int, default=1, metavar="N", help="CPUs in the capture kernel (default: 1)")
    add("--ladder", nargs="+", type=int, default=LADDER, metavar="MIB", help="what to reserve, the largest first")
    arguments = parser.parse_args(argv)
    print(
        f"{'kernel':7}{'memory':>7}{'crashkernel':>12}{'saved':>7}{'total':>7}{'least':>7}{'RSS':>6}"
        f"{'start s':>9}{'1st byte':>9}{'end s':>7}{'dump s':>8}{'dump MiB':>9}"
    )

    def measure() -> None:
        with scratch() as name:
            store = ImageStore(Path(name) / "images")
            for kernel in arguments.kernel:
                for memory in arguments.memory:
                    _descend(kernel, memory, arguments, store, Path(name))
        print("total, least: MiB that the capture kernel has, and that were available at the least; RSS: peak, MiB")

    return run(measure)


def _descend(name: str, memory: str, arguments: argparse.Namespace, store: ImageStore, folder: Path) -> None:
    cpus = arguments.cpus
    case = Case(f"reservation-{name}", KERNELS[name], cpus + 1, memory=memory, capture_cpus=cpus)
    for reserved in arguments.ladder:
        rung = _try(name, replace(case, crashkernel=f"{reserved}M"), reserved, store, folder)
        print(_row(rung), flush=True)
        if not rung.complete:
            return


def _try(name: str, case: Case, reserved: int, store: ImageStore, folder: Path) -> Rung:
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        try:
            saved = crash(case, store, Path(workdir), append=NO_ONE_THERE)
            manifest = json.loads((saved.saved / MANIFEST).read_text())
        except (GuestError, FileNotFoundError) as error:  # not saved, or not as far as the manifest
            return Rung(name, case.memory, reserved, None, str(error))
        return Rung(name, case.memory, reserved, manifest)


def _row(rung: Rung) -> str:
    head = f"{rung.kernel:7}{rung.memory:>7}{rung.reserved:>11}M"
    if rung.manifest is None:
        return f"{head}{'no':>7}  {rung.reason[:100]}"
    machine, seconds = rung.manifest["capture_machine"], rung.manifest["seconds"]
    start = machine["uptime_at_start"]
    sizes = [(machine[key] or 0) / (1 << 20) for key in ("memory_total", "memory_available_least", "peak_rss")]
    return (
        f"{head}{'yes' if rung.complete else 'part':>7}{sizes[0]:7.0f}{sizes[1]:7.0f}{sizes[2]:6.0f}{start:9.1f}"
        f"{start + seconds['vmcore-dmesg.txt']:9.1f}{start + sum(seconds.values()):7.1f}{seconds['vmcore']:8.1f}"
        f"{_dump_size(rung.manifest) / (1 << 20):9.1f}"
    )


def _dump_size(manifest: Any) -> int:
    """Return the bytes of the dump, finished or not; 0 where there is none."""
    dump = manifest["dump"]
    return manifest["files"][dump["file"]]["size"] if dump else 0


if __name__ == "__main__":
    sys.exit(main())
