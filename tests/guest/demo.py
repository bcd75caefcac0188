"""``make demo``: crashes a real kernel in QEMU and shows what was saved of it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from capture.errors import CaptureError
from capture.notes.prstatus import INSTRUCTION_POINTER
from tests.guest import host
from tests.guest.cases import CASES
from tests.guest.host import HostError
from tests.guest.qemu import GuestError


def main() -> int:
    """Crash one machine, tell what happens, end with what was saved."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--case", choices=[case.name for case in CASES], default="6.1-la57-smp-file")
    parser.add_argument("--folder", type=Path, default=Path("demo-crash"), help="where to leave what was saved")
    arguments = parser.parse_args()
    if (line := host.missing()) is not None:
        print(f"demo: {line}", file=sys.stderr)
        return 1
    try:
        demonstrate(arguments.case, arguments.folder.resolve())
    except (HostError, GuestError, CaptureError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(case_name: str, folder: Path) -> None:
    """Crash the machine of a case; what it saved, and the log of the console, is left in ``folder``."""
    from tests.guest.crash import ImageStore, Steps, crash  # imports the builder: the host was looked at before

    (case,) = (case for case in CASES if case.name == case_name)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetching {case.kernel} (kept in the cache for the next time)")
    with tempfile.TemporaryDirectory(prefix="vmcapture-demo-", dir=host.SCRATCH) as scratch:
        workdir = Path(scratch)
        try:
            crashed = crash(case, ImageStore(workdir / "images"), workdir / case.name, steps=Steps(say))
        finally:
            for log in (workdir / case.name).glob("console.log"):
                shutil.copy(log, folder)
        saved = Path(shutil.move(crashed.saved, folder))
    say("done")
    print(f"\nsaved: {saved}")
    for path in sorted(saved.iterdir()):
        print(f"  {path.stat().st_size:>12,}  {path.name}")
    print(f"\npanic: {panic_line((saved / 'vmcore-dmesg.txt').read_text(errors='replace'))}")
    for line in instruction_pointers(json.loads((saved / "registers.json").read_text())):
        print(line)
    size = (saved / "vmcore").stat().st_size
    print(f"dump:  {size:,} bytes ({size / 2**20:.0f} MiB) of a machine with {case.memory} of memory")


def panic_line(log: str) -> str:
    """The kernel's own last word.

    Raises:
        GuestError: the log has none.
    """
    found = re.search(r"^.*Kernel panic - not syncing: .*$", log, re.MULTILINE)
    if found is None:
        raise GuestError("vmcore-dmesg.txt has no panic line")
    return found[0]


def instruction_pointers(registers: Any) -> list[str]:
    """A line for each CPU of registers.json."""
    panicked = registers["panicked_cpu"]
    name = INSTRUCTION_POINTER[registers["machine"]]
    return [
        f"CPU {cpu['cpu']}: {name.upper()} {cpu['registers'][name]}"
        + (" (this one panicked)" if cpu["cpu"] == panicked else "")
        for cpu in registers["cpus"]
    ]


if __name__ == "__main__":
    sys.exit(main())
