"""zstd:auto against fixed levels, on a slow disk and a fast one: ``python -m tests.bench.throttled``.

In a capture kernel, which dumps the same /proc/vmcore again and again: to a disk that QEMU throttles, and to one that
it does not. Times are of the whole command, by the capture kernel's clock; codecs take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from capture.dumpfile.pace import LEVELS
from tests.bench.common import add_repeat, run, scratch
from tests.guest import disk
from tests.guest.cases import LINUX_6_12, Case
from tests.guest.crash import TARGET_LABEL, ImageStore, demand, panicked, target_image
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
    add("--cpus", type=int, default=1, metavar="N", help="CPUs of the capture kernel (default: 1)")
    add("--codecs", nargs="+", default=CODECS, metavar="CODEC")
    arguments = parser.parse_args(argv)

    def measure() -> None:
        with scratch() as name:
            _measure(arguments, Path(name))

    return run(measure)


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    speed = arguments.speed * 1_000_000
    case = Case(
        "throttled", LINUX_6_12, 2, memory="1G", crashkernel="256M", target_size="4G", capture_cpus=arguments.cpus,
        arguments=("-object", f"throttle-group,id={GROUP},x-bps-total={speed}"), level="1",
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
        for label, what in ((SLOW_LABEL, f"a disk of {arguments.speed} MB/s"), (TARGET_LABEL, "a disk not throttled")):
            demand(machine, f"mount LABEL={label} /mnt")
            times: defaultdict[str, list[float]] = defaultdict(list)
            sizes: dict[str, int] = {}
            for _ in range(arguments.repeat):
                for codec in arguments.codecs:
                    seconds, sizes[codec] = _dump(machine, codec)
                    times[codec].append(seconds)
                    print(f"{what}: {codec}: {seconds:.1f} s", file=sys.stderr, flush=True)
            demand(machine, "umount /mnt")
            _print(what, times, sizes)
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)


def _dump(machine: Machine, codec: str) -> tuple[float, int]:
    demand(machine, "rm -f /mnt/dump; sync; sleep 1", DUMP_TIMEOUT)
    command = f"cat /proc/uptime && vmcapture dump -q --no-progress -d 1 -c {codec} /proc/vmcore /mnt/dump"
    said = demand(machine, f"{command} && cat /proc/uptime && stat -c %s /mnt/dump", DUMP_TIMEOUT).split()
    return float(said[2]) - float(said[0]), int(said[4])


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
