"""zstd:auto against fixed levels, on a slow disk and a fast one: ``python -m tests.bench.throttled``.

The vmcore of a guest is dumped again and again: to a disk that QEMU throttles, and to one that it does not. Times are
of the whole command; codecs take turns. With ``--guest`` it is a capture kernel that dumps its /proc/vmcore, and the
times are by its clock: without KVM its CPUs are so slow that no disk matters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from capture.dumpfile.pace import LEVELS
from tests.bench.common import add_repeat, make, run, scratch
from tests.bench.slow_disk import mounted
from tests.guest import disk
from tests.guest.cases import LINUX_6_12, Case
from tests.guest.crash import TARGET_LABEL, ImageStore, demand, panicked, target_image
from tests.guest.host import HostError
from tests.guest.qemu import BOOT_TIMEOUT, Disk, Machine

AUTO = "zstd:auto"
CODECS = (AUTO, *(f"zstd:{level}" for level in LEVELS))
SLOW_LABEL, GROUP = "slow", "slow"
DUMP_TIMEOUT = 600.0
# Text of the kernel's own, which shrinks as much as a machine's memory does, in a file system in memory.
FILL = (
    "mkdir -p /run/fill && mount -t tmpfs -o size=80% fill /run/fill"
    " && for i in $(seq 24); do cat /proc/kallsyms > /run/fill/$i; done"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each disk."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.throttled", description="zstd:auto on two disks.")
    add = parser.add_argument
    add("--speed", type=int, default=20, metavar="MB/S", help="of the slow disk (default: 20)")
    add_repeat(parser)
    add(
        "--cpus",
        type=int,
        default=1,
        metavar="N",
        help="threads that compress (default: 1)",
    )
    add("--level", type=int, default=1, help="dump level (default: 1)")
    add("--memory", default="2G", metavar="SIZE", help="of the guest whose vmcore is dumped (default: 2G)")
    add("--vmcore", type=Path, metavar="FILE", help="dump this one instead, an ELF file")
    add("--guest", action="store_true", help="measure in a capture kernel")
    add("--codecs", nargs="+", default=CODECS, metavar="CODEC")
    arguments = parser.parse_args(argv)

    def measure() -> None:
        with scratch() as name:
            (_measure_in_guest if arguments.guest else _measure)(arguments, Path(name))

    return run(measure)


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    vmcore = arguments.vmcore or make(folder / "vmcore.elf", arguments.memory, sys.stderr)

    def dump_to(point: Path) -> Callable[[str], tuple[float, int]]:
        def dump(codec: str) -> tuple[float, int]:
            out = point / "dump"
            out.unlink(missing_ok=True)
            os.sync()
            options = ("-q", "--no-progress", "-d", str(arguments.level), "-c", codec, "--threads", str(arguments.cpus))
            started = time.monotonic()
            done = subprocess.run(
                (sys.executable, "-m", "capture", "dump", *options, vmcore, out),
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
            seconds = time.monotonic() - started
            if done.returncode:
                raise HostError(f"-c {codec} failed with status {done.returncode}: {done.stderr.strip()}")
            return seconds, out.stat().st_size

        return dump

    for name, speed in (("slow", arguments.speed * 1_000_000), ("fast", None)):
        with mounted(folder, name, "4G", speed) as point:
            _take_turns(_described(speed), arguments, dump_to(point))


def _described(speed: int | None) -> str:
    return "a disk not throttled" if speed is None else f"a disk of {speed // 1_000_000} MB/s"


def _measure_in_guest(arguments: argparse.Namespace, folder: Path) -> None:
    speed = arguments.speed * 1_000_000
    case = Case(
        "throttled", LINUX_6_12, 2, memory="1G", crashkernel="256M", target_size="4G", capture_cpus=arguments.cpus,
        arguments=("-object", f"throttle-group,id={GROUP},x-bps-total={speed}"),
    )  # fmt: skip
    slow = folder / "slow.ext4"
    disk.make(slow, "4G", SLOW_LABEL)
    store = ImageStore(folder / "images")
    with panicked(
        case, store, folder, final="shell", target="LABEL=nowhere", append="vmcapture.wait=0",
        more_disks=(Disk(target_image(folder)), Disk(slow, throttle_group=GROUP)), target_attached=False,
        before=(FILL,),
    ) as machine:  # fmt: skip
        machine.expect(r"^vmcapture: not saved.*\n", BOOT_TIMEOUT)
        machine.shell()
        for label, limit in ((SLOW_LABEL, speed), (TARGET_LABEL, None)):
            demand(machine, f"mount LABEL={label} /mnt")
            _take_turns(_described(limit), arguments, lambda codec: _dump_in_guest(machine, codec, arguments.level))
            demand(machine, "umount /mnt")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)


def _dump_in_guest(machine: Machine, codec: str, level: int) -> tuple[float, int]:
    demand(machine, "rm -f /mnt/dump; sync; sleep 1", DUMP_TIMEOUT)
    command = f"cat /proc/uptime && vmcapture dump -q --no-progress -d {level} -c {codec} /proc/vmcore /mnt/dump"
    said = demand(machine, f"{command} && cat /proc/uptime && stat -c %s /mnt/dump", DUMP_TIMEOUT).split()
    return float(said[2]) - float(said[0]), int(said[4])


def _take_turns(what: str, arguments: argparse.Namespace, dump: Callable[[str], tuple[float, int]]) -> None:
    """Let each codec dump in turn, and print the table. ``dump`` returns seconds and bytes."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for _ in range(arguments.repeat):
        for codec in arguments.codecs:
            seconds, sizes[codec] = dump(codec)
            times[codec].append(seconds)
            print(f"{what}: {codec}: {seconds:.1f} s", file=sys.stderr, flush=True)
    _print(what, times, sizes)


def _print(what: str, times: defaultdict[str, list[float]], sizes: dict[str, int]) -> None:
    print(f"\n{what}")
    print(f"{'codec':12}{'seconds':>9}{'/ auto':>8}{'MiB':>8}{'MB/s':>8}")
    auto = median(times[AUTO])
    for codec, seconds in times.items():
        middle = median(seconds)
        print(
            f"{codec:12}{middle:9.1f}{middle / auto:8.2f}{sizes[codec] / (1 << 20):8.1f}"
            f"{sizes[codec] / middle / 1e6:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
