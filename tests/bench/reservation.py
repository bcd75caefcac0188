"""The smallest ``crashkernel=`` at which a whole save succeeds, by trying: ``python -m tests.bench.reservation``.

Crashes a guest again and again, with less memory reserved each time, until its capture kernel fails. Each save is at
level 31 and has to be complete. Times are of the capture kernel's own clock, which starts when it does. ``--peer`` has
the same guests saved by makedumpfile in an image of its own as well (see peer_image.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from capture.dumpfile.output import MANIFEST
from tests.bench import peer_image, rung
from tests.bench.common import run, scratch
from tests.bench.rung import Figures, Rung
from tests.guest import host
from tests.guest.cases import LINUX_6_1, LINUX_6_12, Case
from tests.guest.crash import OURS, SAVE_TIMEOUT, ImageStore, Saver, crash
from tests.guest.host import HostError
from tests.guest.qemu import GuestError

LADDER = (256, 192, 160, 144, 128, 112, 96, 80)
"""MiB."""
KERNELS = {"6.1": LINUX_6_1, "6.12": LINUX_6_12}
NO_ONE_THERE = "vmcapture.failure=poweroff panic=-1"


@dataclass(frozen=True, slots=True)
class Contender:
    """Who saves, and how to read from the folder that was saved what that took."""

    name: str
    saver: Saver
    figures: Callable[[Path], Figures]


US = Contender("ours", OURS, lambda saved: rung.of_manifest(json.loads((saved / MANIFEST).read_text())))
PEERS = tuple(Contender(option, peer_image.saver(option), peer_image.figures) for option in ("-c", "-l"))


def main(argv: Sequence[str] | None = None) -> int:
    """Go down the ladder for each machine, print a row for each try."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reservation", description=__doc__)
    add = parser.add_argument
    add("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--memory", nargs="+", default=["1G", "4G"], metavar="SIZE")
    add("--cpus", type=int, default=1, metavar="N", help="CPUs in the capture kernel (default: 1)")
    add("--ladder", nargs="+", type=int, default=LADDER, metavar="MIB", help="what to reserve, the largest first")
    add("--peer", action="store_true", help="makedumpfile -c and makedumpfile -l as well")
    add("--no-ours", action="store_true", help="the peer alone")
    add(
        "--timeout", type=float, default=SAVE_TIMEOUT, metavar="SECONDS",
        help="for a save, from its first line on (default: %(default).0f); who fails may wait at a shell that long",
    )  # fmt: skip
    add("--consoles", type=Path, metavar="DIR", help="keep the guests' consoles there")
    arguments = parser.parse_args(argv)
    contenders = (*(() if arguments.no_ours else (US,)), *(PEERS if arguments.peer or arguments.no_ours else ()))

    def measure() -> None:
        if lacking := host.missing([*host.CYCLE, *(["makedumpfile"] if contenders != (US,) else [])]):
            raise HostError(lacking)
        print(rung.HEADING, flush=True)
        with scratch() as name:
            store = ImageStore(Path(name) / "images", more=None if contenders == (US,) else peer_image.build)
            for kernel in arguments.kernel:
                for memory in arguments.memory:
                    for contender in contenders:
                        _descend(contender, kernel, memory, arguments, store, Path(name))
        print("\n".join(rung.LEGEND))

    return run(measure)


def _descend(
    contender: Contender, name: str, memory: str, arguments: argparse.Namespace, store: ImageStore, folder: Path
) -> None:
    cpus = arguments.cpus
    case = Case(f"reservation-{name}", KERNELS[name], cpus + 1, memory=memory, capture_cpus=cpus)
    for reserved in arguments.ladder:
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            tried = replace(case, crashkernel=f"{reserved}M")
            figures, console, reason = _try(contender, tried, store, Path(workdir), arguments.timeout)
            if arguments.consoles is not None:
                _keep_console(Path(workdir), arguments.consoles / f"{name}-{memory}-{reserved}M{contender.name}.log")
        found = Rung(name, memory, reserved, contender.name, figures, rung.init_time(console), reason)
        print(found.row(), flush=True)
        if not found.complete:
            return


def _try(
    contender: Contender, case: Case, store: ImageStore, workdir: Path, timeout: float
) -> tuple[Figures | None, str, str]:
    """Return what a save took, if it saved anything, the console, and why it failed, if it did."""
    figures, console, failure = None, "", ""
    try:
        saved = crash(case, store, workdir, append=NO_ONE_THERE, saver=contender.saver, timeout=timeout)
        console = saved.console
        figures = contender.figures(saved.saved)
    except (GuestError, FileNotFoundError) as error:  # not saved, or not as far as the manifest
        console = console or _console(workdir)
        failure = str(error)
    if figures is not None and figures.complete:
        return figures, console, ""
    return figures, console, rung.why(failure or (figures.reason if figures else ""), console)


def _console(workdir: Path) -> str:
    log = _console_log(workdir)
    return log.read_text(errors="replace").replace("\r", "") if log.exists() else ""


def _keep_console(workdir: Path, copy: Path) -> None:
    log = _console_log(workdir)
    if log.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, copy)


def _console_log(workdir: Path) -> Path:
    return workdir / "console.log"


if __name__ == "__main__":
    sys.exit(main())
