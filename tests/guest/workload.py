"""Runs in the healthy guest, before it crashes: holds memory of the kinds that a page filter has to tell apart.

Started with the words of the kinds wanted; prints a line for each, with what /proc/meminfo says of it, then "held" and
stays. It has the few modules of the image's Python: no argparse, no subprocess.
"""

import contextlib
import mmap
import os
import signal
import sys
import time

PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_HUGETLB = 0x40000
MADV_PAGEOUT, MADV_HWPOISON = 21, 100
HUGE = 2 << 20
MIB = 1 << 20
FILES = 20_000
PROCESSES, PIPES, PIPE_BYTES = 160, 10, 64 << 10
held: list[mmap.mmap] = []


def anonymous(size: int, flags: int = 0) -> mmap.mmap:
    """Private anonymous memory."""
    memory = mmap.mmap(-1, size, flags=PRIVATE_ANONYMOUS | flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    held.append(memory)
    return memory


def huge_pages(memory: mmap.mmap, advice: int) -> None:
    """Say whether huge pages are wanted; a kernel without them (PREEMPT_RT) knows neither advice."""
    with contextlib.suppress(OSError):
        memory.madvise(advice)


def touch(memory: mmap.mmap, content: bytes = b"") -> None:
    """Write to every page."""
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at : at + 16] = (content or at.to_bytes(8, "little"))[:8] * 2


def meminfo(key: str) -> int:
    """A line of /proc/meminfo, in KiB or pages; -1 where this kernel has none."""
    with open("/proc/meminfo") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return -1


def plain() -> str:
    """Anonymous memory in small pages."""
    memory = anonymous(16 * MIB)
    huge_pages(memory, mmap.MADV_NOHUGEPAGE)
    touch(memory)
    return f"AnonPages {meminfo('AnonPages')}"


def thp() -> str:
    """Transparent huge pages."""
    memory = anonymous(32 * MIB)
    huge_pages(memory, mmap.MADV_HUGEPAGE)
    touch(memory)
    return f"AnonHugePages {meminfo('AnonHugePages')}"


def hugetlb() -> str:
    """Pages of the hugetlb pool: some in use, some free."""
    with open("/proc/sys/vm/nr_hugepages", "w") as pool:  # noqa: PTH123
        pool.write("12")
    touch(anonymous(6 * HUGE, MAP_HUGETLB))
    return f"HugePages_Total {meminfo('HugePages_Total')} HugePages_Free {meminfo('HugePages_Free')}"


def files() -> str:
    """Many small files: inodes and directory entries."""
    folder = "/run/workload-files"
    os.mkdir(folder)  # noqa: PTH102
    for number in range(FILES):
        os.mknod(f"{folder}/a-file-of-some-service-{number:06}")
    return f"SUnreclaim {meminfo('SUnreclaim')} SReclaimable {meminfo('SReclaimable')}"


def processes() -> str:
    """Many processes, each with its stacks and page tables, and with bytes that wait in its pipes."""
    free_before = meminfo("MemFree")
    for _ in range(PROCESSES):
        if os.fork() == 0:
            for _ in range(PIPES):
                os.write(os.pipe()[1], os.urandom(PIPE_BYTES))
            while True:
                time.sleep(3600)
    deadline = time.monotonic() + 120
    wanted = PROCESSES * PIPES * PIPE_BYTES >> 10
    while meminfo("MemFree") > free_before - wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return f"KernelStack {meminfo('KernelStack')} PageTables {meminfo('PageTables')} waiting {wanted}"


def swap() -> str:
    """Memory that was swapped out, of which a half was read again: it stays in the swap cache."""
    memory = anonymous(24 * MIB)
    huge_pages(memory, mmap.MADV_NOHUGEPAGE)
    touch(memory)
    memory.madvise(MADV_PAGEOUT)
    deadline = time.monotonic() + 30
    while meminfo("SwapTotal") - meminfo("SwapFree") < 8 << 10 and time.monotonic() < deadline:
        time.sleep(0.2)
    for at in range(0, len(memory), 2 * mmap.PAGESIZE):
        memory[at]
    return f"SwapCached {meminfo('SwapCached')} swapped {meminfo('SwapTotal') - meminfo('SwapFree')}"


def poison() -> str:
    """A broken page in small pages, one in a huge page, one in a hugetlb page where there are any."""
    signal.signal(signal.SIGBUS, lambda *_: None)  # what a process with broken memory is sent; it cannot be ignored
    small = anonymous(4 * mmap.PAGESIZE)
    touch(small)
    small.madvise(MADV_HWPOISON, mmap.PAGESIZE, mmap.PAGESIZE)
    huge = anonymous(4 * HUGE)
    huge_pages(huge, mmap.MADV_HUGEPAGE)
    touch(huge)
    huge.madvise(MADV_HWPOISON, 2 * HUGE + 5 * mmap.PAGESIZE, mmap.PAGESIZE)
    if meminfo("HugePages_Free") > 0:
        pool = anonymous(HUGE, MAP_HUGETLB)
        touch(pool)
        pool.madvise(MADV_HWPOISON, 0, mmap.PAGESIZE)
    return f"HardwareCorrupted {meminfo('HardwareCorrupted')}"


def kinds() -> str:
    """What /proc/kpageflags says of all pages (include/uapi/linux/kernel-page-flags.h), an independent count."""
    import numpy as np

    names = {"LRU": 5, "BUDDY": 10, "ANON": 12, "SWAPCACHE": 13, "HUGE": 17, "HWPOISON": 19, "THP": 22, "OFFLINE": 23}
    counts = dict.fromkeys(names, 0)
    poisoned: list[int] = []
    first = 0
    with open("/proc/kpageflags", "rb", buffering=0) as file:  # noqa: PTH123
        while data := file.read(1 << 20):
            flags = np.frombuffer(data, dtype="<u8")
            for name, bit in names.items():
                counts[name] += int((flags >> np.uint64(bit) & np.uint64(1)).sum())
            poisoned += [first + int(at) for at in np.flatnonzero(flags >> np.uint64(19) & np.uint64(1))[:600]]
            first += len(flags)
    return " ".join(f"{name} {count}" for name, count in counts.items()) + f" poisoned {poisoned}"


def main() -> None:
    """Make what the arguments name, in their order."""
    for name in sys.argv[1:]:
        print(f"workload {name}: {globals()[name]()}", flush=True)
    print("workload held", flush=True)
    if "kinds" not in sys.argv:
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
